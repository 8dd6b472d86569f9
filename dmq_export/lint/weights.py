"""Rules for quantized weights."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from dmq_export.lint.finding import Rule
from dmq_export.lint.view import INT4, WEIGHTED, QdqGraph, Quantizer, attribute, consumers, dequantized, shape

Breaches = Iterator[tuple[ir.Node, str]]
DOCUMENTED_BLOCKS, KNOWN_BLOCKS = (64, 128), (16, 32)


def _scale_shapes(graph: QdqGraph) -> Breaches:
    for each in _per_channel(graph):
        count, ranks = shape(each.scale), shape(each.data)
        if count is None or ranks is None:
            continue
        if len(count) != 1:
            yield each.node, f"a scale of shape {list(count)}"
        elif each.axis is None:
            yield each.node, "a scale per channel without an axis"
        elif not -len(ranks) <= each.axis < len(ranks):
            yield each.node, f"axis {each.axis} of a weight of rank {len(ranks)}"
        elif ranks[each.axis] != count[0]:
            yield each.node, f"{count[0]} scales for {ranks[each.axis]} channels"


def _axes(graph: QdqGraph) -> Breaches:
    for each in _per_channel(graph):
        ranks = shape(each.data)
        if each.axis is None or not ranks:
            continue
        for node, index in consumers(each.output):
            wanted = _output_axis(node, index, len(ranks))
            if wanted is not None and each.axis % len(ranks) != wanted:
                yield each.node, f"axis {each.axis} of the weight of a {node.op_type}"


def _output_axis(node: ir.Node, index: int, rank: int) -> int | None:
    """The weight's axis of output channels, or None where ``node`` takes no weight there."""
    if index != 1:
        return None
    if node.op_type == "Gemm":
        return 1 - int(attribute(node, "transB", 0))
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": rank - 1}.get(node.op_type)


def _per_channel(graph: QdqGraph) -> Iterator[Quantizer]:
    """Weights with more than one scale that are not 4-bit."""
    for each in graph.weights():
        count = shape(each.scale)
        if each.type not in INT4 and count is not None and any(size != 1 for size in count):
            yield each


def _four_bit(graph: QdqGraph) -> Iterator[Quantizer]:
    return (each for each in graph.weights() if each.type == ir.DataType.INT4)


def _blocks(each: Quantizer) -> list[tuple[int, int, int]] | None:
    """``(axis, size, scales)`` of every axis with fewer scales than elements, or None if the ranks differ."""
    sizes, counts = shape(each.data), shape(each.scale)
    if sizes is None or counts is None or len(sizes) != len(counts):
        return None
    known = [
        (axis, size, count) for axis, (size, count) in enumerate(zip(sizes, counts, strict=True)) if size and count
    ]
    return [(axis, size, count) for axis, size, count in known if size != count]


def _int4_blocks(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        blocks = _blocks(each)
        if blocks is None:
            yield each.node, f"a scale of shape {list(shape(each.scale) or ())} for 4-bit weights"
        elif len(blocks) != 1:
            yield each.node, f"{len(blocks)} blocked axes"
        else:
            ((axis, size, count),) = blocks
            rank, block = len(shape(each.data) or ()), size // max(count, 1)
            if axis < rank - 2:
                yield each.node, f"blocks along axis {axis} of {rank}"
            elif block not in (*DOCUMENTED_BLOCKS, *KNOWN_BLOCKS):
                yield each.node, f"blocks of {block}"


def _int4_small_blocks(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        for _, size, count in _blocks(each) or ():
            if size // max(count, 1) in KNOWN_BLOCKS:
                yield each.node, f"blocks of {size // count}"


def _int4_counts(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        for axis, size, count in _blocks(each) or ():
            if size % count:
                yield each.node, f"{size} elements in {count} blocks along axis {axis}"
        sizes = shape(each.data)
        if sizes and sizes[-1] is not None and sizes[-1] % 2:
            yield each.node, f"{sizes[-1]} elements in the last axis"


def _int4_consumers(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        for node, index in consumers(each.output):
            if node.op_type != "Conv" and (node.op_type not in ("MatMul", "Gemm") or index != 1):
                yield each.node, f"4-bit weights as input {index} of a {node.op_type}"


def _int4_convolutions(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        if any(node.op_type == "Conv" for node, _ in consumers(each.output)):
            yield each.node, "4-bit weights of a Conv"


def _int4_with_int8(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        for node, _ in consumers(each.output):
            data = dequantized(node.inputs[0]) if node.op_type in WEIGHTED else None
            if data is not None and data.type == ir.DataType.INT8:
                yield node, "4-bit weights with 8-bit activations"


INT8_CARRIER = "store the codes as INT8, as onnx --target tensorrt does"
RULES = (
    Rule(
        "weight-scale",
        "error",
        "one scale, or a vector of one per output channel with the axis attribute stated (its default changed "
        "between TensorRT 10 and 11)",
        "write a 1-D scale and the axis",
        _scale_shapes,
    ),
    Rule(
        "weight-axis",
        "error",
        "scales along the output channels: axis 0 for Conv and Gemm with transB, 1 for ConvTranspose and Gemm, last "
        "for MatMul",
        "quantize the weight per output channel",
        _axes,
    ),
    Rule(
        "int4-block",
        "error",
        "4-bit weights with a scale per block of 64 or 128 along one of the last two axes",
        INT8_CARRIER,
        _int4_blocks,
    ),
    Rule(
        "int4-block-size",
        "warning",
        "blocks of 64 or 128 are documented; smaller ones have been seen to build",
        "use blocks of 64 or 128",
        _int4_small_blocks,
    ),
    Rule(
        "int4-count",
        "error",
        "whole blocks, and an even number of elements in the last axis",
        INT8_CARRIER,
        _int4_counts,
    ),
    Rule("int4-consumer", "error", "4-bit weights only as input 1 of MatMul and Gemm", INT8_CARRIER, _int4_consumers),
    Rule(
        "int4-conv",
        "warning",
        "4-bit weights are documented for matrix products only",
        INT8_CARRIER,
        _int4_convolutions,
    ),
    Rule(
        "int4-with-int8",
        "warning",
        "TensorRT has no kernel for 4-bit weights with 8-bit activations: the product runs in float",
        INT8_CARRIER,
        _int4_with_int8,
    ),
)
