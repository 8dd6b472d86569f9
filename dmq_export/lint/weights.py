"""Rules for scales per channel and per block, and for 4-bit weights."""

from __future__ import annotations

import math
from collections.abc import Iterator

import onnx_ir as ir

from dmq_export.lint.finding import Rule
from dmq_export.lint.products import Product, operand, output_axis, products
from dmq_export.lint.view import INT4, WEIGHTED, QdqGraph, Quantizer, attribute, consumers, element_type, shape

Breaches = Iterator[tuple[ir.Node, str]]
DOCUMENTED_BLOCKS, KNOWN_BLOCKS = (64, 128), (16, 32)
HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


def _scale_shapes(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        counts, sizes = shape(each.scale), shape(each.data)
        if not counts or sizes is None or counts == (1,):
            continue
        axis = graph.axis(each)
        if not -len(sizes) <= axis < len(sizes):
            yield each.node, f"axis {axis} of a tensor of rank {len(sizes)}"
        elif len(counts) == 1:
            size = sizes[axis]
            if None not in (size, counts[0]) and size != counts[0]:
                yield each.node, f"{counts[0]} scales for {size} channels"
        elif problem := _block_problem(sizes, counts, axis % len(sizes)):
            yield each.node, problem


def _block_problem(sizes: tuple[int | None, ...], counts: tuple[int | None, ...], axis: int) -> str | None:
    """What is wrong with a scale of as many dimensions as the data, or None."""
    if len(counts) != len(sizes):
        return f"a scale of shape {list(counts)} for data of rank {len(sizes)}"
    if None in sizes or None in counts:
        return None
    pairs = [(size or 0, count or 0) for size, count in zip(sizes, counts, strict=True)]
    others = [place for place, (size, count) in enumerate(pairs) if size != count and place != axis]
    size, count = pairs[axis]
    if others:
        return (
            f"{pairs[others[0]][1]} scales for {pairs[others[0]][0]} elements along axis {others[0]}, not axis {axis}"
        )
    if size % max(count, 1):
        return f"{size} elements in {count} blocks along axis {axis}"
    if size == count and size != 1:
        return "a scale for every element"
    return f"blocks along axis {axis} of {len(sizes)}" if axis < len(sizes) - 2 else None


def _unstated_axes(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        counts = shape(each.scale)
        if each.axis is None and counts is not None and any(size != 1 for size in counts):
            yield each.node, "a scale per channel without an axis"


def _axes(graph: QdqGraph) -> Breaches:
    for product in products(graph):
        for index, each in product.operands if product.both else ():
            wanted = output_axis(product.node, index)
            counts = each.scale_shape
            if wanted is None or not each.quantizer.of_weight or counts is None or len(counts) != 1 or counts == (1,):
                continue
            if each.axis is None:
                yield product.node, f"scales that no axis of the weight of a {product.node.op_type} has"
            elif each.axis != wanted:
                yield product.node, f"axis {each.axis} of the weight of a {product.node.op_type}"


def _vectors_in_half(graph: QdqGraph) -> Breaches:
    """A scale ``[1]`` of the weight of a 16-bit convolution that runs in Int8."""
    for product in products(graph):
        if product.node.op_type != "Conv" or product.both is None:
            continue
        data, weight = product.both
        if data.scale_shape == () and weight.scale_shape == (1,) and element_type(product.node.outputs[0]) in HALVES:
            channels = shape(product.node.inputs[1])
            if channels is None or channels[0] != 1:
                yield weight.quantizer.node, "a scale of shape [1] for the weight of a 16-bit Conv"


def _blocks(graph: QdqGraph) -> Iterator[tuple[Product, Quantizer, bool]]:
    """Products of quantized data and a weight with several scales along the inner axis; and whether it is turned."""
    for product in products(graph):
        data, weight = product.data, product.weight
        if data is not None and weight is not None and weight.blocks > 1 and not weight.passes("Cast"):
            turned = weight.passes("Transpose") or bool(attribute(product.node, "transB", 0))
            yield product, weight.quantizer, turned


def _turned_blocks(graph: QdqGraph) -> Breaches:
    for product, weight, turned in _blocks(graph):
        if turned:
            yield weight.node, f"a transposed weight with a scale per block in a {product.node.op_type}"


def _block_sums(graph: QdqGraph) -> Breaches:
    for product, weight, turned in _blocks(graph):
        if not turned:
            yield weight.node, f"a scale per block of the weight of a {product.node.op_type} of quantized data"


def _mixed_codes(graph: QdqGraph) -> Breaches:
    """Products of codes of two types, but for INT4 weights with INT8 data, of which there are kernels."""
    for product in products(graph):
        if product.data is None or product.weight is None:
            continue
        data, weight = product.data.type, product.weight.type
        allowed = data == weight or (data in _INTEGERS and weight in _INTEGERS)
        if not allowed and _EIGHT_BITS & {data, weight}:
            yield product.node, f"{data.name} data and {weight.name} weights"


_INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.INT4, ir.DataType.UINT8})
_EIGHT_BITS = frozenset({ir.DataType.INT8, ir.DataType.FLOAT8E4M3FN})


def _int4_with_int8(graph: QdqGraph) -> Breaches:
    for product in _four_bits_by_eight(graph):
        weight = product.weight
        if weight is None or weight.passes("Cast"):
            continue
        if product.convolves:
            yield product.node, f"4-bit weights and 8-bit data of a {product.node.op_type}"
        elif weight.scale_shape in ((), (1,)):
            yield product.node, "4-bit weights of one scale with 8-bit data"


def _int4_with_int8_read(graph: QdqGraph) -> Breaches:
    for product in _four_bits_by_eight(graph):
        yield product.node, "4-bit weights with 8-bit data"


def _four_bits_by_eight(graph: QdqGraph) -> Iterator[Product]:
    for product in products(graph):
        types = (product.data and product.data.type, product.weight and product.weight.type)
        if types == (ir.DataType.INT8, ir.DataType.INT4):
            yield product


def _four_bit(graph: QdqGraph) -> Iterator[Quantizer]:
    return (each for each in graph.weights() if each.type == ir.DataType.INT4)


def _block_sizes(each: Quantizer) -> list[int]:
    """Elements of a block, for every axis with fewer scales than elements; empty where the ranks differ."""
    sizes, counts = shape(each.data), shape(each.scale)
    if sizes is None or counts is None or len(sizes) != len(counts):
        return []
    pairs = zip(sizes, counts, strict=True)
    return [size // count for size, count in pairs if size and count and size != count]


def _int4_blocks(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        blocks = _block_sizes(each)
        if not blocks:
            yield each.node, f"a scale of shape {list(shape(each.scale) or ())} for 4-bit weights"
        elif blocks[0] not in (*DOCUMENTED_BLOCKS, *KNOWN_BLOCKS):
            yield each.node, f"blocks of {blocks[0]}"


def _int4_small_blocks(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        for block in _block_sizes(each):
            if block in KNOWN_BLOCKS:
                yield each.node, f"blocks of {block}"


def _int4_odd_rows(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        sizes = shape(each.data)
        if sizes and sizes[-1] is not None and sizes[-1] % 2:
            yield each.node, f"{sizes[-1]} elements in the last axis"


def _odd_counts(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        sizes = shape(each.data)
        if each.type in INT4 and sizes and None not in sizes and math.prod(size or 1 for size in sizes) % 2:
            yield each.node, f"{math.prod(size or 1 for size in sizes)} elements of 4 bits"


def _int4_first(graph: QdqGraph) -> Breaches:
    """INT4 weights with a scale per block as the first input of a product, which kills the builder."""
    for node in graph.weighted:
        each = operand(graph, node.inputs[0])
        if each is not None and each.type == ir.DataType.INT4 and each.quantizer.of_weight and each.blocks > 1:
            yield each.quantizer.node, f"4-bit weights with a scale per block as input 0 of a {node.op_type}"


def _int4_consumers(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        for node, index in consumers(each.output):
            if node.op_type != "Conv" and (node.op_type not in ("MatMul", "Gemm") or index != 1):
                yield each.node, f"4-bit weights as input {index} of a {node.op_type}"


def _int4_convolutions(graph: QdqGraph) -> Breaches:
    for each in _four_bit(graph):
        if any(node.op_type in WEIGHTED and node.op_type.startswith("Conv") for node, _ in consumers(each.output)):
            yield each.node, "4-bit weights of a Conv"


INT8_CARRIER = "store the codes as INT8, as onnx --target tensorrt does"
RULES = (
    Rule(
        "scale-shape",
        "refused",
        "refused",
        "one scale; one per channel, as many as the stated axis has elements; or whole blocks along that axis, one of "
        "the last two",
        "write the scale in one of these shapes, and the axis",
        _scale_shapes,
    ),
    Rule(
        "unstated-axis",
        None,
        "refused",
        "scales per channel with the axis attribute stated (its default changed between TensorRT 10 and 11)",
        "write the axis",
        _unstated_axes,
    ),
    Rule(
        "weight-axis",
        "float",
        "refused",
        "scales along the output channels: axis 0 for Conv and Gemm with transB, 1 for ConvTranspose and Gemm, last "
        "for MatMul",
        "quantize the weight per output channel",
        _axes,
    ),
    Rule(
        "weight-vector",
        "refused",
        None,
        "a scalar scale, or one per output channel, for the weight of a 16-bit Conv; no scale of shape [1]",
        "write the scale as a scalar",
        _vectors_in_half,
    ),
    Rule(
        "block-sum",
        "wrong",
        None,
        "one scale per output channel for the weight of quantized data: the scales are applied behind the sum over "
        "all blocks",
        "quantize the weight per output channel, or leave the data float",
        _block_sums,
    ),
    Rule(
        "block-transpose",
        "refused",
        None,
        "no Transpose or transB between a weight with a scale per block and its product with quantized data",
        "quantize the weight per output channel, or leave the data float",
        _turned_blocks,
    ),
    Rule(
        "mixed-codes",
        "refused",
        None,
        "data and weights of one type of codes; or INT8 data with INT4 weights",
        "quantize both to one type",
        _mixed_codes,
    ),
    Rule(
        "int4-with-int8",
        "refused",
        None,
        "4-bit weights with 8-bit data in MatMul and Gemm only, with a scale per output channel",
        INT8_CARRIER,
        _int4_with_int8,
    ),
    Rule(
        "int4-with-int8-read",
        None,
        "float",
        "8-bit weights with 8-bit data: no kernel for 4-bit weights is documented",
        INT8_CARRIER,
        _int4_with_int8_read,
    ),
    Rule(
        "int4-block",
        None,
        "refused",
        "4-bit weights with a scale per block of 64 or 128 along one of the last two axes",
        INT8_CARRIER,
        _int4_blocks,
    ),
    Rule(
        "int4-block-size",
        None,
        "slower",
        "blocks of 64 or 128 are documented; smaller ones have been seen to build",
        "use blocks of 64 or 128",
        _int4_small_blocks,
    ),
    Rule(
        "int4-row",
        None,
        "refused",
        "an even number of 4-bit elements in the last axis",
        INT8_CARRIER,
        _int4_odd_rows,
    ),
    Rule("int4-count", "refused", "refused", "an even number of 4-bit elements", INT8_CARRIER, _odd_counts),
    Rule(
        "int4-first",
        "crashes",
        None,
        "4-bit weights with a scale per block as input 1 of MatMul and Gemm",
        "exchange the inputs of the product, or store the codes as INT8",
        _int4_first,
    ),
    Rule(
        "int4-consumer",
        None,
        "refused",
        "4-bit weights only as input 1 of MatMul and Gemm",
        INT8_CARRIER,
        _int4_consumers,
    ),
    Rule(
        "int4-conv",
        None,
        "float",
        "4-bit weights are documented for matrix products only",
        INT8_CARRIER,
        _int4_convolutions,
    ),
)
