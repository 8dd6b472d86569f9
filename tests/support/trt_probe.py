"""Runs our builder code through Polygraphy against TensorRT's real classes, in a process of its own.

The builder, the parser, the network and the configuration are mocks, because real ones need a GPU, but mocks that have
the real classes' attributes and no others: whatever our code or Polygraphy sets or calls must exist in this release.
Prints what was set as JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from unittest import mock

import tensorrt as trt

from dmq_export.errors import DmqError
from engines.tensorrt.build import BuildSettings, Source, _engine_bytes, builder_config
from engines.tensorrt.profile import ShapeRange

FLAGS = ("REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE")  # found by value: some releases name STRIP_PLAN otherwise
PARSER_ERROR = (
    "In node 0 with name: conv_in/codes and operator: QuantizeLinear (QuantDequantLinearHelper): INVALID_NODE: "
    "Assertion failed: scaleAllPositive: Scale coefficients must all be positive"
)
SHAPES = {"sample": ShapeRange((1, 4, 8, 8), (2, 4, 8, 8), (8, 4, 8, 8))}


def mocked_builder() -> tuple[mock.MagicMock, mock.MagicMock, mock.MagicMock]:
    """A builder, its configuration and its network, which has one input."""
    values = {"DLA_core": -1, "default_device_type": trt.DeviceType.GPU, "num_optimization_profiles": 1}
    if hasattr(trt.IBuilderConfig, "int8_calibrator"):  # gone in TensorRT 11
        values["int8_calibrator"] = None
    config = mock.MagicMock(spec_set=trt.IBuilderConfig, **values)
    config.get_memory_pool_limit.return_value = config.get_tactic_sources.return_value = 0
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
    builder.create_network.return_value = network
    return builder, config, network


def configured(settings: BuildSettings) -> mock.MagicMock:
    """The configuration after Polygraphy has applied ``settings``."""
    builder, config, network = mocked_builder()
    builder_config(SHAPES, settings)(builder, network)
    profile = builder.create_optimization_profile.return_value
    profile.set_shape.assert_called_once_with("sample", *vars(SHAPES["sample"]).values())
    return config


def built(cache: Path, parser_error: str | None = None) -> tuple[bytes | str, int]:
    """What comes of a build, or our error, and the flags the network was created with."""
    builder, config, _ = mocked_builder()
    builder.build_serialized_network.return_value = b"plan"
    written = mock.MagicMock()
    written.__enter__.return_value = b"timings"
    config.get_timing_cache.return_value = mock.MagicMock(spec_set=trt.ITimingCache)
    config.get_timing_cache.return_value.serialize.return_value = written
    parser = mock.MagicMock(spec_set=trt.OnnxParser, num_errors=int(parser_error is not None))
    parser.get_error.return_value = parser_error
    source = Source(Path("model.onnx"), SHAPES, (), layers=("conv_in",))
    with (
        mock.patch.object(trt, "Builder", return_value=builder),
        mock.patch.object(trt, "OnnxParser", return_value=parser),
    ):
        try:
            result: bytes | str = _engine_bytes(source, BuildSettings(timing_cache=cache))
        except DmqError as error:
            result = str(error)
    return result, builder.create_network.call_args.kwargs["flags"]


def main() -> None:
    cache = Path(sys.argv[1])
    everything = BuildSettings(cache, 4, 2**30, True, "ampere-plus", True, True)
    config = configured(everything)
    flags = {call.args[0] for call in config.set_flag.call_args_list}
    limit = config.set_memory_pool_limit.call_args.args
    plan, network_flags = built(cache)
    refusal, _ = built(cache, PARSER_ERROR)
    report = {
        "plan": plan.decode() if isinstance(plan, bytes) else plan,
        "cache": cache.read_text(),
        "strongly typed": network_flags == 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED),
        "refusal": refusal,
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
