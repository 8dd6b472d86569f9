"""The arithmetic of ``docs/arithmetic.md`` in NumPy alone: the oracle every implementation is compared with.

Written from the formulas, in float64 and int64, sharing no code with the package.
"""

from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def along(values: Array, rank: int, axis: int) -> Array:
    """``values [C]`` shaped to broadcast along ``axis`` of an array of ``rank``."""
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def quantize_input(layer: Any, x: Array, row: int = 0) -> Array:
    """``q_x = clip(round(x / (tau * s * 2^-k)) + z, 0, 2^na - 1)``, integers."""
    spec = layer.spec
    scale = np.repeat(layer.scale[row].astype(np.float64), spec.parts) * 2.0 ** -layer.shift.astype(int)
    zero_point = np.repeat(layer.zero_point[row].astype(np.int64), spec.parts)
    step = along(layer.tau.astype(np.float64) * scale, x.ndim, spec.channel_axis)
    codes = np.rint(x.astype(np.float64) / step) + along(zero_point, x.ndim, spec.channel_axis)
    return codes.clip(0, 2**spec.bits.activation - 1).astype(np.int64)


def dequantize_input(layer: Any, codes: Array, row: int = 0) -> Array:
    """``x^ = s * 2^-k * (q_x - z)``."""
    spec = layer.spec
    scale = np.repeat(layer.scale[row].astype(np.float64), spec.parts) * 2.0 ** -layer.shift.astype(int)
    zero_point = np.repeat(layer.zero_point[row].astype(np.int64), spec.parts)
    centred = codes - along(zero_point, codes.ndim, spec.channel_axis)
    return along(scale, codes.ndim, spec.channel_axis) * centred


def dequantize_weight(layer: Any) -> Array:
    """``w^ = s_w * (q_w - z_w)``; each part of the input channels has its own row of scales."""
    spec = layer.spec
    weight = np.empty(layer.codes.shape, np.float64)
    start = 0
    for part, size in enumerate(spec.parts):
        columns = slice(start, start + size) if len(spec.parts) > 1 else slice(None)
        start += size
        scale = along(layer.weight_scale[part].astype(np.float64), weight.ndim, 0)
        zero_point = along(layer.weight_zero_point[part].astype(np.int64), weight.ndim, 0)
        weight[:, columns] = scale * (layer.codes[:, columns].astype(np.int64) - zero_point)
    return weight


def operate(spec: Any, x: Array, weight: Array) -> Array:
    """The operator without bias, position by position; works on integers and on floats."""
    if spec.kind == "linear":
        return x @ weight.T
    padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in spec.padding)])
    sizes = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(padded.shape[2:], spec.kernel, spec.stride, spec.dilation, strict=True)
    ]
    out = np.zeros((len(x), spec.out_channels, *sizes), np.result_type(x, weight))
    inputs, outputs = x.shape[1] // spec.groups, spec.out_channels // spec.groups
    for group, position in product(range(spec.groups), np.ndindex(*sizes)):
        window = tuple(
            slice(p * s, p * s + d * (k - 1) + 1, d)
            for p, s, d, k in zip(position, spec.stride, spec.dilation, spec.kernel, strict=True)
        )
        patch = padded[(slice(None), slice(group * inputs, (group + 1) * inputs), *window)]
        rows = slice(group * outputs, (group + 1) * outputs)
        axes = list(range(1, patch.ndim))
        out[(slice(None), rows, *position)] = np.tensordot(patch, weight[rows], (axes, axes))
    return out


def add_bias(layer: Any, y: Array) -> Array:
    """``y + b``."""
    return y if layer.bias is None else y + along(layer.bias, y.ndim, layer.spec.channel_axis)


def layer_output(layer: Any, x: Array, row: int = 0) -> Array:
    """``y = op(x^, w^) + b`` in float64."""
    rounded = dequantize_input(layer, quantize_input(layer, x, row), row)
    return add_bias(layer, operate(layer.spec, rounded, dequantize_weight(layer)))


def integer_output(layer: Any, x: Array, row: int = 0) -> Array:
    """The same by one integer product per part: ``s * s_w * 2^-K * op(q_x - z, (q_w - z_w) << (K - k)) + b``."""
    spec = layer.spec
    codes = quantize_input(layer, x, row)
    largest = int(layer.shift.max())
    y: Any = 0
    start = 0
    for part, size in enumerate(spec.parts):
        channels = slice(start, start + size)
        start += size
        whole = len(spec.parts) == 1
        at = (slice(None), channels) if spec.channel_axis == 1 else (..., channels)
        centred = codes[at] - int(layer.zero_point[row, part])
        weight = layer.codes[:, slice(None) if whole else channels].astype(np.int64)
        weight = weight - along(layer.weight_zero_point[part].astype(np.int64), weight.ndim, 0)
        carrier = weight << shift_of_columns(spec, largest - layer.shift[channels].astype(np.int64), weight.ndim)
        scale = float(layer.scale[row, part]) * layer.weight_scale[part].astype(np.float64) * 2.0**-largest
        product_ = operate(spec, centred, carrier)
        y = y + along(scale, product_.ndim, spec.channel_axis) * product_
    return add_bias(layer, y)


def shift_of_columns(spec: Any, shift: Array, rank: int) -> Array:
    """Exponents ``[C]`` over the weight's columns; output ``o`` of a grouped convolution reads its own group."""
    if spec.groups == 1:
        return along(shift, rank, 1)
    rows = np.repeat(shift.reshape(spec.groups, -1), spec.out_channels // spec.groups, axis=0)
    return rows.reshape(*rows.shape, *[1] * (rank - 2))
