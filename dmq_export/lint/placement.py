"""Rules for where quantizers stand, so that the compiler fuses them into integer kernels."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from dmq_export.lint.finding import Rule
from dmq_export.lint.products import Product, products
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
BETWEEN = frozenset({"Cast", "Concat", "Identity", "Mul", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
BOUND_TOLERANCE = 0.05  # of a step: a bound rounds to its code whatever the float type
FUSED_TOKENS = 512  # up to which int8 attention is one kernel
TURING = 75  # the compute capability whose int8 convolutions the compiler leaves float


def _both_quantized(graph: QdqGraph) -> Iterator[Product]:
    """Products that are meant to run in integers."""
    return (product for product in products(graph) if product.both is not None)


def _activation_scales(graph: QdqGraph) -> Breaches:
    for product in _both_quantized(graph):
        for _, each in product.operands:
            if not each.quantizer.of_weight and each.many_scales:
                yield product.node, f"a scale per channel on the data of a {product.node.op_type}"


def _activation_scales_read(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        count = shape(each.scale)
        if not each.of_weight and count is not None and any(size != 1 for size in count):
            yield each.node, "a scale per channel on an activation"


def _activation_vectors(graph: QdqGraph) -> Breaches:
    for product in _both_quantized(graph):
        data = product.data
        if product.node.op_type == "Conv" and data is not None and data.scale_shape == (1,):
            yield product.node, "a scale of shape [1] on the data of a Conv"


def _crashing_scales(graph: QdqGraph) -> Breaches:
    for product in _both_quantized(graph):
        for _, each in product.operands if product.node.op_type == "Conv" else ():
            if not is_constant(each.quantizer.scale) and each.scale_shape != (1,):
                yield each.quantizer.node, "a scale that is computed at run time in front of a Conv"


def _floating_scales(graph: QdqGraph) -> Breaches:
    for product in _both_quantized(graph):
        for _, each in product.operands if not product.convolves else ():
            if not is_constant(each.quantizer.scale):
                yield product.node, f"a scale that is computed at run time in front of a {product.node.op_type}"


def _transposed_convolutions(graph: QdqGraph) -> Breaches:
    for product in _both_quantized(graph):
        if product.node.op_type == "ConvTranspose":
            yield product.node, "a quantized ConvTranspose"


def _turing_convolutions(graph: QdqGraph) -> Breaches:
    for product in _both_quantized(graph) if graph.target.gpu == TURING else ():
        if product.node.op_type == "Conv" and product.data is not None and product.data.type == ir.DataType.INT8:
            yield product.node, "an INT8 Conv on sm75"


def _placement(graph: QdqGraph) -> Breaches:
    """Constants that are dequantized and then changed in a way the compiler does not move the scales across."""
    for product in products(graph):
        for value, found in zip(product.node.inputs, (product.left, product.right), strict=False):
            if value is not None and found is None and is_constant(value) and dequantized(value) is None:
                node = value.producer()
                if node is not None and node.op_type != "Concat" and _dequantizes_before(node):
                    yield product.node, f"a {node.op_type} between DequantizeLinear and its {product.node.op_type}"


def _dequantizes_before(node: ir.Node) -> bool:
    pending, seen = [node], set[int]()
    while pending:
        each = pending.pop()
        if id(each) not in seen:
            seen.add(id(each))
            if each.op_type == "DequantizeLinear":
                return True
            pending += [before for value in each.inputs if value is not None and (before := value.producer())]
    return False


def _placement_read(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if each.dequantizes:
            between = BETWEEN if each.of_weight else frozenset({"Cast"})
            for node, _ in consumers(each.output):
                if node.op_type in between and _reaches_weighted(node, between):
                    yield each.node, f"a {node.op_type} between DequantizeLinear and its operator"


def _reaches_weighted(node: ir.Node, through: frozenset[str]) -> bool:
    """Whether the output of ``node`` ends in a weighted operator with nothing but ``through`` between."""
    following = [user for user, _ in consumers(node.outputs[0])]
    return any(
        user.op_type in WEIGHTED or (user.op_type in through and _reaches_weighted(user, through)) for user in following
    )


def _joined_weights(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Concat"):
        weights = all(dequantized(value) is not None and is_constant(value) for value in node.inputs)
        if weights and any(user.op_type in WEIGHTED for user, _ in consumers(node.outputs[0])):
            yield node, "a Concat of dequantized weights"


def _one_sided(graph: QdqGraph) -> Breaches:
    for product in products(graph):
        data, weight = product.data, product.weight
        if weight is not None and weight.type not in INT4 and data is None:
            yield product.node, "quantized weights with float data"
        elif data is not None and product.both is None and _float_weight(product):
            yield product.node, "quantized data with float weights"


def _float_weight(product: Product) -> bool:
    other = product.node.inputs[1 if product.left is not None else 0]
    return is_constant(other) and not ((node := other.producer() if other else None) and _dequantizes_before(node))


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
    for node in _quantized_attention(graph):
        tokens = max((size or 0 for size in (shape(node.outputs[0]) or ())[-2:]), default=0)
        kinds = {found.type for value in node.inputs if (found := dequantized(value)) is not None}
        if tokens > FUSED_TOKENS and ir.DataType.INT8 in kinds:
            yield node, f"an INT8 product of two activations over {tokens} tokens"


def _attention_products_read(graph: QdqGraph) -> Breaches:
    for node in _quantized_attention(graph):
        yield node, "a quantized product of two activations"


def _quantized_attention(graph: QdqGraph) -> Iterator[ir.Node]:
    for node in graph.of_type("MatMul"):
        both = [dequantized(value) for value in node.inputs]
        if all(each is not None and not each.of_weight for each in both):
            yield node


RULES = (
    Rule(
        "activation-scale",
        "float",
        None,
        "one scale for the data of a product; scales per channel are for weights",
        "onnx --target tensorrt moves channel factors into the weights and a Mul; elsewhere quantize per tensor",
        _activation_scales,
    ),
    Rule(
        "activation-scale-read",
        None,
        "refused",
        "one scale per activation; scales per channel are for weights",
        "onnx --target tensorrt moves channel factors into the weights and a Mul; elsewhere quantize per tensor",
        _activation_scales_read,
    ),
    Rule(
        "activation-vector",
        "float",
        None,
        "a scalar scale for the data of a Conv; with one of shape [1] it runs in float",
        "write the scale as a scalar",
        _activation_vectors,
    ),
    Rule(
        "scale-crash",
        "crashes",
        None,
        "a constant scale of the DequantizeLinear in front of a quantized Conv",
        "onnx --target tensorrt moves per-step scales into Mul nodes; elsewhere use static scales",
        _crashing_scales,
    ),
    Rule(
        "runtime-scale",
        "float",
        None,
        "a constant scale of the DequantizeLinear in front of a quantized MatMul or Gemm",
        "onnx --target tensorrt moves per-step scales into Mul nodes; elsewhere use static scales",
        _floating_scales,
    ),
    Rule(
        "transposed-conv",
        "float",
        None,
        "no kernel runs a ConvTranspose in integers",
        "leave it float, or write it as Resize and Conv",
        _transposed_convolutions,
    ),
    Rule(
        "turing-conv",
        "float",
        None,
        "INT8 convolutions from compute capability 8.0 on",
        "choose another GPU, or leave the convolutions float",
        _turing_convolutions,
    ),
    Rule(
        "dq-placement",
        "float",
        None,
        "between a weight's DequantizeLinear and its product only what moves data (Transpose, Reshape, Slice, ...) or "
        "multiplies by one constant",
        "apply the operation to the weight before it is quantized",
        _placement,
    ),
    Rule(
        "dq-placement-read",
        None,
        "refused",
        "DequantizeLinear directly in front of its Conv, ConvTranspose, Gemm or MatMul",
        "apply the operation to the constant codes beforehand, or in front of QuantizeLinear",
        _placement_read,
    ),
    Rule(
        "joined-weights",
        "refused",
        None,
        "no Concat of dequantized weights",
        "join the codes beforehand",
        _joined_weights,
    ),
    Rule(
        "both-inputs",
        "float",
        "float",
        "data and weights both quantized, or neither: otherwise the product runs in float",
        "quantize the other input too, or leave the layer float (calibrate --float-layer NAME)",
        _one_sided,
    ),
    Rule(
        "residual-add",
        None,
        "slower",
        "both branches of an Add quantized, or neither: a float branch forces the other to float",
        "quantize both branches, or move the pair behind the Add",
        _residuals,
    ),
    Rule(
        "concat-scales",
        None,
        "slower",
        "one scale for all branches of a Concat; others are quantized again",
        "quantize behind the Concat, or with one scale",
        _concatenations,
    ),
    Rule(
        "pad-before-op",
        None,
        "slower",
        "padding as the operator's own attribute; a Pad of its own is not fused",
        "calibrate --activation-scheme symmetric needs no Pad; elsewhere use the pads attribute",
        _paddings,
    ),
    Rule(
        "redundant-pair",
        None,
        "slower",
        "a tensor quantized once on its way",
        "remove the pair, unless its scales differ on purpose",
        _redundant,
    ),
    Rule(
        "shared-tensor",
        None,
        "slower",
        "one scale per tensor: every further one is a kernel of its own",
        "give layers that read one tensor one scale",
        _shared_tensors,
    ),
    Rule(
        "clip-type",
        None,
        "float",
        "Clip of a float tensor, in front of QuantizeLinear; of integers it is not documented",
        "clip before quantizing",
        _integer_clips,
    ),
    Rule(
        "clip-bounds",
        "wrong",
        "wrong",
        "bounds at whole multiples of the scale: others round to a code that the calibration did not mean",
        "clip at whole multiples of the scale",
        _clip_bounds,
        tried=False,
    ),
    Rule(
        "attention-product",
        "slower",
        None,
        f"q·k and softmax·v in float or FLOAT8E4M3FN; in INT8 attention is one kernel up to {FUSED_TOKENS} tokens only",
        "leave products of activations float",
        _attention_products,
    ),
    Rule(
        "attention-product-read",
        None,
        "slower",
        "q·k and softmax·v in float: no 8-bit attention is documented for long sequences",
        "leave products of activations float",
        _attention_products_read,
    ),
)
