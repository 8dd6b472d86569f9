"""How far a quantized output is from the float one, in decibels."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from calib.record.trajectories import Trajectories

CEILING = 120.0  # dB: float32 itself is no better


def decibels(reference: Tensor, other: Tensor) -> float:
    """Signal to quantization noise ratio over all elements, at most :data:`CEILING`."""
    signal, noise = reference.square().sum().item(), (reference - other).square().sum().item()
    if noise <= signal * 10 ** (-CEILING / 10):
        return CEILING
    return 10 * math.log10(max(signal, 1e-30) / noise)


def prediction_sqnr(denoise: Callable[..., Tensor], held_out: Trajectories, *, batch: int | None = None) -> list[float]:
    """SQNR of ``denoise`` against the recorded float predictions, in dB, one per step ``[T]``.

    Args:
        batch: samples per evaluation; None for all at once.
    """
    samples = held_out.inputs.shape[1]
    parts = [slice(start, start + (batch or samples)) for start in range(0, samples, batch or samples)]
    return [
        decibels(
            expected,
            torch.cat(
                [
                    denoise(x[rows], timestep, **{key: value[rows] for key, value in held_out.conditioning.items()})
                    for rows in parts
                ]
            ),
        )
        for timestep, x, expected in zip(held_out.timesteps, held_out.inputs, held_out.predictions, strict=True)
    ]
