"""One denoising loop, for calibration trajectories and for every engine.

The loop knows neither torch nor a runtime: arrays only meet each other and the scheduler, so whatever the
scheduler computes with (torch tensors for diffusers' schedulers) is what ``denoise`` receives.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

Array = Any  # torch.Tensor or numpy.ndarray, whatever the scheduler works on
Denoise = Callable[..., Array]
"""``denoise(sample [N, ...], timestep, **conditioning) -> prediction [N, ...]``"""


class Scheduler(Protocol):
    """The part of a diffusers scheduler that the loop needs."""

    timesteps: Any
    init_noise_sigma: Any

    def scale_model_input(self, sample: Array, timestep: Any) -> Array: ...

    def step(self, model_output: Array, timestep: Any, sample: Array, **options: Any) -> Any: ...


@dataclass(frozen=True)
class Evaluation:
    """What the network saw and said at one step; with guidance both branches, conditional first."""

    step: int
    timestep: Any
    sample: Array
    conditioning: Mapping[str, Array]
    prediction: Array


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance: ``e_u + scale * (e_c - e_u)`` (Ho and Salimans 2022, equation 6)."""

    scale: float
    unconditional: Mapping[str, Array]
    concatenate: Callable[[list[Array]], Array]

    def doubled(self, conditioning: Mapping[str, Array]) -> dict[str, Array]:
        pairs = {name: [value, self.unconditional[name]] for name, value in conditioning.items()}
        return {name: self.concatenate(pair) for name, pair in pairs.items()}

    def combine(self, prediction: Array) -> Array:
        half = len(prediction) // 2
        conditional, unconditional = prediction[:half], prediction[half:]
        return unconditional + self.scale * (conditional - unconditional)


def sample(
    denoise: Denoise,
    noise: Array,
    scheduler: Scheduler,
    conditioning: Mapping[str, Array],
    *,
    guidance: Guidance | None = None,
    step_options: Mapping[str, Any] | None = None,
    callback: Callable[[Evaluation], None] | None = None,
) -> Array:
    """Denoise ``noise [N, ...]`` to samples ``[N, ...]`` along ``scheduler.timesteps``.

    Args:
        denoise: the network, see :data:`Denoise`; a prediction with twice the sample's channels
            (learned variance) is cut to its first half, as diffusers' pipelines do.
        noise: standard normal; scaled here by the scheduler's ``init_noise_sigma``.
        scheduler: with its timesteps already set.
        conditioning: what ``denoise`` takes besides, each ``[N, ...]``.
        guidance: doubles the batch at every step and combines the halves.
        step_options: passed to ``scheduler.step``.
        callback: sees every evaluation of the network before its result is used.
    """
    x = noise * scheduler.init_noise_sigma
    inputs = guidance.doubled(conditioning) if guidance else dict(conditioning)
    for index, t in enumerate(scheduler.timesteps):
        model_input = scheduler.scale_model_input(x, t)
        if guidance:
            model_input = guidance.concatenate([model_input, model_input])
        prediction = denoise(model_input, t, **inputs)
        if callback:
            callback(Evaluation(index, t, model_input, inputs, prediction))
        if guidance:
            prediction = guidance.combine(prediction)
        if prediction.shape[1] != x.shape[1]:  # slicing a tensor takes as long as a small step
            prediction = prediction[:, : x.shape[1]]
        x = scheduler.step(prediction, t, x, **(step_options or {})).prev_sample
    return x
