"""Which of an engine's layers really run in integers, from the engine inspector's JSON.

TensorRT 10 writes the type of a tensor into ``Format/Datatype``, TensorRT 11 into a ``DataType`` of its own; both
are read here.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmq_export.common.table import table
from dmq_export.errors import DmqError
from engines.tensorrt.log import node_names

TYPES = (  # in the order in which they are looked for, because "float16" is in "bfloat16"
    ("int8", r"(?<!u)int8\b|\bi8\b"),
    ("bfloat16", r"bf16|bfloat16"),
    ("float16", r"fp16|half|float16|\bf16\b"),
    ("float32", r"fp32|float32|\bfloat\b|\bf32\b"),
    ("other", r""),
)
REFORMAT = "reformat"
PRODUCTS = re.compile(r"conv|gemm|matrixmultiply|matmul", re.IGNORECASE)


@dataclass(frozen=True)
class EngineLayers:
    """What an engine is made of.

    Attributes:
        counts: layers by the type of their data (``int8``, ``float16``, ``bfloat16``, ``float32``, ``other``) and
            ``reformat`` for those that only convert.
        not_integer: nodes meant to run in integers whose kernel takes another type.
        unseen: nodes meant to run in integers that the inspector does not name: fused into a larger kernel.
    """

    counts: Mapping[str, int]
    not_integer: tuple[str, ...]
    unseen: tuple[str, ...]

    def text(self) -> str:
        """The counts as a table, then what is not as meant."""
        rows = [(name, str(count)) for name, count in self.counts.items()]
        warnings = [
            f"warning: {len(names)} layers {what}: {', '.join(names)}"
            for names, what in (
                (self.not_integer, "were meant to run in int8 and do not"),
                (self.unseen, "were fused into kernels that do not name them, so their type is not known"),
            )
            if names
        ]
        return "\n".join([table(("engine layers", "count"), rows, right=(1,)), *warnings])


def engine_layers(information: str, integer_nodes: Sequence[str]) -> EngineLayers:
    """Count the layers of an engine and find those that are not what they were meant to be.

    Args:
        information: the engine inspector's JSON.
        integer_nodes: names of the convolutions and matrix products that are meant to run in integers.

    Raises:
        DmqError: it is no such JSON, or was written without the details.
    """
    layers = _layers(information)
    counts = Counter(_type(layer) for layer in layers)
    integer: set[str] = set()
    other: set[str] = set()
    for layer in layers:
        if _type(layer) == "int8" or _weight_type(layer) == "int8":
            integer |= _nodes(layer)
        elif PRODUCTS.search(_kind(layer)):
            other |= _nodes(layer)
    return EngineLayers(
        counts={name: counts[name] for name in (*(name for name, _ in TYPES), REFORMAT) if counts[name]},
        not_integer=tuple(name for name in integer_nodes if name in other - integer),
        unseen=tuple(name for name in integer_nodes if name not in other | integer),
    )


def _layers(information: str) -> list[dict[str, Any]]:
    try:
        layers = list(json.loads(information)["Layers"])
    except (ValueError, KeyError, TypeError) as error:
        raise DmqError("the engine inspector gave no JSON with layers") from error
    if not all(isinstance(layer, dict) and "Name" in layer for layer in layers):
        raise DmqError("the plan was built without details for the engine inspector (profiling verbosity)")
    return layers


def _type(layer: Mapping[str, Any]) -> str:
    """The type of a layer's data: that of its first input, or of its output where it has none."""
    if _is_reformat(layer):
        return REFORMAT
    tensors = [*layer.get("Inputs", []), *layer.get("Outputs", [])]
    return _named(_stated(tensors[0])) if tensors else "other"


def _stated(tensor: Mapping[str, Any]) -> str:
    for key in ("DataType", "Datatype", "Format/Datatype", "Type", "Format"):
        if key in tensor:
            return str(tensor[key])
    return ""


def _named(text: str) -> str:
    return next(name for name, pattern in TYPES if re.search(pattern, text, re.IGNORECASE))


def _weight_type(layer: Mapping[str, Any]) -> str:
    weights = layer.get("Weights")
    return _named(str(weights.get("Type", ""))) if isinstance(weights, dict) else "other"


def _is_reformat(layer: Mapping[str, Any]) -> bool:
    return REFORMAT in _kind(layer).lower() or str(layer["Name"]).startswith("Reformatting CopyNode")


def _kind(layer: Mapping[str, Any]) -> str:
    return f"{layer.get('LayerType', '')} {layer.get('ParameterType', '')}"


def _nodes(layer: Mapping[str, Any]) -> set[str]:
    """The ONNX nodes that a layer is made of; Myelin adds a suffix of its own to its names."""
    names = node_names(f"{layer['Name']} {layer.get('Metadata', '')}")
    return {re.sub(r"_myl\d+_\d+$", "", name) for name in names}
