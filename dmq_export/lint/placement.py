"""Rules for where quantizers stand, so that TensorRT fuses them into integer kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from dmq_export.lint.finding import Rule
from dmq_export.lint.view import (
    INT4,
    WEIGHTED,
    QdqGraph,
    Quantizer,
    constant,
    consumers,
    dequantized,
    element_type,
    is_constant,
    quantizer,
    shape,
)

Breaches = Iterator[tuple[ir.Node, str]]
MOVING = frozenset({"Cast", "Concat", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
BOUND_TOLERANCE = 0.05  # of a step: a bound rounds to its code whatever the float type


def _activation_scales(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        count = shape(each.scale)
        if not each.of_weight and count is not None and any(size != 1 for size in count):
            yield each.node, "a scale per channel on an activation"


def _placement(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if each.dequantizes:
            between = MOVING if each.of_weight else frozenset({"Cast"})
            for node, _ in consumers(each.output):
                if node.op_type in between and _reaches_weighted(node, between):
                    yield each.node, f"a {node.op_type} between DequantizeLinear and its operator"


def _reaches_weighted(node: ir.Node, through: frozenset[str]) -> bool:
    """Whether the output of ``node`` ends in a weighted operator with nothing but ``through`` between."""
    following = [user for user, _ in consumers(node.outputs[0])]
    return any(
        user.op_type in WEIGHTED or (user.op_type in through and _reaches_weighted(user, through)) for user in following
    )


def _one_sided(graph: QdqGraph) -> Breaches:
    for node in graph.weighted:
        data, weight = dequantized(node.inputs[0]), dequantized(node.inputs[1])
        if weight is not None and weight.of_weight and weight.type not in INT4 and data is None:
            yield node, "quantized weights with float data"
        elif data is not None and weight is None and is_constant(node.inputs[1]):
            yield node, "quantized data with float weights"


def _residuals(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Add"):
        quantized = [dequantized(value) is not None for value in node.inputs]
        if any(quantized) and not all(quantized) and not any(is_constant(value) for value in node.inputs):
            yield node, "one quantized and one float branch"


def _concatenations(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Concat"):
        scales = [found.scales for found in map(dequantized, node.inputs) if found is not None]
        known = [scale for scale in scales if scale is not None and scale.size == 1]
        if len({float(scale.item()) for scale in known}) > 1:
            yield node, "branches of different scales"


def _paddings(graph: QdqGraph) -> Breaches:
    for node in graph.weighted:
        data = dequantized(node.inputs[0])
        codes = data.codes_of() if data is not None else None
        value = codes.data if codes is not None else node.inputs[0]
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "Pad":
            yield producer, f"a Pad before a {node.op_type}"


def _redundant(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        before = quantizer(each.data.producer())
        if not each.dequantizes and before is not None and before.dequantizes:
            yield each.node, "a QuantizeLinear directly after a DequantizeLinear"
        if each.dequantizes and before is not None and before.dequantizes:
            yield each.node, "two DequantizeLinear in a row"


def _shared_tensors(graph: QdqGraph) -> Breaches:
    readers: dict[int, list[Quantizer]] = {}
    for each in graph.quantizers:
        if not each.dequantizes:
            readers.setdefault(id(each.data), []).append(each)
    for several in readers.values():
        known = [each.scales.tobytes() for each in several if each.scales is not None]
        if len(set(known)) > 1:
            yield several[0].node, f"{len(set(known))} scales for one tensor"


def _integer_clips(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Clip"):
        kind = element_type(node.inputs[0]) if node.inputs[0] is not None else None
        if kind in (ir.DataType.INT8, ir.DataType.UINT8):
            yield node, f"a Clip of {kind.name}"


def _clip_bounds(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Clip"):
        for reader, _ in consumers(node.outputs[0]):
            found = quantizer(reader)
            if found is None or found.dequantizes or found.scales is None or found.scales.size != 1:
                continue
            bounds = [bound for bound in map(constant, node.inputs[1:3]) if bound is not None and bound.size == 1]
            steps = [float(bound.item()) / float(found.scales.item()) for bound in bounds if found.scales.any()]
            off = [step for step in steps if np.isfinite(step) and abs(step - round(step)) > BOUND_TOLERANCE]
            if off:
                yield node, f"a bound of {off[0]:.3f} steps"


def _attention_products(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("MatMul"):
        both = [dequantized(value) for value in node.inputs]
        if all(each is not None and not each.of_weight for each in both):
            yield node, "a quantized product of two activations"


RULES = (
    Rule(
        "activation-scale",
        "error",
        "one scale per activation; scales per channel are for weights",
        "onnx --target tensorrt moves channel factors into the weights and a Mul; elsewhere quantize per tensor",
        _activation_scales,
    ),
    Rule(
        "dq-placement",
        "error",
        "DequantizeLinear directly in front of its Conv, ConvTranspose, Gemm or MatMul",
        "apply the operation to the constant codes beforehand, or in front of QuantizeLinear",
        _placement,
    ),
    Rule(
        "both-inputs",
        "warning",
        "data and weights both quantized, or neither: otherwise the product runs in float",
        "quantize the other input too, or leave the layer float (calibrate --float-layer NAME)",
        _one_sided,
    ),
    Rule(
        "residual-add",
        "warning",
        "both branches of an Add quantized, or neither: a float branch forces the other to float",
        "quantize both branches, or move the pair behind the Add",
        _residuals,
    ),
    Rule(
        "concat-scales",
        "warning",
        "one scale for all branches of a Concat; others are quantized again",
        "quantize behind the Concat, or with one scale",
        _concatenations,
    ),
    Rule(
        "pad-before-op",
        "warning",
        "padding as the operator's own attribute; a Pad of its own is not fused",
        "calibrate --activation-scheme symmetric needs no Pad; elsewhere use the pads attribute",
        _paddings,
    ),
    Rule(
        "redundant-pair",
        "warning",
        "a tensor quantized once on its way",
        "remove the pair, unless its scales differ on purpose",
        _redundant,
    ),
    Rule(
        "shared-tensor",
        "warning",
        "one scale per tensor: every further one is a kernel of its own",
        "give layers that read one tensor one scale",
        _shared_tensors,
    ),
    Rule(
        "clip-type",
        "warning",
        "Clip of a float tensor, in front of QuantizeLinear; of integers it is not documented",
        "clip before quantizing",
        _integer_clips,
    ),
    Rule(
        "clip-bounds",
        "warning",
        "bounds at whole multiples of the scale: others round to a code that the calibration did not mean",
        "clip at whole multiples of the scale",
        _clip_bounds,
    ),
    Rule(
        "attention-product",
        "warning",
        "q·k and softmax·v in float: TensorRT has no 8-bit attention for long sequences",
        "leave products of activations float",
        _attention_products,
    ),
)
