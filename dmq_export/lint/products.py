"""Convolutions and matrix products as the compiler sees them.

It moves a DequantizeLinear across operators that only move data, so that a Transpose between a weight and its product
costs nothing; what it cannot cross makes the product run in float. Which operators those are was tried with
TensorRT-RTX 1.7.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import onnx_ir as ir

from dmq_export.lint.view import QdqGraph, Quantizer, attribute, constant, is_constant, quantizer, shape

RESHAPING = frozenset({"Expand", "Flatten", "Reshape", "Squeeze", "Unsqueeze"})
KEEPING = frozenset({"Cast", "Dropout", "Identity", "Neg", "Slice"})  # their axes are those of their input
MOVING = RESHAPING | KEEPING | {"DepthToSpace", "Gather", "MaxPool", "Tile", "Transpose"}
PADDED = ("constant", "reflect", "edge")


@dataclass(frozen=True)
class Operand:
    """A quantized input of a product.

    Attributes:
        quantizer: the DequantizeLinear that it comes from.
        between: operators between the two, the last first.
        axis: of the operand, along which the scales run; None where there is one scale, or they lie across axes.
    """

    quantizer: Quantizer
    between: tuple[ir.Node, ...]
    axis: int | None

    @property
    def type(self) -> ir.DataType:
        return self.quantizer.type

    @property
    def scale_shape(self) -> tuple[int | None, ...] | None:
        return shape(self.quantizer.scale)

    @property
    def many_scales(self) -> bool:
        """Whether there is more than one scale, as far as is known."""
        return any(size != 1 for size in self.scale_shape or ())

    @property
    def blocks(self) -> int:
        """Scales along the blocked axis of a weight with a scale per block; 1 where there are no blocks."""
        sizes, counts = shape(self.quantizer.data), self.scale_shape
        if sizes is None or counts is None or len(counts) != len(sizes) or len(sizes) < 2:
            return 1
        blocked = [count for size, count in zip(sizes, counts, strict=True) if count and size != count]
        return blocked[0] if len(blocked) == 1 else 1

    def passes(self, *op_types: str) -> bool:
        return any(node.op_type in op_types for node in self.between)


@dataclass(frozen=True, eq=False)
class Product:
    """A convolution or matrix product; an operand is None where it is float."""

    node: ir.Node
    left: Operand | None
    right: Operand | None

    @property
    def convolves(self) -> bool:
        return self.node.op_type.startswith("Conv")

    @property
    def both(self) -> tuple[Operand, Operand] | None:
        """Both operands where both are quantized."""
        return (self.left, self.right) if self.left is not None and self.right is not None else None

    @property
    def operands(self) -> list[tuple[int, Operand]]:
        """The quantized operands, and at which input."""
        return [(index, each) for index, each in enumerate((self.left, self.right)) if each is not None]

    @property
    def weight(self) -> Operand | None:
        """The constant operand, if one is quantized."""
        return next((each for _, each in self.operands if each.quantizer.of_weight), None)

    @property
    def data(self) -> Operand | None:
        """The operand that is no weight, if one is quantized."""
        return next((each for _, each in self.operands if not each.quantizer.of_weight), None)


@lru_cache(maxsize=1)  # every rule asks for those of the same graph
def products(graph: QdqGraph) -> tuple[Product, ...]:
    """All of ``graph``."""
    return tuple(
        Product(node, operand(graph, node.inputs[0]), operand(graph, node.inputs[1])) for node in graph.weighted
    )


def operand(graph: QdqGraph, value: ir.Value | None) -> Operand | None:
    """What ``value`` is dequantized from, across everything that only moves data."""
    between: list[ir.Node] = []
    while value is not None and (producer := value.producer()) is not None:
        found = quantizer(producer)
        if found is not None:
            return Operand(found, tuple(between), _final_axis(graph, found, between)) if found.dequantizes else None
        if not _moves(producer):
            return None
        between.append(producer)
        value = next((each for each in producer.inputs if not is_constant(each)), producer.inputs[0])
    return None


def output_axis(node: ir.Node, index: int) -> int | None:
    """Axis of input ``index`` along which the outputs' channels lie."""
    operand_shape = shape(node.inputs[index])
    if operand_shape is None or len(operand_shape) < 2:
        return None
    if node.op_type.startswith("Conv"):
        return int(node.op_type == "ConvTranspose") if index == 1 else None
    if node.op_type == "Gemm":
        return int(attribute(node, "transA", 0)) if index == 0 else 1 - int(attribute(node, "transB", 0))
    return len(operand_shape) - (1 if index == 1 else 2)


def _moves(node: ir.Node) -> bool:
    """Whether the compiler moves a DequantizeLinear from before ``node`` to behind it."""
    if node.op_type in ("Mul", "Div"):
        return any(
            is_constant(value) and math.prod(size or 0 for size in shape(value) or ()) == 1 for value in node.inputs
        )
    if node.op_type == "Pad":
        filled = constant(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else None
        mode = attribute(node, "mode", "constant")
        return mode in PADDED and (mode != "constant" or filled is None or not filled.any())
    if node.op_type == "Concat":
        return not is_constant(node.outputs[0]) and all(_dequantized(value) for value in node.inputs)
    return node.op_type in MOVING


def _dequantized(value: ir.Value | None) -> bool:
    found = quantizer(value.producer()) if value is not None else None
    return found is not None and found.dequantizes


def _final_axis(graph: QdqGraph, found: Quantizer, between: list[ir.Node]) -> int | None:
    """Where the axis of the scales has come to behind all of ``between``."""
    counts, sizes = shape(found.scale), shape(found.data)
    if not counts or sizes is None or counts == (1,) or len(counts) != 1:
        return None
    axis: int | None = graph.axis(found) % len(sizes)
    for node in reversed(between):
        axis = None if axis is None else _moved(node, axis)
    return axis


def _moved(node: ir.Node, axis: int) -> int | None:
    if node.op_type == "Transpose":
        rank = len(shape(node.inputs[0]) or ())
        order = list(attribute(node, "perm", range(rank)[::-1]))
        return order.index(axis) if axis in order else None
    if node.op_type in RESHAPING:
        return _reshaped(shape(node.inputs[0]), shape(node.outputs[0]), axis)
    return axis if node.op_type in KEEPING or node.op_type in ("Mul", "Div", "Pad") else None


def _reshaped(before: tuple[int | None, ...] | None, after: tuple[int | None, ...] | None, axis: int) -> int | None:
    """The axis of ``after`` with as many elements, and as many in front of it; None if there is none."""
    if before is None or after is None or None in before or None in after:
        return None
    front = math.prod(size or 1 for size in before[:axis])
    fits = [
        place
        for place, size in enumerate(after)
        if size == before[axis] and math.prod(each or 1 for each in after[:place]) == front
    ]
    return fits[0] if fits else None
