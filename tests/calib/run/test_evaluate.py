"""How good a calibration is said to be; the whole of it is in test_calibrate.py."""

import pytest
import torch

from calib.metrics import decibels
from calib.record.trajectories import Trajectories
from calib.run.evaluate import prediction_sqnr


def test_predictions_are_compared_step_by_step_with_their_own_timestep_and_conditioning() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, noise = (torch.randn(3, 2, 1, 4, 4, generator=generator) for _ in range(2))
    timesteps, offset = torch.tensor([9.0, 5.0, 1.0]), torch.tensor([2.0, 7.0]).view(2, 1, 1, 1)

    def exact(x: torch.Tensor, timestep: torch.Tensor, offset: torch.Tensor) -> torch.Tensor:
        return x * timestep + offset

    clean = torch.stack([exact(x, t, offset) for x, t in zip(inputs, timesteps, strict=True)])
    held_out = Trajectories(timesteps, inputs, clean + noise, {"offset": offset}, samples=inputs[-1])
    expected = [decibels(c + n, c) for c, n in zip(clean, noise, strict=True)]
    assert prediction_sqnr(exact, held_out) == pytest.approx(expected)
