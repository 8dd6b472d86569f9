"""Runs our builder configuration through Polygraphy against TensorRT's real classes, in a process of its own.

The builder, the network and the configuration are mocks, because real ones need a GPU, but mocks that have the real
classes' attributes and no others: whatever our code or Polygraphy sets or calls must exist in this release. Prints
what was set as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import tensorrt as trt

from engines.shapes import ShapeRange
from engines.trt_build import BuildSettings, builder_config

FLAGS = ("REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE")  # found by value: some releases name STRIP_PLAN otherwise
SHAPES = {"sample": ShapeRange((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 8, 8))}


def configured(settings: BuildSettings) -> mock.MagicMock:
    """The configuration after Polygraphy has applied ``settings``."""
    config = mock.MagicMock(spec_set=trt.IBuilderConfig)
    builder = mock.MagicMock(spec_set=trt.Builder)
    builder.create_builder_config.return_value = config
    profile = mock.MagicMock(spec_set=trt.IOptimizationProfile)
    builder.create_optimization_profile.return_value = profile
    tensor = mock.MagicMock(spec_set=trt.ITensor, is_shape_tensor=False)
    tensor.name = "sample"
    network = mock.MagicMock(spec_set=trt.INetworkDefinition, num_inputs=1)
    network.get_input.return_value = tensor
    network.__len__.return_value = 0
    network.__getitem__.side_effect = IndexError
    builder_config(SHAPES, settings)(builder, network)
    profile.set_shape.assert_called_once_with("sample", *vars(SHAPES["sample"]).values())
    return config


def main() -> None:
    cache = Path(sys.argv[1])
    everything = BuildSettings(cache, 4, 2**30, True, "ampere-plus", True, True)
    config = configured(everything)
    flags = {call.args[0] for call in config.set_flag.call_args_list}
    limit = config.set_memory_pool_limit.call_args.args
    report = {
        "version": trt.__version__,
        "flags": [name for name in FLAGS if getattr(trt.BuilderFlag, name) in flags],
        "number of flags": len(flags),
        "level": config.builder_optimization_level,
        "hardware": config.hardware_compatibility_level.name,
        "verbosity": config.profiling_verbosity.name,
        "workspace": [limit[0].name, limit[1]],
        "plain flags": len(configured(BuildSettings()).set_flag.call_args_list),
        "hardware levels": [
            configured(BuildSettings(hardware_compatible=level)).hardware_compatibility_level.name
            for level in ("none", "same-compute-capability", "ampere-plus")
        ],
    }
    print(json.dumps(report))  # noqa: T201


main()
