"""Makes a float16 graph keep the sums of its integer products where TensorRT's compiler keeps them.

ONNX Runtime computes a float16 graph in float32 from end to end and sees no overflow. TensorRT-RTX 1.7.1 sums integers
in int32, and then writes

- a product whose weight has one scale: ``s_x * s_w * sum`` in float16,
- a matrix product whose weight has a scale per channel: ``sum`` in float16, and ``s_x * s_w`` follows as a float16 Mul,
- a convolution whose weight has a scale per channel: ``s_x * s_w * sum`` in float32.

So the graph that is verified rounds what is written in float16 to float16, and what exceeds 65504 is infinite.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from dmq_export.graph.float16 import LARGEST_FLOAT16
from dmq_export.graph.node_builder import NodeBuilder
from dmq_export.layer import Float

PRODUCTS = ("Conv", "MatMul")
SPLITTER = np.array(2**13 + 1, np.float32)  # Veltkamp's: leaves 11 of float32's 24 bits
OVERFLOW = np.array(LARGEST_FLOAT16 + 16, np.float32)  # the least that rounds to infinity


def keep_float16_sums(model: ir.Model) -> None:
    """Round every integer product of the float16 graph ``model`` as the compiler does, in place."""
    for node in list(model.graph):
        if node.op_type in PRODUCTS and node.outputs[0].dtype in (ir.DataType.FLOAT16, None):
            scales = _scales(node)
            if scales is not None and not (node.op_type == "Conv" and scales.size > 1):
                _insert_rounding(model.graph, node, scales)


def float16_rounded(builder: NodeBuilder, value: ir.Value) -> ir.Value:
    """``value`` in float32, rounded as float16 rounds what it holds as a normal number; what overflows is infinite.

    Casts there and back would say it more simply, and ONNX Runtime takes them out.
    """
    lifted = builder.op("Mul", [value, builder.constant("splitter", SPLITTER)], name="lifted")
    rest = builder.op("Sub", [value, lifted], name="rest")
    rounded = builder.op("Add", [lifted, rest], name="rounded")
    size = builder.op("Abs", [value], name="size")
    fits = builder.op("Less", [size, builder.constant("overflow", OVERFLOW)], name="fits")
    infinite = builder.constant("infinite", np.array(np.inf, np.float32))
    return builder.op("Where", [fits, rounded, infinite], name="kept")


def _scales(node: ir.Node) -> Float | None:
    """``s_x * s_w`` of a product of int8 data and int8 weights; None for any other."""
    found = []
    for value in node.inputs[:2]:
        producer = None if value is None else value.producer()
        if producer is None or producer.op_type != "DequantizeLinear":
            return None
        scale = producer.inputs[1]
        if scale is None or scale.const_value is None:
            return None
        found.append(scale.const_value.numpy().astype(np.float32))
    return np.asarray(found[0] * found[1])


def _insert_rounding(graph: ir.Graph, node: ir.Node, scales: Float) -> None:
    product = node.outputs[0]
    users = list(product.uses())
    builder = NodeBuilder(graph, f"{node.name}/half_sum")
    value = builder.op("Cast", [product], {"to": ir.DataType.FLOAT}, name="float32")
    if scales.size > 1:
        value = builder.op("Div", [value, builder.constant("scales", scales)], name="sum")
    value = float16_rounded(builder, value)
    if scales.size > 1:
        factor = builder.constant("half_scales", scales.astype(np.float16).astype(np.float32))
        value = builder.op("Mul", [value, factor], name="scaled")
    value = builder.op("Cast", [value], {"to": ir.DataType.FLOAT16}, name="float16")
    value.shape, value.type = product.shape, ir.TensorType(ir.DataType.FLOAT16)
    for user, index in users:
        user.replace_input_with(index, value)
    graph.insert_after(node, builder.nodes)
