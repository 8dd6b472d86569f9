"""The rule for sums that a 16-bit graph cannot hold."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.lint.finding import Rule
from dmq_export.lint.products import Operand, Product, products
from dmq_export.lint.view import QdqGraph, Quantizer, constant, element_type, shape

Breaches = Iterator[tuple[ir.Node, str]]
LARGEST_HALF = 65504
SMALLEST_HALF = 2.0**-14  # of the normal numbers
RANGES = {ir.DataType.INT8: (-128, 127), ir.DataType.INT4: (-8, 7)}


def _half_sums(graph: QdqGraph) -> Breaches:
    """float16 matrix products with a weight scale per channel, whose integer sum can be larger than float16 holds."""
    for product in products(graph):
        data, weight = product.data, product.weight
        if data is None or weight is None or not _sums_in_half(product, data, weight):
            continue
        rank = len(shape(weight.quantizer.data) or (None,))
        sums = largest_sum(data.quantizer, weight.quantizer, graph.axis(weight.quantizer) % rank)
        if sums is not None and sums.max(initial=0) > LARGEST_HALF:
            over = int((sums > LARGEST_HALF).sum())
            where = f", {over} of {sums.size} channels above" if sums.size > 1 else ""
            yield product.node, f"sums of codes of up to {sums.max():.0f}{where}"


def _half_scales(graph: QdqGraph) -> Breaches:
    """The same products, where what follows the sum is too small for float16."""
    for product in products(graph):
        data, weight = product.data, product.weight
        if data is None or weight is None or not _sums_in_half(product, data, weight):
            continue
        scales = [each.quantizer.scales for each in (data, weight)]
        if scales[0] is None or scales[1] is None or scales[0].size != 1:
            continue
        factors = np.abs(float(scales[0].item()) * scales[1].astype(np.float64))
        small = int(((factors > 0) & (factors < SMALLEST_HALF)).sum())
        if small:
            yield product.node, f"products of scales down to {factors.min():.1e}, {small} of {factors.size} subnormal"


def _sums_in_half(product: Product, data: Operand, weight: Operand) -> bool:
    """Whether the product leaves its raw sums in Half: scales of one channel each follow as a multiplication."""
    scales = {element_type(each.quantizer.scale) for each in (data, weight)}
    return (
        not product.convolves
        and data.type == ir.DataType.INT8
        and weight.type in RANGES
        and weight.axis is not None
        and element_type(product.node.outputs[0]) in (ir.DataType.FLOAT16, None)
        and ir.DataType.FLOAT16 in scales
    )


def largest_sum(data: Quantizer, weight: Quantizer, axis: int) -> NDArray[np.float64] | None:
    """The largest magnitude of ``sum_k q_x[k] q_w[k, o]`` over all codes ``q_x`` that the data can have.

    Args:
        data, weight: the DequantizeLinear nodes.
        axis: of the weight's output channels ``o``.

    Returns:
        One value per output channel; one for all where the weight's codes are not in the file; None where not even
        their number is known.
    """
    low, high = _data_range(data)
    codes = _weight_codes(weight)
    if codes is None:
        sizes = shape(weight.data)
        if not sizes or None in sizes:
            return None
        inner = math.prod(size or 1 for place, size in enumerate(sizes) if place != axis)
        return np.array([float(inner * low * RANGES[weight.type][0])])
    others = tuple(place for place in range(codes.ndim) if place != axis)
    positive, negative = (np.maximum(part, 0).sum(axis=others, dtype=np.float64) for part in (codes, -codes))
    largest: NDArray[np.float64] = np.maximum(high * positive - low * negative, high * negative - low * positive)
    return largest


def _data_range(data: Quantizer) -> tuple[float, float]:
    """The smallest and the largest code, narrowed by a Clip in front of the QuantizeLinear."""
    low, high = RANGES[ir.DataType.INT8]
    codes = data.codes_of()
    clip = codes.data.producer() if codes is not None else None
    if codes is None or clip is None or clip.op_type != "Clip" or codes.scales is None or codes.scales.size != 1:
        return low, high
    bounds = [constant(value) for value in clip.inputs[1:3]]
    if len(bounds) != 2 or any(bound is None or bound.size != 1 for bound in bounds):
        return low, high
    scale = float(codes.scales.item())
    below, above = (round(float(bound.item()) / scale) for bound in bounds if bound is not None)
    return max(low, below), min(high, above)


def _weight_codes(weight: Quantizer) -> NDArray[np.int64] | None:
    """The codes as the file has them, or as the builder makes them of a float constant."""
    before = weight.codes_of()
    values = constant(weight.data if before is None else before.data)
    if values is None or before is None:
        return None if values is None else values.astype(np.int64)
    if before.scales is None:
        return None
    scales = before.scales.astype(np.float64)
    if scales.ndim == 1 and scales.size > 1:
        axis = (1 if before.axis is None else before.axis) % values.ndim
        scales = scales.reshape([-1 if place == axis else 1 for place in range(values.ndim)])
    return np.clip(np.rint(values / scales), *RANGES[ir.DataType.INT8]).astype(np.int64)


RULES = (
    Rule(
        "half-sum",
        "wrong",
        None,
        f"sums of codes up to {LARGEST_HALF}: a float16 MatMul or Gemm with a weight scale per channel keeps the raw "
        "sum in Half, and larger ones are infinite",
        "give the weight one scale and multiply by the channels' behind the product, or export with --dtype float32",
        _half_sums,
    ),
    Rule(
        "half-scale",
        "wrong",
        None,
        "a product of both scales of at least 6.1e-5: behind such a sum it is a Half constant, and loses digits below",
        "give the weight one scale and multiply by the channels' behind the product, or export with --dtype float32",
        _half_scales,
    ),
)
