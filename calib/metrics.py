"""How far a quantized output is from the float one, in decibels."""

import math

from torch import Tensor

CEILING = 120.0  # dB: float32 itself is no better


def decibels(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise ratio over all elements, at most :data:`CEILING`."""
    signal, noise = reference.square().sum().item(), (reference - other).square().sum().item()
    if noise <= signal * 10 ** (-CEILING / 10):
        return CEILING
    return 10 * math.log10(max(signal, 1e-30) / noise)
