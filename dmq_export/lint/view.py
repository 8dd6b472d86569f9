"""A graph as the rules see it: its quantizers, its weighted operators, and what is constant."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from dmq_export.lint.target import LintTarget

DEFAULT = LintTarget()
UNTYPED = "dmq_export.untyped_outputs"  # key of what the file did not say before types were inferred
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
TRANSPARENT = frozenset({"Cast", "Identity"})  # the parser looks for a constant through these
RANDOM = frozenset({"RandomNormal", "RandomUniform", "Multinomial", "Bernoulli"})  # no inputs, and no constants
INT4 = frozenset({ir.DataType.INT4, ir.DataType.FLOAT4E2M1})
TRT_NODES = {  # of Model Optimizer's exports from PyTorch; TensorRT's parser reads them in any domain
    "TRT_FP8QuantizeLinear": ("QuantizeLinear", ir.DataType.FLOAT8E4M3FN),
    "TRT_FP8DequantizeLinear": ("DequantizeLinear", ir.DataType.FLOAT8E4M3FN),
    "TRT_INT4QuantizeLinear": ("QuantizeLinear", ir.DataType.INT4),
    "TRT_INT4DequantizeLinear": ("DequantizeLinear", ir.DataType.INT4),
}


@dataclass(frozen=True, eq=False)
class Quantizer:
    """A QuantizeLinear or DequantizeLinear node; ``axis`` is None where the attribute is missing."""

    node: ir.Node
    data: ir.Value
    scale: ir.Value
    zero_point: ir.Value | None
    axis: int | None

    @property
    def dequantizes(self) -> bool:
        return self.node.op_type == "DequantizeLinear"

    @property
    def output(self) -> ir.Value:
        return self.node.outputs[0]

    @cached_property
    def scales(self) -> NDArray[Any] | None:
        """The scale's value, or None where it is computed at run time."""
        return constant(self.scale)

    @cached_property
    def of_weight(self) -> bool:
        """Whether the data is constant, directly or as the codes of a constant."""
        return is_constant(self.data)

    @property
    def type(self) -> ir.DataType:
        """Type of the codes; UINT8 for a QuantizeLinear that does not say, as ONNX has it."""
        if self.dequantizes:
            before = self.codes_of()
            if before is not None:
                return before.type
            known = element_type(self.data) or (element_type(self.zero_point) if self.zero_point else None)
            return known or ir.DataType.UNDEFINED
        if self.zero_point is not None:
            return element_type(self.zero_point) or ir.DataType.UNDEFINED
        return ir.DataType(attribute(self.node, "output_dtype", 0) or ir.DataType.UINT8)

    def codes_of(self) -> Quantizer | None:
        """For a DequantizeLinear, the QuantizeLinear directly before it."""
        producer = self.data.producer()
        return quantizer(producer) if self.dequantizes and producer is not None else None


class QdqGraph:
    """All nodes of a model, subgraphs included; what has no type or shape in the model has none here."""

    def __init__(self, model: ir.Model, target: LintTarget = DEFAULT) -> None:
        self.model = model
        self.target = target
        self.nodes = list(ir.traversal.RecursiveGraphIterator(model.graph))
        self.opset = model.opset_imports.get("", 0)

    @property
    def untyped_outputs(self) -> list[str]:
        """Outputs of the graph whose type the file does not state."""
        return list(self.model.meta.get(UNTYPED, ()))

    @cached_property
    def quantizers(self) -> list[Quantizer]:
        found = (quantizer(node) for node in self.nodes)
        return [each for each in found if each is not None]

    @cached_property
    def weighted(self) -> list[ir.Node]:
        """Convolutions and matrix products."""
        return [node for node in self.nodes if node.op_type in WEIGHTED and len(node.inputs) > 1]

    def integer_operators(self) -> Iterator[ir.Node]:
        """Convolutions and matrix products that are meant to run in integers: 8-bit data and 8-bit weights."""
        for node in self.weighted:
            pair = [dequantized(value) for value in node.inputs[:2]]
            if all(each is not None and each.type == ir.DataType.INT8 for each in pair):
                yield node

    def axis(self, each: Quantizer) -> int:
        """Axis of its scales; where none is stated, the one that the parser takes: 1, and 0 before opset 13."""
        return each.axis if each.axis is not None else int(self.opset >= 13)

    def of_type(self, *op_types: str) -> Iterator[ir.Node]:
        return (node for node in self.nodes if node.op_type in op_types)

    def weights(self) -> Iterator[Quantizer]:
        """DequantizeLinear nodes of weights."""
        return (each for each in self.quantizers if each.dequantizes and each.of_weight)


def with_types(model: ir.Model) -> ir.Model:
    """A copy in which every value has a type and a shape, where ONNX can infer them.

    Functions are written out in it, and quantizers of TensorRT's own domain have ONNX's names.
    """
    typed = model.clone()
    typed.meta[UNTYPED] = [str(value.name) for value in typed.graph.outputs if value.dtype is None]
    if typed.functions:
        common.InlinePass()(typed)
    _rename_trt_nodes(typed)
    inference = logging.getLogger("onnx_ir")
    level = inference.level
    inference.setLevel(logging.ERROR)  # what cannot be inferred stays unknown, and the rules say nothing of it
    try:
        common.ShapeInferencePass(check_type=False, strict_mode=False)(typed)
    finally:
        inference.setLevel(level)
    return typed


def _rename_trt_nodes(model: ir.Model) -> None:
    for node in model.graph.all_nodes():
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            node.domain = ""  # the parser looks at the name alone
        if node.op_type in TRT_NODES:
            node.op_type, codes = TRT_NODES[node.op_type]
            node.domain = ""
            kind = (
                codes if node.op_type == "QuantizeLinear" else element_type(node.inputs[1]) if node.inputs[1] else None
            )
            if node.op_type == "QuantizeLinear":
                node.attributes["output_dtype"] = ir.AttrInt64("output_dtype", codes.value)
            node.outputs[0].type = ir.TensorType(kind) if kind is not None else None


def quantizer(node: ir.Node | None) -> Quantizer | None:
    """``node`` as a quantizer, or None where it is none or lacks data or scale."""
    if node is None or node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 2:
        return None
    data, scale = node.inputs[0], node.inputs[1]
    if data is None or scale is None:
        return None
    return Quantizer(
        node=node,
        data=data,
        scale=scale,
        zero_point=node.inputs[2] if len(node.inputs) > 2 else None,
        axis=attribute(node, "axis", None),
    )


def dequantized(value: ir.Value | None) -> Quantizer | None:
    """The DequantizeLinear that makes ``value``, if one does directly."""
    found = quantizer(value.producer()) if value is not None else None
    return found if found is not None and found.dequantizes else None


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """An attribute's value, or ``default`` where the node does not state it."""
    stated = node.attributes.get(name)
    return default if stated is None else stated.value


def source(value: ir.Value) -> ir.Value:
    """Where ``value`` comes from, through Cast and Identity."""
    producer = value.producer()
    while producer is not None and producer.op_type in TRANSPARENT and producer.inputs[0] is not None:
        value = producer.inputs[0]
        producer = value.producer()
    return value


def tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """The constant behind ``value``, through Cast and Identity; not converted."""
    return None if value is None else ir.convenience.get_const_tensor(source(value))


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``value`` is known when an engine is built, so that the builder folds what makes it.

    The weights of a file may be absent.
    """
    pending, seen = [value], set[int]()
    while pending:
        each = pending.pop()
        if each is None:
            return False
        if id(each) in seen or tensor(each) is not None or each.is_initializer():
            continue
        seen.add(id(each))
        producer = each.producer()
        if producer is None or producer.op_type in RANDOM:
            return False
        pending += [needed for needed in producer.inputs if needed is not None]
    return True


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """A constant's value, or None; meant for scales and bounds, not for weights."""
    found = tensor(value)
    return None if found is None else np.asarray(found.numpy())


def element_type(value: ir.Value) -> ir.DataType | None:
    """The value's type, where it is known."""
    if value.dtype is not None:
        return value.dtype
    found = ir.convenience.get_const_tensor(value)
    return None if found is None else found.dtype


def shape(value: ir.Value | None) -> tuple[int | None, ...] | None:
    """The value's shape with None for sizes that vary, or None where even the rank is unknown."""
    if value is None:
        return None
    known = value if value.shape is not None else ir.convenience.get_const_tensor(value)
    if known is None or known.shape is None:
        return None
    return tuple(size if isinstance(size, int) else None for size in known.shape)


def consumers(value: ir.Value) -> list[tuple[ir.Node, int]]:
    """Nodes that read ``value``, and at which input."""
    return [(use.node, use.idx) for use in value.uses()]
