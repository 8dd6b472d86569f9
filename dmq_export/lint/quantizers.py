"""Rules that one QuantizeLinear or DequantizeLinear keeps or breaks on its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from dmq_export.lint.finding import Rule
from dmq_export.lint.view import TRANSPARENT, QdqGraph, Quantizer, attribute, constant, element_type, is_constant, shape

Breaches = Iterator[tuple[ir.Node | None, str]]
DataType = ir.DataType
CODES = frozenset({DataType.INT8, DataType.INT4, DataType.FLOAT8E4M3FN, DataType.FLOAT4E2M1})
SMALLEST_NORMAL = {DataType.FLOAT: 2.0**-126, DataType.FLOAT16: 2.0**-14, DataType.BFLOAT16: 2.0**-126}
FLOATS = SMALLEST_NORMAL.keys()
SCALES = frozenset({*FLOATS, DataType.DOUBLE})  # DOUBLE becomes FLOAT


def _zero_points(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if each.zero_point is None:
            continue
        zero = constant(each.zero_point)
        if zero is None:
            if not is_constant(each.zero_point):
                yield each.node, "a zero point that is computed at run time"
        elif zero.astype(np.float32).any():
            yield each.node, "a zero point other than 0"
        elif each.scales is not None and zero.size != each.scales.size:
            yield each.node, f"{zero.size} zero points for {each.scales.size} scales"


def _types(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if each.type not in CODES and not _becomes_int8(each) and not _is_bias(each):
            yield each.node, _codes_in_words(each)


def _unsigned(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if _becomes_int8(each):
            yield each.node, "UINT8 codes"


def _becomes_int8(each: Quantizer) -> bool:
    """Whether the parser makes INT8 of these UINT8 codes: those of a QuantizeLinear, and of its DequantizeLinear."""
    if each.dequantizes:
        return each.type == DataType.UINT8 and each.codes_of() is not None
    stated = attribute(each.node, "output_dtype", 0) if each.zero_point is None else 0
    return each.type == DataType.UINT8 and not stated


def _biases(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if _is_bias(each):
            yield each.node, "INT32 codes"


def _is_bias(each: Quantizer) -> bool:
    return each.dequantizes and each.type == DataType.INT32


def _codes_in_words(each: Quantizer) -> str:
    return "codes of unknown type" if each.type == DataType.UNDEFINED else f"{each.type.name} codes"


def _runtime_scales(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if not is_constant(each.scale):
            yield each.node, "a scale that is computed at run time"


def _scale_values(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        kind = element_type(each.scale)
        if kind is not None and kind not in SCALES:
            yield each.node, f"a {kind.name} scale"
        elif each.scales is not None:
            values = each.scales.astype(np.float64)
            bad = values[~(values > 0)]  # not a number as well
            if each.dequantizes and each.type == DataType.INT4 and graph.target.runtime == "tensorrt-rtx":
                continue  # which takes any scale there, as ONNX Runtime's quantizer writes them
            if not values.size:
                yield each.node, "an empty scale"
            elif bad.size:
                yield each.node, f"a scale of {bad.flat[0]:g}"


def _scale_precision(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        kind = element_type(each.scale)
        if each.scales is not None and kind in SMALLEST_NORMAL:
            values, smallest = each.scales.astype(np.float64), SMALLEST_NORMAL[kind]
            if ((values > 0) & (values < smallest)).any():
                yield each.node, f"a {kind.name} scale below {smallest:.1e}, the smallest of full precision"
            elif np.isposinf(values).any():
                yield each.node, "an infinite scale"


def _scale_types(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        data, scale = element_type(each.data), element_type(each.scale)
        if not each.dequantizes and data in FLOATS and scale in FLOATS and data != scale:
            yield each.node, f"a {scale.name} scale for {data.name} data"


def _declared_types(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        declared = DataType(attribute(each.node, "output_dtype", 0))
        if each.dequantizes and declared != DataType.UNDEFINED and each.zero_point is not None:
            yield each.node, "output_dtype beside a zero point"
        precision = DataType(attribute(each.node, "precision", 0))
        if precision != DataType.UNDEFINED and (each.dequantizes or precision not in FLOATS):
            yield each.node, f"precision {precision.name}"


def _output_types(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        declared = DataType(attribute(each.node, "output_dtype", 0))
        if each.dequantizes and declared != DataType.UNDEFINED and declared not in SCALES:
            yield each.node, f"output_dtype {declared.name}"


def _scalars(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if shape(each.data) == ():
            yield each.node, "a scalar"


def _constant_codes(graph: QdqGraph) -> Breaches:
    """Constant codes may be read by DequantizeLinear and as zero points and bounds, and by nothing else."""
    for node in graph.nodes:
        for index, value in enumerate(node.inputs):
            kind = _constant_kind(value)
            if kind is None:
                continue
            if node.op_type == "DequantizeLinear" and index == 0 and shape(value) == ():
                yield node, f"a scalar {kind} constant"
            elif not _reads_codes(node, index):
                yield node, f"{kind} constants in a {node.op_type}"
    for value in graph.model.graph.outputs:
        if kind := _constant_kind(value):
            yield None, f"{kind} constants as the graph's output"


def _reads_codes(node: ir.Node, index: int) -> bool:
    """Whether ``node`` takes constant codes there: as codes, zero point or bound, through Cast and Identity too."""
    if node.op_type in TRANSPARENT:
        uses = node.outputs[0].uses()
        return bool(uses) and all(use.idx > 0 and _reads_codes(use.node, use.idx) for use in uses)
    return node.op_type in ("DequantizeLinear", "QuantizeLinear") or (node.op_type == "Clip" and index > 0)


def _constant_kind(value: ir.Value | None) -> str | None:
    """The type of the codes that ``value`` holds directly, without an operator; None where it holds none."""
    found = None if value is None else ir.convenience.get_const_tensor(value)
    return found.dtype.name if found is not None and found.dtype in CODES else None


RULES = (
    Rule(
        "zero-point",
        "refused",
        "refused",
        "no zero point, or a constant 0 for each scale: quantization is symmetric",
        "onnx --target tensorrt folds zero points away; elsewhere quantize symmetrically",
        _zero_points,
    ),
    Rule(
        "quantized-type",
        "refused",
        "refused",
        "INT8, INT4, FLOAT8E4M3FN or FLOAT4E2M1 codes",
        "onnx --target tensorrt writes INT8; elsewhere give an INT8 zero point of 0",
        _types,
    ),
    Rule(
        "uint8-codes",
        "wrong",
        "refused",
        "INT8 codes; the parser makes INT8 of UINT8, and codes above 127 have no place in it",
        "give QuantizeLinear and DequantizeLinear an INT8 zero point of 0",
        _unsigned,
        tried=False,  # that it is built was; what becomes of large codes needs a GPU
    ),
    Rule("quantized-bias", "refused", "refused", "a float bias", "leave the bias float (QuantizeBias)", _biases),
    Rule(
        "scale-constant",
        None,
        "refused",
        "scales that are initializers or constants (before TensorRT 10.13)",
        "onnx --target tensorrt moves per-step scales into Mul nodes; elsewhere use static scales",
        _runtime_scales,
        until=(10, 13),
    ),
    Rule(
        "scale-value",
        "refused",
        "refused",
        "FLOAT, FLOAT16 or BFLOAT16 scales above 0; any for INT4 codes in TensorRT-RTX",
        "leave the layer float (calibrate --float-layer NAME), or keep its scale in float32",
        _scale_values,
    ),
    Rule(
        "scale-precision",
        "wrong",
        "wrong",
        "scales of normal magnitude in their type: smaller ones lose digits, or flush to 0",
        "export with --dtype float32, or leave the layer float (calibrate --float-layer NAME)",
        _scale_precision,
        tried=False,
    ),
    Rule(
        "scale-type",
        None,
        "refused",
        "a scale of the data's type (before TensorRT 10.13; later ones also take FLOAT scales)",
        "write the scale in the graph's float type",
        _scale_types,
        until=(10, 13),
    ),
    Rule(
        "output-type",
        "refused",
        "refused",
        "a float type as output_dtype of DequantizeLinear",
        "drop the attribute",
        _output_types,
    ),
    Rule(
        "stated-type",
        None,
        "refused",
        "output_dtype of DequantizeLinear only where there is no zero point; precision on QuantizeLinear, a float type",
        "drop the attribute, or the zero point",
        _declared_types,
    ),
    Rule("scalar-data", None, "refused", "data of one dimension or more", "quantize before it is reduced", _scalars),
    Rule(
        "constant-codes",
        "refused",
        None,
        "8-bit and 4-bit constants of one dimension or more, directly in front of DequantizeLinear",
        "apply the operation to the constant beforehand, or behind DequantizeLinear",
        _constant_codes,
    ),
)
