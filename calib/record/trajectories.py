"""The calibration set: what the float network sees on its way from noise to samples, in one pass.

The sampler runs once per sample and every step of it is recorded, so ``T`` evaluations a sample; restarting
it for each step, as the method's published code does, takes ``T (T + 1) / 2``.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calib.device import FLOAT_BYTES
from calib.model.load import SourceModel
from calib.model.network import predict
from calib.model.schedulers import build_scheduler, step_options
from calib.record.conditioning import Conditioning
from dmq_export.common.seeds import stream_seed
from dmq_export.sampling.loop import Evaluation, Guidance, sample
from dmq_export.sampling.noise import initial_noise

CONDITIONING = "conditioning/"


@dataclass(frozen=True)
class SamplerSettings:
    """How trajectories are drawn.

    Attributes:
        scheduler: a name of :data:`dmq_export.sampling.names.SCHEDULERS`, or None for the model's own.
        steps: of the scheduler.
        eta: DDIM's noise share; the paper's unconditional and class-conditional results used 1.
        guidance_scale: classifier-free guidance, or None for none.
    """

    scheduler: str | None = None
    steps: int = 20
    eta: float = 0.0
    guidance_scale: float | None = None


@dataclass(frozen=True)
class SetSize:
    """The size of a calibration set: rows (samples, twice as many with guidance) and distinct timesteps."""

    rows: int
    steps: int

    @property
    def evaluations(self) -> int:
        """How often the network is asked about a row."""
        return self.rows * self.steps


@dataclass(frozen=True)
class Trajectories:
    """Recorded evaluations of the float network, on the CPU.

    With guidance every sample has two rows in the ``N`` axis, of the conditional and the unconditional branch.

    Attributes:
        timesteps: the distinct timesteps in sampling order, ``[T]``. One that the scheduler visits twice
            (PNDM) has one row, of its last visit.
        inputs: what the network was given, ``[T, N, ...]``.
        predictions: what it answered, ``[T, N, ...]``.
        conditioning: by argument name, each ``[N, ...]``.
        samples: the final samples, ``[S, ...]``.
    """

    timesteps: Tensor
    inputs: Tensor
    predictions: Tensor
    conditioning: Mapping[str, Tensor]
    samples: Tensor

    @property
    def size(self) -> SetSize:
        """Rows and steps."""
        return SetSize(self.inputs.shape[1], self.inputs.shape[0])

    @property
    def branches(self) -> int:
        """Rows of a sample: 2 with guidance."""
        return self.inputs.shape[1] // len(self.samples)

    def first(self, rows: int) -> "Trajectories":
        """The first ``rows`` of the ``N`` axis, at all steps, without final samples: they may be parts of some."""
        return replace(
            self,
            samples=self.samples[:0],
            inputs=self.inputs[:, :rows],
            predictions=self.predictions[:, :rows],
            conditioning={name: value[:rows] for name, value in self.conditioning.items()},
        )

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name; :meth:`of_tensors` makes the trajectories of them again."""
        own = {name: getattr(self, name) for name in ("timesteps", "inputs", "predictions", "samples")}
        return own | {f"{CONDITIONING}{name}": value for name, value in self.conditioning.items()}

    @classmethod
    def of_tensors(cls, tensors: Mapping[str, Tensor]) -> "Trajectories":
        """The trajectories of their :meth:`tensors`."""
        own = {name: value for name, value in tensors.items() if not name.startswith(CONDITIONING)}
        conditioning = {name.removeprefix(CONDITIONING): value for name, value in tensors.items() if name not in own}
        return cls(**own, conditioning=conditioning)


StepContext = Callable[[int], AbstractContextManager[None]]
"""Enters a context for the evaluation of a row of the timesteps table."""


def set_size(source: SourceModel, settings: SamplerSettings, conditioning: Conditioning, samples: int) -> SetSize:
    """The size of so many trajectories, before they are recorded.

    Raises:
        DmqError: the scheduler cannot be built.
    """
    scheduler = build_scheduler(source.scheduler, settings.scheduler, settings.steps, source.config)
    return SetSize(samples * conditioning.branches, len(_last_visits(scheduler.timesteps)))


def record_trajectories(
    source: SourceModel,
    settings: SamplerSettings,
    conditioning: Conditioning,
    indices: range,
    *,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
    step_context: StepContext = lambda _: nullcontext(),
) -> Trajectories:
    """Sample the trajectories ``indices`` from noise, all at once; number ``i`` depends on ``seed`` and ``i`` alone.

    Args:
        conditioning: of all trajectories there are.
        advance: called with the number of evaluations done, for progress.
        step_context: is entered for every evaluation that is recorded.

    Raises:
        DmqError: the scheduler cannot be built, or does not take ``eta``.
    """
    device = next(source.network.parameters()).device
    scheduler = build_scheduler(source.scheduler, settings.scheduler, settings.steps, source.config)
    conditional, unconditional = (
        {key: value[indices.start : indices.stop].to(device) for key, value in branch.items()}
        for branch in (conditioning.conditional, conditioning.unconditional)
    )
    generators = [torch.Generator().manual_seed(stream_seed(seed, "steps", i)) for i in indices]
    scale = settings.guidance_scale
    recorder = _Recorder(_last_visits(scheduler.timesteps), advance)
    with torch.no_grad():
        samples = sample(
            _in_context(source, recorder, step_context),
            torch.from_numpy(initial_noise(source.sample_shape, indices, seed)).to(device),
            scheduler,
            conditional,
            guidance=Guidance(scale, unconditional, torch.cat) if unconditional and scale is not None else None,
            step_options=step_options(scheduler, eta=settings.eta, generators=generators),
            callback=recorder.note,
        )
    return recorder.trajectories(samples)


def _in_context(source: SourceModel, recorder: "_Recorder", step_context: StepContext) -> Callable[..., Tensor]:
    """The network; the visits that are recorded are made in their context."""
    visits = itertools.count()

    def denoise(x: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
        row = recorder.row(next(visits))
        with nullcontext() if row is None else step_context(row):
            return predict(source.network, x, timestep.to(x.device), conditioning)

    return denoise


def joined(batches: Sequence[Trajectories]) -> Trajectories:
    """One set of several recorded with the same settings."""
    first = batches[0]
    return Trajectories(
        timesteps=first.timesteps,
        inputs=torch.cat([batch.inputs for batch in batches], dim=1),
        predictions=torch.cat([batch.predictions for batch in batches], dim=1),
        conditioning={key: torch.cat([batch.conditioning[key] for batch in batches]) for key in first.conditioning},
        samples=torch.cat([batch.samples for batch in batches]),
    )


def _last_visits(timesteps: Iterable[Any]) -> dict[float, int]:
    """The distinct timesteps in the order of their last visits, and which visit each one's last is."""
    last = {float(timestep): visit for visit, timestep in enumerate(timesteps)}
    return dict(sorted(last.items(), key=lambda item: item[1]))


class _Recorder:
    """Keeps the last visit to each timestep, on the CPU."""

    def __init__(self, last_visits: Mapping[float, int], advance: Callable[[int], None]) -> None:
        self._timesteps = list(last_visits)
        self._rows = {visit: row for row, visit in enumerate(last_visits.values())}
        self._inputs: list[Tensor] = []
        self._predictions: list[Tensor] = []
        self._conditioning: dict[str, Tensor] = {}
        self._advance = advance

    def row(self, visit: int) -> int | None:
        """The row of the timesteps table that this visit fills, if it is the last one to its timestep."""
        return self._rows.get(visit)

    def note(self, evaluation: Evaluation) -> None:
        if self.row(evaluation.step) is not None:
            self._inputs.append(evaluation.sample.cpu())
            self._predictions.append(evaluation.prediction.cpu())
        self._conditioning = self._conditioning or {key: value.cpu() for key, value in evaluation.conditioning.items()}
        self._advance(len(evaluation.sample))

    def trajectories(self, samples: Tensor) -> Trajectories:
        return Trajectories(
            timesteps=torch.tensor(self._timesteps, dtype=torch.float32),
            inputs=torch.stack(self._inputs),
            predictions=torch.stack(self._predictions),
            conditioning=self._conditioning,
            samples=samples.cpu(),
        )


def trajectory_bytes(sample_shape: Sequence[int], size: SetSize) -> int:
    """Memory of recorded trajectories: their inputs and predictions."""
    return 2 * FLOAT_BYTES * size.evaluations * math.prod(sample_shape)
