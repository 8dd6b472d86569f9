"""Rules that one QuantizeLinear or DequantizeLinear keeps or breaks on its own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from dmq_export.lint.finding import Rule
from dmq_export.lint.view import QdqGraph, attribute, constant, element_type, is_constant, shape

Breaches = Iterator[tuple[ir.Node, str]]
CODES = frozenset({ir.DataType.INT8, ir.DataType.INT4, ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1})
SMALLEST_NORMAL = {ir.DataType.FLOAT: 2.0**-126, ir.DataType.FLOAT16: 2.0**-14, ir.DataType.BFLOAT16: 2.0**-126}
FLOATS = SMALLEST_NORMAL.keys()


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
        if each.type not in CODES:
            what = "codes of unknown type" if each.type == ir.DataType.UNDEFINED else f"{each.type.name} codes"
            yield each.node, what


def _runtime_scales(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if not is_constant(each.scale):
            yield each.node, "a scale that is computed at run time"


def _scale_values(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        kind = element_type(each.scale)
        if kind is not None and kind not in FLOATS:
            yield each.node, f"a {kind.name} scale"
        elif each.scales is not None:
            values = each.scales.astype(np.float64)
            if not values.size:
                yield each.node, "an empty scale"
            elif not (np.isfinite(values) & (values > 0)).all():
                yield each.node, f"a scale of {values[~(np.isfinite(values) & (values > 0))].flat[0]:g}"


def _scale_precision(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        kind = element_type(each.scale)
        if each.scales is not None and kind in SMALLEST_NORMAL:
            values, smallest = each.scales.astype(np.float64), SMALLEST_NORMAL[kind]
            if ((values > 0) & (values < smallest)).any():
                yield each.node, f"a {kind.name} scale below {smallest:.1e}, the smallest of full precision"


def _scale_types(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        data, scale = element_type(each.data), element_type(each.scale)
        if not each.dequantizes and data in FLOATS and scale in FLOATS and data != scale:
            yield each.node, f"a {scale.name} scale for {data.name} data"


def _declared_types(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        declared = ir.DataType(attribute(each.node, "output_dtype", 0))
        stated = declared != ir.DataType.UNDEFINED
        if each.dequantizes and stated and each.zero_point is not None:
            yield each.node, "output_dtype beside a zero point"
        elif each.dequantizes and stated and declared not in FLOATS:
            yield each.node, f"output_dtype {declared.name}"
        precision = ir.DataType(attribute(each.node, "precision", 0))
        if precision != ir.DataType.UNDEFINED and (each.dequantizes or precision not in FLOATS):
            yield each.node, f"precision {precision.name}"


def _scalars(graph: QdqGraph) -> Breaches:
    for each in graph.quantizers:
        if shape(each.data) == ():
            yield each.node, "a scalar"


RULES = (
    Rule(
        "zero-point",
        "error",
        "no zero point, or a constant 0 for each scale: TensorRT quantizes symmetrically",
        "onnx --target tensorrt folds zero points away; elsewhere quantize symmetrically",
        _zero_points,
    ),
    Rule(
        "quantized-type",
        "error",
        "INT8, INT4, FLOAT8E4M3FN or FLOAT4E2M1 codes; a QuantizeLinear that names no type makes UINT8",
        "onnx --target tensorrt writes INT8; elsewhere give an INT8 zero point of 0",
        _types,
    ),
    Rule(
        "scale-constant",
        "error",
        "scales that are initializers or constants",
        "onnx --target tensorrt moves per-step scales into Mul nodes; elsewhere use static scales",
        _runtime_scales,
    ),
    Rule(
        "scale-value",
        "error",
        "FLOAT, FLOAT16 or BFLOAT16 scales above 0",
        "leave the layer float (calibrate --float-layer NAME), or keep its scale in float32",
        _scale_values,
    ),
    Rule(
        "scale-precision",
        "warning",
        "scales of normal magnitude in their type: smaller ones lose digits, or flush to 0",
        "export with --dtype float32, or leave the layer float (calibrate --float-layer NAME)",
        _scale_precision,
    ),
    Rule(
        "scale-type",
        "error",
        "a scale of the data's type (before TensorRT 10.13; later ones also take FLOAT scales)",
        "write the scale in the graph's float type",
        _scale_types,
    ),
    Rule(
        "output-type",
        "error",
        "output_dtype only where there is no zero point, and a float type on DequantizeLinear; precision on "
        "QuantizeLinear, a float type",
        "drop the attribute, or the zero point",
        _declared_types,
    ),
    Rule("scalar-data", "error", "data of one dimension or more", "quantize before the tensor is reduced", _scalars),
)
