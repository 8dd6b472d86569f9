"""In which precision OpenVINO executes the layers of an exported graph, by its own account."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

INTEGERS = ("i8", "u8")
OPERATORS = ("Convolution", "FullyConnected", "MatMul")


def executed_precision(model: Path | bytes, layers: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The runtime precision of each layer's Conv and MatMul nodes, one entry per part, from the compiled model.

    Args:
        model: a file, or a serialized model.
        layers: names of quantized layers.
    """
    import openvino

    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found: dict[str, list[str]] = {name: [] for name in layers}
    for node in compiled.get_runtime_model().get_ordered_ops():
        facts = node.get_rt_info()
        if facts["layerType"].astype(str) not in OPERATORS:
            continue
        for original in facts["originalLayersNames"].astype(str).split(","):
            match = re.fullmatch(r"(.+)/product(?:_\d+)?(?:/WithoutBiases)?", original)
            if match is not None and match[1] in found:
                found[match[1]].append(facts["runtimePrecision"].astype(str))
    return {name: tuple(precisions) for name, precisions in found.items()}
