"""How good a calibration is, on trajectories it has not seen."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from calib.metrics import decibels
from calib.model.fake_quantized import quantized
from calib.model.load import SourceModel
from calib.record.trajectories import Trajectories
from dmq_export.checkpoint import Probe
from dmq_export.layer import QuantizedLayer

PROBE_SAMPLES = 2
VARIANTS = {"weights": (True, False), "activations": (False, True), "both": (True, True)}


def sqnr_by_step(
    source: SourceModel, layers: Sequence[QuantizedLayer], held_out: Trajectories, variant: str, *, batch: int
) -> list[float]:
    """SQNR of the noise prediction in dB, one per step, with what ``variant`` names quantized.

    Args:
        variant: a key of :data:`VARIANTS`.
        batch: samples per evaluation.
    """
    weights, activations = VARIANTS[variant]
    device = next(source.network.parameters()).device
    with quantized(source.network, layers, held_out.timesteps, weights=weights, activations=activations) as reference:

        def denoise(x: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
            moved = {key: value.to(device) for key, value in conditioning.items()}
            return reference(x.to(device), timestep, **moved).cpu()

        return [round(value, 3) for value in prediction_sqnr(denoise, held_out, batch=batch)]


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


def probe_of(held_out: Trajectories) -> Probe:
    """A few held-out evaluations: first, middle and last step."""
    last = len(held_out.timesteps) - 1
    steps = sorted({0, last // 2, last})
    rows = slice(0, PROBE_SAMPLES)
    return Probe(
        timesteps=held_out.timesteps[steps].numpy(),
        sample=held_out.inputs[steps][:, rows].numpy(),
        conditioning={key: value[rows].numpy() for key, value in held_out.conditioning.items()},
        prediction=held_out.predictions[steps][:, rows].numpy(),
    )
