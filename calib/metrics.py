"""How far a quantized output is from the float one, in decibels."""

import math
from collections.abc import Callable

from torch import Tensor

from calib.trajectories import Trajectories

CEILING = 120.0  # dB: float32 itself is no better


def decibels(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise ratio over all elements, at most :data:`CEILING`."""
    signal, noise = reference.square().sum().item(), (reference - other).square().sum().item()
    if noise <= signal * 10 ** (-CEILING / 10):
        return CEILING
    return 10 * math.log10(max(signal, 1e-30) / noise)


def prediction_sqnr(denoise: Callable[..., Tensor], held_out: Trajectories) -> list[float]:
    """SQNR of ``denoise`` against the recorded float predictions, in dB, one per step ``[T]``."""
    conditioning = held_out.conditioning
    return [
        decibels(expected, denoise(x, timestep, **conditioning))
        for timestep, x, expected in zip(held_out.timesteps, held_out.inputs, held_out.predictions, strict=True)
    ]
