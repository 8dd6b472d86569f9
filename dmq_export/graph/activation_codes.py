"""How an integer kernel codes a part's activations: one constant scale and one constant zero point for all steps.

The portable graph has a scale per channel and a table row per step; a kernel has neither. With ``s = s_t`` where it is
the same at all steps, and the next power of two to ``max_t s_t`` where it is not (its multiples are exact in any float
type)::

    v    = clip(x * (2^k_c / tau_c) * (s / s_t) + shift_t * s)       at most two Mul, then an Add or a Clip
    code = round(v / s) + zero_point                                 QuantizeLinear, constant
    y    = s_t / s * (op(s * (code - zero_point), w) - s * shift_t * sum(w))

``code = q_x - offset_t`` exactly, whatever the target. A shifted part's zero is not the kernel's zero, so its zero
padding is written out before the shift.
"""

from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from dmq_export.graph.float16 import held
from dmq_export.layer import Float, QuantizedLayer
from dmq_export.target import FloatType, Target

Codes = NDArray[np.int32]
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class ActivationCodes:
    """One part's coding; rows are steps, one where nothing varies.

    Attributes:
        container: what the codes are stored in.
        scale: ``s``.
        zero_point: of QuantizeLinear and DequantizeLinear.
        factor: ``2^k / tau``, ``[C_p]``, or ``[1]`` where the channels agree.
        ratio: ``s / s_t``, ``[T]``.
        shift: added to the rounded value, in steps, ``[T]``.
        offset: ``q_x - code``, ``[T]``.
        bounds: smallest and largest ``code - zero_point`` by step, ``[T, 2]``, where the container holds more.
        gain: ``s_t / s``, ``[T]``.
    """

    container: type[np.int8] | type[np.uint8]
    scale: np.float32
    zero_point: int
    factor: Float
    ratio: Float
    shift: Codes
    offset: Codes
    bounds: Codes | None
    gain: Float


def part_activation_codes(
    layer: QuantizedLayer, part: int, target: Target, dtype: FloatType = "float32"
) -> ActivationCodes:
    """The coding of ``layer``'s ``part`` for TensorRT (int8, zero point 0) or OpenVINO (uint8, any zero point).

    Every float is as a graph of ``dtype`` holds it.
    """
    bits = layer.spec.bits.activation
    zero_point = layer.zero_point[:, part].astype(np.int32)
    signed = target == "tensorrt"
    lowest, constant = (-128, 0) if signed else (0, int(np.median(zero_point)))
    if bits == 8 or (not signed and (zero_point == constant).all()):
        offset = np.full_like(zero_point, 128 if signed else 0)
    else:
        constant = 0 if signed else 128
        offset = zero_point - constant
    shift = zero_point - offset - constant
    scales = collapsed(layer.scale[:, part].astype(np.float64))
    scale = scales[0] if len(scales) == 1 else np.exp2(np.ceil(np.log2(scales.max())))
    bounds = np.stack([-offset, 2**bits - 1 - offset], axis=1)
    whole = (bounds == [lowest, lowest + 255]).all()
    return ActivationCodes(
        container=np.int8 if target == "tensorrt" else np.uint8,
        scale=np.float32(held(scale, dtype)),
        zero_point=constant,
        factor=held(_factor(layer, part), dtype),
        ratio=held(scale / scales, dtype),
        shift=collapsed(shift),
        offset=collapsed(offset),
        bounds=None if whole else collapsed(bounds - constant),
        gain=held(scales / scale, dtype),
    )


def _factor(layer: QuantizedLayer, part: int) -> NDArray[np.float64]:
    channels = layer.spec.part_slices()[part]
    inverse = np.ldexp(1 / layer.tau[channels].astype(np.float64), layer.shift[channels].astype(np.int32))
    return collapsed(inverse)


def collapsed(rows: NDArray[Number]) -> NDArray[Number]:
    """One row where all are the same."""
    return rows[:1] if (rows == rows[0]).all() else rows
