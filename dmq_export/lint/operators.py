"""Rules for operators, and forms of them, that the parser and the builder do not have; quantized or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import onnx_ir as ir

from dmq_export.lint.finding import Rule
from dmq_export.lint.view import QdqGraph, attribute, constant, element_type, shape

Breaches = Iterator[tuple[ir.Node | None, str]]
DataType = ir.DataType
INTEGER_OPS = frozenset({"ConvInteger", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"})
# what OnnxParser.supports_operator of TensorRT-RTX 1.7.1 says yes to; it looks at the name and not at the domain
NAMES = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh Attention AveragePool BatchNormalization
    BlackmanWindow Cast CastLike CausalConvWithState Ceil Celu Clip Concat Constant ConstantOfShape Conv
    ConvTranspose Cos Cosh CumSum DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater
    GreaterOrEqual GridSample GroupNormalization GroupQueryAttention HammingWindow HannWindow HardSigmoid HardSwish
    Hardmax Identity If ImageScaler InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
    LessOrEqual LinearAttention Log LogSoftmax Loop LpNormalization LpPool MatMul MatMulNBits Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul MultiHeadAttention Neg NonMaxSuppression NonZero Not OneHot Or PRelu
    Pad ParametricSoftplus Pow QMoE QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform
    RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign RotaryEmbedding Round STFT
    ScaledTanh Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign SimplifiedLayerNormalization
    Sin Sinh Size SkipSimplifiedLayerNormalization Slice Softmax Softplus Softsign SpaceToDepth Split Sqrt Squeeze
    Sub Sum Swish TRT_BlockDequantize TRT_BlockQuantize TRT_DynamicQuantize TRT_FP4DynamicQuantize
    TRT_FP8DequantizeLinear TRT_FP8QuantizeLinear TRT_INT4DequantizeLinear TRT_INT4QuantizeLinear
    TRT_MXFP8DequantizeLinear TRT_MXFP8DynamicQuantize TRT_MXFP8QuantizeLinear TRT_MoE Tan Tanh TensorScatter
    ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where Xor
"""
OPERATORS = frozenset(NAMES.split())
BROKEN = {  # of OPERATORS all the same
    "Celu": "a Celu, whose importer fails",
    "MatMulNBits": "a MatMulNBits, whose plugin is not there",
    "NonZero": "a NonZero, whose plugin is not there",
}
ONE_TYPE = frozenset(
    {"Add", "Concat", "Conv", "ConvTranspose", "Div", "Gemm", "MatMul", "Max", "Min", "Mul", "PRelu", "Sub", "Where"}
)
FLOATS = {  # DOUBLE becomes FLOAT
    DataType.FLOAT: "FLOAT",
    DataType.DOUBLE: "FLOAT",
    DataType.FLOAT16: "FLOAT16",
    DataType.BFLOAT16: "BFLOAT16",
}
CASTS = frozenset({*FLOATS, DataType.BOOL, DataType.INT8, DataType.INT32, DataType.INT64, DataType.UINT8})
MOST_OF_TOPK = 3840
HEADS = (9, 256)  # sizes of an attention head that have a kernel


def _operators(graph: QdqGraph) -> Breaches:
    for node in graph.nodes:
        if node.op_type not in OPERATORS:
            yield node, node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}::{node.op_type}"


def _integer_operators(graph: QdqGraph) -> Breaches:
    return ((node, node.op_type) for node in graph.of_type(*INTEGER_OPS))


def _types(graph: QdqGraph) -> Breaches:
    """Float operands of two types; not before opset 19, where DequantizeLinear was typed otherwise."""
    for node in graph.nodes if graph.opset >= 19 or _float_scales(graph) else ():
        values = node.inputs[1:] if node.op_type == "Where" else node.inputs
        kinds = [element_type(value) for value in values if value is not None]
        names = dict.fromkeys(FLOATS[kind] for kind in kinds if kind in FLOATS)
        if node.op_type in ONE_TYPE and len(names) > 1:
            yield node, f"operands of {' and '.join(names)}"


def _float_scales(graph: QdqGraph) -> bool:
    return all(element_type(each.scale) == DataType.FLOAT for each in graph.quantizers)


def _forms(graph: QdqGraph) -> Breaches:
    for node in graph.nodes:
        check = FORMS.get(node.op_type)
        if node.op_type in BROKEN:
            yield node, BROKEN[node.op_type]
        elif check is not None and (found := check(node)) is not None:
            yield node, found


def _one_dimension(node: ir.Node) -> str | None:
    rank = _rank(node)
    return f"{_a(node)} of {rank}-D data" if rank is not None and rank < 2 else None


def _no_dimension(node: ir.Node) -> str | None:
    if _input_type(node) == DataType.BOOL:
        return f"{_a(node)} of BOOL"
    return f"{_a(node)} of 0-D data" if _rank(node) == 0 else None


def _resize(node: ir.Node) -> str | None:
    return "a Resize with antialias" if attribute(node, "antialias", 0) else None


def _scatter(node: ir.Node) -> str | None:
    reduction = attribute(node, "reduction", "none")
    return f"a {node.op_type} that reduces by {reduction}" if reduction != "none" else None


def _top(node: ir.Node) -> str | None:
    count = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return f"a TopK of {count.item()}" if count is not None and count.size == 1 and count > MOST_OF_TOPK else None


def _layer_norm(node: ir.Node) -> str | None:
    count = sum(bool(value.name) for value in node.outputs)
    return f"a LayerNormalization of {count} outputs" if count > 1 else None


def _integer_product(node: ir.Node) -> str | None:
    kind = _input_type(node)
    return f"a {node.op_type} of {kind.name}" if kind in (DataType.INT32, DataType.INT64) else None


def _arithmetic(node: ir.Node) -> str | None:
    kind = _input_type(node)
    return f"{_a(node)} of {kind.name}" if kind == DataType.BOOL else None


def _cast(node: ir.Node) -> str | None:
    kind = DataType(attribute(node, "to", 0))
    if kind not in CASTS:
        return f"a Cast to {kind.name}"
    inside = kind == DataType.UINT8 and not node.outputs[0].is_graph_output()
    return "a Cast to UINT8 inside the graph" if inside else None


def _a(node: ir.Node) -> str:
    """The operator with its article."""
    return f"{'an' if node.op_type[0] in 'AEIOU' else 'a'} {node.op_type}"


def _rank(node: ir.Node) -> int | None:
    sizes = shape(node.inputs[0]) if node.inputs else None
    return None if sizes is None else len(sizes)


def _input_type(node: ir.Node) -> DataType | None:
    return element_type(node.inputs[0]) if node.inputs and node.inputs[0] is not None else None


REDUCTIONS = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "Sum", "SumSquare")
FORMS: dict[str, Callable[[ir.Node], str | None]] = {
    **dict.fromkeys(("ArgMax", "ArgMin", "Hardmax", "LogSoftmax", "Softmax"), _one_dimension),
    **{f"Reduce{name}": _no_dimension for name in REDUCTIONS},
    **dict.fromkeys(("Add", "Div", "Mul", "Sub"), _arithmetic),
    **dict.fromkeys(("Gemm", "MatMul"), _integer_product),
    **dict.fromkeys(("Scatter", "ScatterElements", "ScatterND"), _scatter),
    "Cast": _cast,
    "LayerNormalization": _layer_norm,
    "Resize": _resize,
    "TopK": _top,
}


def _unsigned_inputs(graph: QdqGraph) -> Breaches:
    for value in graph.model.graph.inputs:
        for use in value.uses() if element_type(value) == DataType.UINT8 else ():
            if use.node.op_type not in ("Cast", "Identity", "QuantizeLinear", "DequantizeLinear"):
                yield use.node, f"UINT8 in a {use.node.op_type}"


def _attention(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Attention"):
        if node.domain not in ("", "ai.onnx"):
            continue
        kind, size = _input_type(node), _head_size(node)
        if kind in (DataType.FLOAT, DataType.DOUBLE):
            yield node, "an Attention of FLOAT"
        elif size is not None and not HEADS[0] <= size <= HEADS[1]:
            yield node, f"an Attention with heads of {size}"


def _head_size(node: ir.Node) -> int | None:
    sizes = shape(node.inputs[0])
    if not sizes or sizes[-1] is None:
        return None
    return sizes[-1] if len(sizes) == 4 else sizes[-1] // max(1, int(attribute(node, "q_num_heads", 1)))


RULES = (
    Rule(
        "operator",
        "refused",
        None,
        "the operators that the parser has; not " + ", ".join(sorted(INTEGER_OPS)) + ", which need the QDQ form",
        "export without it: decompose the operator, or quantize in the QDQ form",
        _operators,
    ),
    Rule(
        "integer-operator",
        None,
        "refused",
        "QuantizeLinear and DequantizeLinear around float operators; there is no importer for "
        + ", ".join(sorted(INTEGER_OPS)),
        "quantize in the QDQ form",
        _integer_operators,
    ),
    Rule(
        "operator-form",
        "refused",
        None,
        "Softmax and ArgMax of 2-D data, reductions of 1-D data, Resize without antialias, Scatter without reduction, "
        f"TopK of {MOST_OF_TOPK}, LayerNormalization with one output, arithmetic and products of floats, known types",
        "Unsqueeze in front and Squeeze behind; drop what is not used; cast to a float type",
        _forms,
    ),
    Rule(
        "uint8-input",
        "refused",
        None,
        "a Cast directly behind an input of UINT8",
        "cast the input",
        _unsigned_inputs,
    ),
    Rule(
        "attention-operator",
        "refused",
        None,
        f"Attention of FLOAT16 or BFLOAT16, with heads of {HEADS[0]} to {HEADS[1]}",
        "export with opset 22 or older, which writes attention as products; or in float16",
        _attention,
    ),
    Rule(
        "operand-type",
        "refused",
        "refused",
        "operands of one float type; DequantizeLinear has that of its scale",
        "write both scales of a product in one type, or Cast",
        _types,
    ),
)
