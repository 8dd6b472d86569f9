"""Every setting of a calibration, with its default; the presets; no torch, so that ``--help`` is instant."""

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

from dmq_export.bits import Bits
from dmq_export.denoiser.embeddings import Embeddings
from dmq_export.errors import DmqError
from dmq_export.layer import Scheme

Rounding = Literal["nearest", "gptq", "adaround"]
Scales = Literal["per-step", "static"]
PtsLayers = Literal["skip", "all", "none"]
Preset = Literal["fast", "balanced", "paper"]
W4A8 = Bits(4, 8)


@dataclass(frozen=True)
class Recipe:
    """What a calibration does; recorded in the checkpoint.

    Attributes:
        bits: of weights and activations.
        samples: trajectories that are drawn to calibrate on.
        steps: of the scheduler, per trajectory.
        scheduler: its name, or None for the model's own.
        eta: DDIM's noise share.
        guidance_scale: classifier-free guidance, or None.
        labels: class labels, cycled over the samples; empty for none, or for all the model knows.
        null_label: the label that stands for "no label" in guidance.
        embeddings: of prompts, cycled over the samples, or None; recorded as their number and sha256. Those beyond
            ``samples`` are kept for the check.
        sample_size: height and width of the latents, for a model whose configuration states none (Flux).
        weight_grid: search the weight ranges by squared error instead of min-max.
        les_iterations: of learned equivalent scaling per layer; 0 leaves it out.
        les_learning_rate: of Adam, on the logarithm of the factors.
        les_batch: patches per iteration.
        les_joint: layers that share an input (queries, keys, values) share the scaling, so that it can be folded
            into what makes the input.
        les_rounding_gain: weigh the weights' share of the loss by what learned rounding gains (:mod:`calib.fit.les`).
        timestep_alpha: exponent of the adaptive timestep weight; 0 weighs all steps alike.
        clip: search the activation ranges by squared output error instead of min-max.
        pts_layers: which layers vote on power-of-two scaling.
        pts_kappa: share of the votes that an exponent must exceed.
        pts_samples: trajectories that vote, and as many more as make their batch whole, or all there are.
        rounding: of the weights.
        round_iterations: of AdaRound per block.
        round_samples: evaluations AdaRound fits a block on.
        scheme: of activations.
        scales: one activation range per step, or one for all.
        sensitive_share: of the weights, whose layers get 7 bits and their inputs 8, where fewer cost most.
        float_layers: name patterns of layers to leave float.
        check_samples: held-out trajectories that the result is measured on.
        seed: of everything random.
    """

    bits: Bits = W4A8
    samples: int = 256
    steps: int = 20
    scheduler: str | None = None
    eta: float = 0.0
    guidance_scale: float | None = None
    labels: tuple[int, ...] = ()
    null_label: int | None = None
    embeddings: Embeddings | None = None
    sample_size: int | None = None
    weight_grid: bool = True
    les_iterations: int = 100
    les_learning_rate: float = 1e-2
    les_batch: int = 64
    les_joint: bool = True
    les_rounding_gain: bool = True
    timestep_alpha: float = 0.0
    clip: bool = True
    pts_layers: PtsLayers = "skip"
    pts_kappa: float = 0.85
    pts_samples: int = 64
    rounding: Rounding = "gptq"
    round_iterations: int = 0
    round_samples: int = 1024
    scheme: Scheme = "asymmetric"
    scales: Scales = "per-step"
    sensitive_share: float = 0.0
    float_layers: tuple[str, ...] = ()
    check_samples: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("samples", "steps", "check_samples", "les_batch", "pts_samples"):
            if getattr(self, name) < 1:
                raise DmqError(f"{name} is {getattr(self, name)}: at least 1 is needed")
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise DmqError(f"{name} is {value}: a finite number is needed")
        if self.les_iterations < 0 or self.timestep_alpha < 0:
            raise DmqError("les_iterations and timestep_alpha must not be negative")
        for name in ("pts_kappa", "sensitive_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise DmqError(f"{name} is {getattr(self, name)}: a share between 0 and 1 is needed")
        for name, literal in (
            ("rounding", Rounding),
            ("scales", Scales),
            ("pts_layers", PtsLayers),
            ("scheme", Scheme),
        ):
            if getattr(self, name) not in get_args(literal):
                raise DmqError(f"{name} is {getattr(self, name)!r}: one of {', '.join(get_args(literal))} is needed")
        if self.rounding == "adaround" and self.round_iterations < 1:
            raise DmqError("adaround needs iterations: set --round-iters, 20000 in the paper")

    @property
    def shares_prompts(self) -> bool:
        """Whether the held-out trajectories draw the calibrated prompts, because there are no others."""
        return self.embeddings is not None and self.embeddings.count <= self.samples

    def held_out(self) -> "Recipe":
        """The recipe with the prompts that no calibration sample draws, where there are any."""
        if self.embeddings is None or self.shares_prompts:
            return self
        return replace(self, embeddings=self.embeddings.after(self.samples))

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON values; bit widths as ``w4a8``."""
        told = self.embeddings
        return {field.name: getattr(self, field.name) for field in fields(self)} | {
            "bits": str(self.bits),
            "labels": list(self.labels),
            "embeddings": None if told is None else {"count": told.count, "sha256": told.sha256},
            "float_layers": list(self.float_layers),
        }


PRESETS: dict[Preset, Recipe] = {
    "fast": Recipe(samples=64, les_iterations=50),
    "balanced": Recipe(),
    "paper": Recipe(
        eta=1.0,
        les_iterations=6000,
        les_learning_rate=1e-3,
        les_batch=256,
        les_joint=False,
        les_rounding_gain=False,
        timestep_alpha=20.0,
        pts_samples=256,
        rounding="adaround",
        round_iterations=20000,
        clip=False,
    ),
}


def recipe_from(preset: Preset, **changes: Any) -> Recipe:
    """The preset's recipe with ``changes``; a change of None keeps the preset's value.

    Raises:
        DmqError: a value is out of its range, or would have no effect.
    """
    recipe = replace(PRESETS[preset], **{name: value for name, value in changes.items() if value is not None})
    if changes.get("round_iterations") and recipe.rounding != "adaround":
        raise DmqError(f"--round-iters is of AdaRound, the rounding is {recipe.rounding}: add --rounding adaround")
    return recipe
