"""diffusers' schedulers for NumPy arrays."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float32]


class Step(NamedTuple):
    """The less noisy sample."""

    prev_sample: Array


class NumpyScheduler:
    """A diffusers scheduler, timesteps set, that takes and gives NumPy arrays; memory is shared, not copied.

    Args:
        scheduler: of diffusers.
    """

    def __init__(self, scheduler: Any) -> None:
        self._scheduler = scheduler
        self.timesteps = scheduler.timesteps
        self.init_noise_sigma = float(scheduler.init_noise_sigma)

    def scale_model_input(self, sample: Array, timestep: Any) -> Array:
        """What the network is shown of ``sample``."""
        scaled: Array = self._scheduler.scale_model_input(torch.from_numpy(sample), timestep).numpy()
        return scaled

    def step(self, model_output: Array, timestep: Any, sample: Array, **options: Any) -> Step:
        """From ``sample [N, ...]`` at ``timestep`` to the one before it."""
        tensors = torch.from_numpy(model_output), timestep, torch.from_numpy(sample)
        return Step(self._scheduler.step(*tensors, **options).prev_sample.numpy())
