"""In which precision OpenVINO executes the layers of an exported graph, by its own account."""

from __future__ import annotations

import re
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

INTEGERS = ("i8", "u8")
OPERATORS = ("Convolution", "FullyConnected", "MatMul")
OPERATOR = re.compile(r"(.+)/(?:product|output)(?:_\d+)?(?:/WithoutBiases)?")


def executed_precision(model: Path | bytes, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The runtime precision of each layer's Conv and MatMul nodes, one entry per part, from the compiled model.

    Args:
        model: a file, or a serialized model.
        layers: names of quantized layers.
    """
    import openvino

    core = openvino.Core()
    network = core.read_model(BytesIO(model) if isinstance(model, bytes) else model)
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: dict[str, list[str]] = {name: [] for name in layers}
    for node in compiled.get_runtime_model().get_ordered_ops():
        metadata = node.get_rt_info()
        if metadata["layerType"].astype(str) not in OPERATORS:
            continue
        originals = metadata["originalLayersNames"].astype(str).split(",")
        owners = [match[1] for match in map(OPERATOR.fullmatch, originals) if match is not None and match[1] in found]
        if owners:  # what follows the operator may be fused into it
            found[owners[0]].append(metadata["runtimePrecision"].astype(str))
    return {name: tuple(precisions) for name, precisions in found.items()}
