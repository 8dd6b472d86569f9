"""DDIM in NumPy: samples where neither PyTorch nor diffusers is installed.

Song et al. 2021, equations 12 and 16, in the float32 operations of diffusers' ``DDIMScheduler`` and in their order, so
that both give the same bits wherever PyTorch rounds the square root of a coefficient correctly. It does not everywhere:
the MKL library in its builds for x86 misses by one unit in the last place on some CPUs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import DmqError

Array = NDArray[np.float32]

CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
NOT_DONE = ("thresholding", "rescale_betas_zero_snr", "trained_betas")
LARGEST_COSINE_BETA = 0.999  # Nichol and Dhariwal 2021
ONE = np.float32(1)


@dataclass(frozen=True)
class DdimSettings:
    """The part of a diffusers scheduler configuration that DDIM reads, with its defaults."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    set_alpha_to_one: bool = True
    clip_sample: bool = True
    clip_sample_range: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DdimSettings:
        """Read a ``scheduler_config.json``; keys of other schedulers are left alone, as diffusers does.

        Raises:
            DmqError: it asks for something that :func:`unsupported` names.
        """
        reason = unsupported(config)
        if reason is not None:
            raise DmqError(f"DDIM without diffusers has no {reason}: install diffusers and torch, which have")
        known = {field.name for field in fields(cls)}
        return cls(**{name: value for name, value in config.items() if name in known})


def unsupported(config: Mapping[str, Any]) -> str | None:
    """What ``config`` asks for that this DDIM does not do, as ``name value``; None if it does all of it."""
    for name in NOT_DONE:
        value = config.get(name)
        if value is not None and value is not False:
            return name
    for name, choices in CHOICES.items():
        if config.get(name, choices[0]) not in choices:
            return f"{name} {config[name]}"
    return None


class DdimOutput(NamedTuple):
    """One step: the less noisy sample, and the sample that the prediction points to."""

    prev_sample: Array
    pred_original_sample: Array


class Ddim:
    """The sampler with its timesteps set; has what :func:`dmq_export.sampling.loop.sample` asks of a scheduler.

    Args:
        settings: of the schedule the network was trained with.
        steps: sampling steps.

    Raises:
        DmqError: the schedule has no such steps.
    """

    init_noise_sigma = 1.0

    def __init__(self, settings: DdimSettings, steps: int) -> None:
        trained = settings.num_train_timesteps
        if not 1 <= steps <= trained:
            raise DmqError(f"DDIM does not take {steps} steps: the model was trained with {trained}")
        self.settings = settings
        self.timesteps: list[int] = _timesteps(settings, steps).tolist()
        if self.timesteps[0] >= trained:
            raise DmqError(
                f"{steps} steps with offset {settings.steps_offset} start at timestep {self.timesteps[0]}: "
                f"the model was trained on 0 to {trained - 1}; take fewer steps"
            )
        self._stride = trained // steps
        self._alpha = alphas_cumprod(settings)
        self._final_alpha = ONE if settings.set_alpha_to_one else self._alpha[0]

    def scale_model_input(self, sample: Array, timestep: int) -> Array:
        """The sample as it is."""
        return sample

    def step(
        self,
        model_output: Array,
        timestep: int,
        sample: Array,
        eta: float = 0.0,
        generator: Sequence[np.random.Generator] = (),
    ) -> DdimOutput:
        """From ``sample [N, ...]`` at ``timestep`` to the one before it.

        Args:
            eta: share of DDPM's noise that is added.
            generator: one stream per sample; needed for ``eta`` above zero.
        """
        before = timestep - self._stride
        alpha = self._alpha[timestep]
        alpha_before = self._alpha[before] if before >= 0 else self._final_alpha
        original, noise = self._split(model_output, sample, alpha)
        if self.settings.clip_sample:
            limit = np.float32(self.settings.clip_sample_range)
            original = np.clip(original, -limit, limit)
        variance = ((ONE - alpha_before) / (ONE - alpha)) * (ONE - alpha / alpha_before)
        sigma = np.float32(eta) * np.sqrt(variance)
        # rounding may carry the difference below zero where all noise is fresh; diffusers' result is NaN then
        direction = np.sqrt(np.maximum(ONE - alpha_before - sigma * sigma, np.float32(0)))
        previous = np.sqrt(alpha_before) * original + direction * noise
        if eta > 0:
            fresh = [stream.standard_normal(sample.shape[1:], np.float32) for stream in generator]
            previous = previous + sigma * np.stack(fresh)
        return DdimOutput(previous, original)

    def _split(self, model_output: Array, sample: Array, alpha: np.float32) -> tuple[Array, Array]:
        """The original sample and the noise in it, whichever of the two the network predicts."""
        signal, noise = np.sqrt(alpha), np.sqrt(ONE - alpha)
        if self.settings.prediction_type == "epsilon":
            return (sample - noise * model_output) / signal, model_output
        if self.settings.prediction_type == "sample":
            return model_output, (sample - signal * model_output) / noise
        return signal * sample - noise * model_output, signal * model_output + noise * sample


def alphas_cumprod(settings: DdimSettings) -> Array:
    """``[num_train_timesteps]``: the share of signal left in the variance at every timestep.

    Raises:
        DmqError: the betas are not between 0 and 1.
    """
    betas = _betas(settings)
    if not (betas.min() > 0 and betas.max() < 1):
        raise DmqError(
            f"betas from {betas.min():g} to {betas.max():g} are no noise schedule: between 0 and 1 is allowed"
        )
    # PyTorch accumulates in double and rounds every element
    return np.cumprod((ONE - betas).astype(np.float64)).astype(np.float32)


def _betas(settings: DdimSettings) -> Array:
    start, end, count = settings.beta_start, settings.beta_end, settings.num_train_timesteps
    if settings.beta_schedule == "linear":
        return _linspace(start, end, count)
    if settings.beta_schedule == "scaled_linear":
        return np.square(_linspace(start**0.5, end**0.5, count))
    bars = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
    return np.array([min(1 - bars[i + 1] / bars[i], LARGEST_COSINE_BETA) for i in range(count)], np.float32)


def _linspace(start: float, end: float, count: int) -> Array:
    """``torch.linspace``: from both ends to the middle, each element one fused multiply-add.

    The double product of two singles is exact, so only the sum's rounding to single is left, as in the instruction.
    """
    first, last = np.float32(start), np.float32(end)
    step = np.float64((last - first) / np.float32(max(count - 1, 1)))
    index = np.arange(count)
    rising, falling = np.float64(first) + step * index, np.float64(last) - step * (count - 1 - index)
    values: Array = np.where(index < count // 2, rising, falling).astype(np.float32)
    return values


def _timesteps(settings: DdimSettings, steps: int) -> NDArray[np.int64]:
    trained = settings.num_train_timesteps
    if settings.timestep_spacing == "linspace":
        spaced = np.linspace(0, trained - 1, steps).round()[::-1]
    elif settings.timestep_spacing == "leading":
        spaced = np.arange(steps)[::-1] * (trained // steps) + settings.steps_offset
    else:
        spaced = np.round(np.arange(trained, 0, -(trained / steps))) - 1
    timesteps: NDArray[np.int64] = spaced.astype(np.int64)
    return timesteps
