"""``dmq-export sample``: pictures from an engine, and from the float model beside them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from dmq_export.bundled import model_folder
from dmq_export.checkpoint import FACTS as CHECKPOINT_FACTS
from dmq_export.checkpoint import load_checkpoint
from dmq_export.errors import DmqError
from dmq_export.files import atomic_file, require_file
from dmq_export.noise import initial_noise
from dmq_export.progress import Progress
from dmq_export.sampling import Guidance, sample
from dmq_export.schedulers import build_scheduler, step_options
from dmq_export.seeds import stream_seed
from dmq_export.signature import labels_for, sample_shape

if TYPE_CHECKING:
    from torch import Tensor

Backend = Literal["auto", "onnxruntime", "torch"]
Denoise = Callable[..., "Tensor"]
Samples = NDArray[np.float32]


@dataclass(frozen=True)
class SampleSettings:
    """What to sample; two engines given the same settings start from the same noise.

    Attributes:
        count: samples.
        steps: of the scheduler; None for as many as were calibrated.
        scheduler: its name; None for the one calibrated with.
        eta: DDIM's noise share.
        labels: cycled over the samples; empty for all the model knows.
        guidance_scale: classifier-free guidance, or None.
        null_label: the label that stands for no label.
        seed: of the noise.
        batch: samples per evaluation.
    """

    count: int = 20
    steps: int | None = None
    scheduler: str | None = None
    eta: float = 0.0
    labels: tuple[int, ...] = ()
    guidance_scale: float | None = None
    null_label: int | None = None
    seed: int = 0
    batch: int = 32

    def __post_init__(self) -> None:
        if self.count < 1 or self.batch < 1:
            raise DmqError(f"count {self.count} and batch {self.batch}: at least 1 is needed of each")
        if self.guidance_scale is not None and self.null_label is None:
            raise DmqError("guidance needs the label that stands for no label: give --null-label")


@dataclass(frozen=True)
class Engine:
    """A network that can be sampled, and what must be known of it.

    Attributes:
        name: for tables and captions.
        denoise: ``(sample [N, ...], timestep, **conditioning) -> prediction``, torch tensors.
        config: of the diffusers model.
        scheduler: configuration of the scheduler it was calibrated with.
        steps: that were calibrated.
    """

    name: str
    denoise: Denoise
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    steps: int


def open_engine(path: Path, backend: Backend = "auto") -> Engine:
    """An ``.onnx`` file on ONNX Runtime, or a checkpoint folder as the PyTorch reference.

    Raises:
        DmqError: ``path`` is neither, does not suit ``backend``, or does not load.
    """
    if path.is_dir() and (path / CHECKPOINT_FACTS).is_file():
        _require_backend(path, backend, "torch")
        return _torch_engine(path)
    if path.suffix == ".onnx" and path.is_file():
        _require_backend(path, backend, "onnxruntime")
        return _onnx_engine(path)
    raise DmqError(f"{path} is no engine: give an .onnx file or a DMQ checkpoint folder")


def float_engine(model: str, like: Engine) -> Engine:
    """The float model, to be sampled as ``like`` is.

    Raises:
        ModelError: it does not load, or is another model than the engine was made from.
    """
    import torch

    from calib.model import load_model, predict

    source = load_model(model_folder(model), torch.device("cpu"))
    if sample_shape(source.config) != sample_shape(like.config):
        raise DmqError(f"{model} makes samples of {source.sample_shape}, the engine of {sample_shape(like.config)}")

    def denoise(x: Tensor, timestep: Any, **conditioning: Tensor) -> Tensor:
        with torch.no_grad():
            return predict(source.network, x, torch.as_tensor(timestep), conditioning)

    return Engine("float", denoise, source.config, like.scheduler, like.steps)


def draw_samples(engine: Engine, settings: SampleSettings, progress: Progress) -> Samples:
    """Samples ``[count, C, H, W]``; number ``i`` depends on the seed and ``i``, not on the batch it is in.

    Raises:
        DmqError: the settings do not suit the model.
    """
    labels = labels_for(engine.config, settings.labels, settings.null_label, settings.count)
    steps = settings.steps or engine.steps
    starts = range(0, settings.count, settings.batch)
    with progress.stage(f"sampling {engine.name}", settings.count * steps, "step") as advance:
        batches = [
            _draw_batch(engine, settings, labels, range(start, min(start + settings.batch, settings.count)), advance)
            for start in starts
        ]
    return np.concatenate(batches)


def save_samples(samples: Samples, labels: list[int] | None, path: Path) -> None:
    """Raw samples (and labels) as ``.npz``.

    Raises:
        DmqError: the path cannot be written.
    """
    with atomic_file(path) as scratch, scratch.open("wb") as stream:
        if labels is None:
            np.savez(stream, samples=samples)
        else:
            np.savez(stream, samples=samples, labels=np.array(labels))


def sample_engine(
    engine_path: Path,
    output: Path | None,
    settings: SampleSettings,
    progress: Progress,
    *,
    backend: Backend = "auto",
    reference: str | None = None,
    npz: Path | None = None,
) -> float | None:
    """Sample ``engine_path`` into the picture ``output``, with the float model's samples above if asked.

    Args:
        output: None writes no picture.
        reference: the float model, a diffusers folder or a bundled model's name.
        npz: also write the raw samples there.

    Returns:
        PSNR against the float model's samples in dB, or None without ``reference``.

    Raises:
        DmqError: bad input; nothing is written then.
    """
    from engines.images import psnr, require_finite, require_pictures, save_grid

    outputs = [path for path in (output, npz) if path is not None]
    if not outputs:
        raise DmqError("there is nothing to write: give -o for a picture, or --npz for raw samples")
    for path in outputs:
        require_file(path)
    engine = open_engine(engine_path, backend)
    if output is not None:
        require_pictures(sample_shape(engine.config)[0])
    rows = {} if reference is None else {"float": draw_samples(float_engine(reference, engine), settings, progress)}
    rows[engine.name] = draw_samples(engine, settings, progress)
    require_finite(rows[engine.name])
    if output is not None:
        save_grid(rows, output)
    if npz is not None:
        labels = labels_for(engine.config, settings.labels, settings.null_label, settings.count)
        save_samples(rows[engine.name], labels, npz)
    return None if reference is None else psnr(rows["float"], rows[engine.name])


def _draw_batch(
    engine: Engine,
    settings: SampleSettings,
    labels: list[int] | None,
    indices: range,
    advance: Callable[[int], None],
) -> Samples:
    import torch

    scheduler = build_scheduler(engine.scheduler, settings.scheduler, settings.steps or engine.steps)
    given = {} if labels is None else {"class_labels": torch.tensor(labels[indices.start : indices.stop])}
    guidance = None
    if settings.guidance_scale is not None and settings.null_label is not None:
        without = {key: torch.full_like(value, settings.null_label) for key, value in given.items()}
        guidance = Guidance(settings.guidance_scale, without, torch.cat)
    generators = [torch.Generator().manual_seed(stream_seed(settings.seed, "steps", i)) for i in indices]
    drawn = sample(
        engine.denoise,
        torch.from_numpy(initial_noise(sample_shape(engine.config), indices, settings.seed)),
        scheduler,
        given,
        guidance=guidance,
        step_options=step_options(scheduler, eta=settings.eta, generators=generators),
        callback=lambda evaluation: advance(len(indices)),
    )
    samples: Samples = drawn.numpy()
    return samples


def _torch_engine(folder: Path) -> Engine:
    import torch

    from calib.reference import load_reference

    checkpoint = load_checkpoint(folder)
    return Engine(
        name=str(checkpoint.bits),
        denoise=load_reference(checkpoint, torch.device("cpu")),
        config=checkpoint.model.config,
        scheduler=checkpoint.model.scheduler,
        steps=int(checkpoint.recipe["steps"]),
    )


def _onnx_engine(path: Path) -> Engine:
    import torch

    from dmq_export.facts import FACTS
    from engines.ort import OnnxRuntimeDenoiser

    denoiser = OnnxRuntimeDenoiser(path)
    if FACTS not in denoiser.session.metadata:
        raise DmqError(f"{path} was not exported by dmq-export: it carries no {FACTS!r} metadata")
    facts = json.loads(denoiser.session.metadata[FACTS])

    def denoise(x: Tensor, timestep: Any, **conditioning: Tensor) -> Tensor:
        arrays = {name: value.numpy() for name, value in conditioning.items()}
        return torch.from_numpy(denoiser(x.numpy(), float(timestep), **arrays))

    return Engine(facts["bits"], denoise, facts["config"], facts["scheduler"], int(facts["recipe"]["steps"]))


def _require_backend(path: Path, backend: Backend, needed: Backend) -> None:
    if backend not in ("auto", needed):
        raise DmqError(f"{path} runs on {needed}, not on {backend}")
