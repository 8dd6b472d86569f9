"""Rules for the graph around the quantizers."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from dmq_export.lint.finding import Rule
from dmq_export.lint.view import QdqGraph, attribute, dequantized, element_type, shape

Breaches = Iterator[tuple[ir.Node | None, str]]
INTEGER_OPS = ("ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul")
NEWEST_OPSET = 22  # of the parser of TensorRT 10.10; later ones take more and do not say how much
SMALL, MULTIPLE = 16, 8  # channels below and besides which NVIDIA's own quantizer leaves an operator float


def _needed_opset(graph: QdqGraph) -> Breaches:
    needs = [
        (13, "a scale per channel", [each for each in graph.quantizers if shape(each.scale) not in ((), (1,), None)])
    ]
    halves = [each for each in graph.quantizers if element_type(each.scale) == ir.DataType.FLOAT16]
    needs.append((19, "a FLOAT16 scale", halves))
    needs.append((21, "4-bit codes", [each for each in graph.quantizers if each.type == ir.DataType.INT4]))
    for opset, what, users in needs:
        if users and graph.opset < opset:
            yield users[0].node, f"{what} in opset {graph.opset}, which {opset} introduced"


def _new_opset(graph: QdqGraph) -> Breaches:
    if graph.opset > NEWEST_OPSET:
        yield None, f"opset {graph.opset}"


def _integer_ops(graph: QdqGraph) -> Breaches:
    for node in graph.of_type(*INTEGER_OPS):
        yield node, node.op_type


def _small_layers(graph: QdqGraph) -> Breaches:
    for node in graph.weighted:
        weight = dequantized(node.inputs[1])
        sizes = shape(weight.data) if weight is not None and weight.of_weight else None
        if sizes is None or len(sizes) < 2:
            continue
        groups = int(attribute(node, "group", 1))
        channels = [size for size in (sizes[:2] if node.op_type.startswith("Conv") else sizes[-2:]) if size is not None]
        if groups > 1:
            yield node, f"a {node.op_type} of {groups} groups"
        elif any(size < SMALL or size % MULTIPLE for size in channels):
            yield node, f"a {node.op_type} of {' x '.join(map(str, channels))} channels"


def _biases(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Conv", "ConvTranspose", "Gemm"):
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None and (dequantized(bias) is not None or element_type(bias) == ir.DataType.INT32):
            yield node, "a quantized bias"


def _gemm_factors(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Gemm"):
        alpha, beta = (attribute(node, name, 1.0) for name in ("alpha", "beta"))
        if (alpha, beta) != (1.0, 1.0):
            yield node, f"alpha {alpha:g}, beta {beta:g}"


def _gemm_ranks(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Gemm"):
        ranks = [len(sizes) for sizes in map(shape, node.inputs[:2]) if sizes is not None]
        if any(rank != 2 for rank in ranks):
            yield node, f"inputs of rank {' and '.join(map(str, ranks))}"


def _float_type(graph: QdqGraph) -> Breaches:
    if graph.quantizers and all(element_type(each.scale) == ir.DataType.FLOAT for each in graph.quantizers):
        yield None, "all scales FLOAT"


RULES = (
    Rule(
        "opset",
        "error",
        "opset 13 for scales per channel, 19 for FLOAT16 scales, 21 for 4-bit codes",
        "export with a newer opset",
        _needed_opset,
    ),
    Rule(
        "opset-newest",
        "warning",
        f"opset {NEWEST_OPSET} at most is documented for TensorRT 10.10; later releases take more",
        "export with an older opset",
        _new_opset,
    ),
    Rule(
        "integer-operator",
        "error",
        "QuantizeLinear and DequantizeLinear around float operators; TensorRT has no importer for "
        + ", ".join(INTEGER_OPS),
        "quantize in the QDQ form",
        _integer_ops,
    ),
    Rule(
        "small-layer",
        "warning",
        f"{SMALL} channels or more on both sides, multiples of {MULTIPLE}, one group: others often run faster in float",
        "measure with the layer left float (calibrate --float-layer NAME)",
        _small_layers,
    ),
    Rule("quantized-bias", "warning", "a float bias", "leave the bias float", _biases),
    Rule(
        "gemm-factors",
        "warning",
        "alpha and beta of 1: others become float32 constants, which a float16 graph refuses",
        "multiply the factors into weights and bias",
        _gemm_factors,
    ),
    Rule("gemm-rank", "error", "matrices; MatMul takes more dimensions", "use MatMul", _gemm_ranks),
    Rule(
        "float32-graph",
        "warning",
        "a float16 graph: TensorRT runs everything outside the 8-bit kernels in the types the graph states",
        "export with --dtype float16",
        _float_type,
    ),
)
