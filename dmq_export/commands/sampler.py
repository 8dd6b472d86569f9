"""Draws samples from an engine.

DDIM is our own in NumPy, with or without diffusers installed, so that the samples are the same; all other schedulers,
and what ours lacks of DDIM, are diffusers'.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calib.model.schedulers import build_scheduler, step_options
from dmq_export.commands.engine import Engine
from dmq_export.common.progress import Progress
from dmq_export.common.seeds import stream_seed
from dmq_export.denoiser.conditioning import Request, conditioning_of
from dmq_export.denoiser.config import sample_shape
from dmq_export.denoiser.embeddings import Embeddings
from dmq_export.errors import DmqError
from dmq_export.metadata import ExportMetadata
from dmq_export.sampling.ddim import Ddim, DdimSettings, unsupported
from dmq_export.sampling.loop import Guidance, sample
from dmq_export.sampling.names import SCHEDULERS
from dmq_export.sampling.noise import initial_noise, noise_streams

BATCH = 32  # samples per evaluation, where neither the user nor the graph says
Samples = NDArray[np.float32]
Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class SampleSettings:
    """What to sample; two engines given the same settings start from the same noise.

    Attributes:
        count: samples.
        steps: of the scheduler; None for as many as were calibrated.
        scheduler: its name; None for the one calibrated with.
        eta: DDIM's noise share; None for the one calibrated with.
        labels: cycled over the samples; empty for all the model knows.
        guidance_scale: classifier-free guidance, or None.
        null_label: the label that stands for no label.
        seed: of the noise.
        batch: samples per evaluation; None for the size that the graph is made for, or else 32.
    """

    count: int = 20
    steps: int | None = None
    scheduler: str | None = None
    eta: float | None = None
    labels: tuple[int, ...] = ()
    guidance_scale: float | None = None
    null_label: int | None = None
    seed: int = 0
    batch: int | None = None

    def __post_init__(self) -> None:
        if self.count < 1 or (self.batch is not None and self.batch < 1):
            raise DmqError(f"count {self.count} and batch {self.batch}: at least 1 is needed of each")

    def sized(self, metadata: ExportMetadata) -> SampleSettings:
        """With the batch that the graph is made for, where none is asked for."""
        return replace(self, batch=self.batch or (BATCH if metadata.batch is None else metadata.batch.usual))

    def batches(self) -> list[range]:
        """The samples' indices, ``batch`` at a time."""
        size = self.batch or BATCH
        return [range(start, min(start + size, self.count)) for start in range(0, self.count, size)]


@dataclass(frozen=True)
class Conditioning:
    """What the network is told of each sample besides the noise, ``[count, ...]`` by input name.

    Attributes:
        given: for the samples.
        unconditional: the same for guidance's other branch; empty without guidance.
    """

    given: Arrays = field(default_factory=dict)
    unconditional: Arrays = field(default_factory=dict)

    def rows(self, indices: range) -> Conditioning:
        """Of the samples ``indices`` alone."""
        rows = slice(indices.start, indices.stop)
        parts = (self.given, self.unconditional)
        return Conditioning(*({name: value[rows] for name, value in part.items()} for part in parts))

    def digest(self) -> str:
        """Sha256 of names, types, shapes and values."""
        digest = hashlib.sha256()
        for part in (self.given, self.unconditional):
            for name, value in sorted(part.items()):
                digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
                digest.update(np.ascontiguousarray(value).tobytes())
            digest.update(b"/")
        return digest.hexdigest()


def conditioning_for(
    metadata: ExportMetadata, settings: SampleSettings, embeddings: Embeddings | None = None
) -> Conditioning:
    """What the network is told of all samples of ``settings``.

    Raises:
        DmqError: it is not said what to draw, or what is said does not suit the model.
    """
    request = _request(settings, embeddings)
    return Conditioning(
        *conditioning_of(str(metadata.config.get("_class_name")), metadata.config, request, settings.count)
    )


def _request(settings: SampleSettings, embeddings: Embeddings | None = None) -> Request:
    return Request(settings.labels, settings.null_label, embeddings, settings.guidance_scale)


def draw_samples(
    engine: Engine,
    settings: SampleSettings = SampleSettings(),
    progress: Progress | None = None,
    conditioning: Conditioning | None = None,
) -> Samples:
    """Samples ``[count, C, H, W]``; number ``i`` depends on the seed and ``i``, not on the batch it is in.

    Args:
        conditioning: of all samples; None for the labels of ``settings``.

    Raises:
        DmqError: the settings do not suit the model.
    """
    settings = settings.sized(engine.metadata)
    if conditioning is None:
        conditioning = conditioning_for(engine.metadata, settings)
    batches = draw_batches(engine, settings, conditioning, settings.batches(), progress or Progress())
    return np.concatenate(list(batches))


def draw_batches(
    engine: Engine, settings: SampleSettings, conditioning: Conditioning, batches: list[range], progress: Progress
) -> Iterator[Samples]:
    """The samples of each of ``batches``, one after the other.

    Raises:
        DmqError: the scheduler does not suit the settings.
    """
    sampler = sampler_for(engine.metadata, settings)
    total = sum(len(indices) for indices in batches) * (settings.steps or engine.metadata.steps)
    with progress.stage(f"sampling {engine.name}", total, "step") as advance:
        for indices in batches:
            yield _draw_batch(engine, sampler, settings, conditioning.rows(indices), indices, advance)


def _draw_batch(
    engine: Engine,
    sampler: Sampler,
    settings: SampleSettings,
    conditioning: Conditioning,
    indices: range,
    advance: Callable[[int], None],
) -> Samples:
    """Samples ``indices``, with their rows of the conditioning."""
    library, guidance = sampler.library, None
    if settings.guidance_scale is not None and conditioning.unconditional:
        guidance = Guidance(settings.guidance_scale, conditioning.unconditional, library.concatenate)
    drawn = sample(
        lambda x, t, **inputs: library.of_numpy(engine.denoise(library.to_numpy(x), float(t), **inputs)),
        library.of_numpy(initial_noise(sample_shape(engine.metadata.config), indices, settings.seed)),
        deepcopy(sampler.scheduler),  # multistep solvers remember predictions
        conditioning.given,
        guidance=guidance,
        step_options=sampler.options(indices),
        callback=lambda evaluation: advance(len(indices)),
    )
    samples: Samples = library.to_numpy(drawn)
    return samples


@dataclass(frozen=True)
class Library:
    """What a scheduler computes with; samples and predictions are its arrays, the conditioning is NumPy's throughout.

    Attributes:
        of_numpy, to_numpy: between its arrays and NumPy's; memory is shared, not copied.
        concatenate: its arrays, or NumPy's.
    """

    of_numpy: Callable[[NDArray[Any]], Any]
    to_numpy: Callable[[Any], NDArray[Any]]
    concatenate: Callable[[list[Any]], Any]


NUMPY = Library(np.asarray, np.asarray, np.concatenate)


@dataclass(frozen=True)
class Sampler:
    """A scheduler with its timesteps set.

    Attributes:
        name: class name of diffusers' scheduler of this kind.
        eta: DDIM's noise share.
        scheduler: see :class:`dmq_export.sampling.loop.Scheduler`; at its start, so that each batch steps a copy.
            Building one of diffusers' takes as long as ten of its steps.
        options: of its ``step``, for the samples of a batch.
        library: that it computes with.
    """

    name: str
    eta: float
    scheduler: Any
    options: Callable[[range], Mapping[str, Any]]
    library: Library


def sampler_for(metadata: ExportMetadata, settings: SampleSettings) -> Sampler:
    """The sampler of all batches.

    Raises:
        DmqError: it cannot be built, does not take the settings, or needs diffusers, which is not installed.
    """
    steps = settings.steps or metadata.steps
    calibrated = str(metadata.scheduler.get("_class_name"))
    name = calibrated if settings.scheduler is None else SCHEDULERS.get(settings.scheduler, settings.scheduler)
    eta = settings.eta
    if eta is None:
        eta = float(metadata.recipe.get("eta") or 0) if name == calibrated else 0.0
    if name == SCHEDULERS["ddim"] and unsupported(metadata.scheduler) is None:
        ddim = Ddim(DdimSettings.from_config(metadata.scheduler), steps)
        return Sampler(name, eta, ddim, partial(_ddim_options, eta, settings.seed), NUMPY)
    scheduler = build_scheduler(metadata.scheduler, settings.scheduler, steps, metadata.config)
    taken = step_options(scheduler, eta=eta, generators=())
    return Sampler(name, eta, scheduler, partial(_options, taken, settings.seed), torch_library())


def _ddim_options(eta: float, seed: int, indices: range) -> Mapping[str, Any]:
    return {"eta": eta, "generator": noise_streams("steps", indices, seed) if eta else []}


def _options(taken: Mapping[str, Any], seed: int, indices: range) -> Mapping[str, Any]:
    """What diffusers' scheduler takes, with one generator for each sample where it takes any."""
    if "generator" not in taken:
        return taken
    import torch

    return {**taken, "generator": [torch.Generator().manual_seed(stream_seed(seed, "steps", i)) for i in indices]}


def torch_library() -> Library:
    """PyTorch's tensors, on the CPU."""
    import torch

    def concatenate(arrays: list[Any]) -> Any:
        return torch.cat(arrays) if isinstance(arrays[0], torch.Tensor) else np.concatenate(arrays)

    return Library(torch.from_numpy, torch.Tensor.numpy, concatenate)
