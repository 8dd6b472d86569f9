"""How an integer kernel codes a part's activations: one constant scale and one constant zero point for all steps.

The portable graph has a scale per channel and a table row per step; a kernel has neither. With ``s = max_t s_t``::

    v    = clip(x * (2^k_c / tau_c) * (s / s_t) + shift_t * s)       at most two Mul, then an Add or a Clip
    code = round(v / s) + zero_point                                 QuantizeLinear, constant
    y    = s_t / s * op(s * (code - zero_point), w) - s_t * shift_t * sum(w)

``code = q_x - offset_t`` exactly, whatever the target. A shifted part's zero is not the kernel's zero, so its zero
padding is written out before the shift.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmq_export.layer import Float, QuantizedLayer
from dmq_export.target import Target

Codes = NDArray[np.int32]


@dataclass(frozen=True)
class Encoding:
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
        step_scale: ``s_t``, ``[T]``.
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
    step_scale: Float


def part_encoding(layer: QuantizedLayer, part: int, target: Target) -> Encoding:
    """The coding of ``layer``'s ``part`` for TensorRT (int8, zero point 0) or OpenVINO (uint8, any zero point)."""
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
    scales = layer.scale[:, part].astype(np.float64)
    scale = np.float32(scales.max())
    bounds = np.stack([-offset, 2**bits - 1 - offset], axis=1)
    whole = (bounds == [lowest, lowest + 255]).all()
    return Encoding(
        container=np.int8 if target == "tensorrt" else np.uint8,
        scale=scale,
        zero_point=constant,
        factor=_factor(layer, part),
        ratio=_collapsed((scale / scales).astype(np.float32)),
        shift=_collapsed(shift),
        offset=_collapsed(offset),
        bounds=None if whole else _collapsed(bounds - constant),
        gain=_collapsed((scales / scale).astype(np.float32)),
        step_scale=_collapsed(layer.scale[:, part]),
    )


def _factor(layer: QuantizedLayer, part: int) -> Float:
    channels = layer.spec.part_slices()[part]
    inverse = np.ldexp(1 / layer.tau[channels].astype(np.float64), layer.shift[channels].astype(np.int32))
    return _collapsed(inverse.astype(np.float32))


def _collapsed(rows: NDArray[np.generic]) -> NDArray:  # type: ignore[type-arg]
    """One row where all are the same."""
    return rows[:1] if (rows == rows[0]).all() else rows
