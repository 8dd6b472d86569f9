"""``dmq-export sample``: pictures from an engine, and from the float model beside them."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from dmq_export import __version__
from dmq_export.checkpoint import MANIFEST
from dmq_export.commands.engine import Engine, Execution, float_engine, open_engine
from dmq_export.commands.pictures import Decode, picture_decoder
from dmq_export.commands.prompts import NO_TEXT, Prompting
from dmq_export.commands.sampler import (
    Conditioning,
    Samples,
    SampleSettings,
    conditioning_for,
    draw_batches,
    sampler_for,
)
from dmq_export.common.distributed import Rank
from dmq_export.common.files import require_file, sha256
from dmq_export.common.progress import Progress
from dmq_export.errors import DmqError
from dmq_export.sampling.deviations import deviations
from dmq_export.sampling.npz_shards import SampleShards

SHOWN = 100  # samples in a picture at most


@dataclass(frozen=True)
class Outputs:
    """Where samples go.

    Attributes:
        picture: a PNG of the first samples, or None.
        npz: raw samples and labels, or None.
        reference: the float model to draw beside, a diffusers folder or a bundled model's name; or None.
        pipeline: whose decoder makes pictures of latents, and whose text encoder reads prompts; or None.
    """

    picture: Path | None = None
    npz: Path | None = None
    reference: str | None = None
    pipeline: Path | None = None


@dataclass(frozen=True)
class Sampled:
    """What became of it.

    Attributes:
        written: files.
        psnr: of the samples against the float model's, in dB; None without a reference.
        waits_for: batches that other processes still draw before the ``.npz`` is written.
    """

    written: tuple[Path, ...]
    psnr: float | None = None
    waits_for: int = 0

    def text(self) -> str:
        """One line."""
        if self.waits_for:
            return f"done; other processes still draw {self.waits_for} batches, the last of them writes the file"
        files = "  ".join(map(str, self.written))
        return files if self.psnr is None else f"{files}  PSNR against float {self.psnr:.2f} dB"


def sample_engine(
    path: Path,
    settings: SampleSettings,
    outputs: Outputs,
    progress: Progress,
    execution: Execution,
    prompting: Prompting = NO_TEXT,
) -> Sampled:
    """Sample the engine at ``path``.

    Args:
        prompting: where the text comes from that the model is told.

    Raises:
        DmqError: bad input; nothing is written then.
        CheckFailedError: a sample is NaN or empty.
    """
    rank = Rank.of(os.environ)
    _require_outputs(outputs, rank)
    engine = open_engine(path, execution, progress.tell)
    settings = settings.sized(engine.metadata)
    decode_samples = None if outputs.picture is None else picture_decoder(engine.metadata, outputs.pipeline, progress)
    embeddings = prompting.encoded(
        outputs.pipeline,
        progress,
        guidance_scale=settings.guidance_scale,
        sample_size=engine.metadata.recipe.get("sample_size"),
    )
    conditioning = conditioning_for(engine.metadata, settings, embeddings)
    beside = None if outputs.reference is None else float_engine(outputs.reference, engine)
    shards = None
    if outputs.npz is not None:
        identity = _identity(path, engine, execution, settings, conditioning)
        shards = SampleShards(outputs.npz, identity, settings.batches())
    notes = list(_notes(engine, settings, outputs))
    for line in notes if rank.index == 0 else []:
        progress.tell(line)
    if shards is None:
        batches: Iterable[Samples] = list(_checked(engine, settings, conditioning, settings.batches(), progress))
    elif _complete(shards, rank, engine, settings, conditioning, progress):
        batches = shards.samples()
    else:
        return Sampled((), waits_for=len(shards.missing()))
    others = None if beside is None else draw_batches(beside, settings, conditioning, settings.batches(), progress)
    psnr = _show(engine.name, batches, others, outputs.picture, decode_samples)
    return Sampled(tuple(path for path in (outputs.picture, outputs.npz) if path is not None), psnr)


def _require_outputs(outputs: Outputs, rank: Rank) -> None:
    paths = [path for path in (outputs.picture, outputs.npz) if path is not None]
    if not paths:
        raise DmqError("there is nothing to write: give -o for a picture, or --npz for raw samples")
    if rank.count > 1 and (outputs.npz is None or outputs.picture or outputs.reference):
        raise DmqError(f"{rank.count} processes share the work of --npz alone: leave out -o and --reference")
    for path in paths:
        require_file(path)


def _notes(engine: Engine, settings: SampleSettings, outputs: Outputs) -> Iterator[str]:
    """What the user should know before it starts.

    Raises:
        DmqError: the scheduler does not suit the settings.
    """
    sampler = sampler_for(engine.metadata, settings)
    yield from deviations(
        engine.metadata,
        scheduler=sampler.name,
        timesteps=[float(t) for t in sampler.scheduler.timesteps],
        eta=sampler.eta,
        guidance_scale=settings.guidance_scale,
    )
    if outputs.picture is not None and settings.count > SHOWN:
        yield f"the picture shows the first {SHOWN} of {settings.count} samples"


def _checked(
    engine: Engine, settings: SampleSettings, conditioning: Conditioning, batches: list[range], progress: Progress
) -> Iterator[Samples]:
    """The samples of each batch, refused where nothing was drawn."""
    from dmq_export.sampling.images import require_drawn

    drawn = draw_batches(engine, settings, conditioning, batches, progress)
    for indices, samples in zip(batches, drawn, strict=True):
        require_drawn(samples, indices.start)
        yield samples


def _complete(
    shards: SampleShards,
    rank: Rank,
    engine: Engine,
    settings: SampleSettings,
    conditioning: Conditioning,
    progress: Progress,
) -> bool:
    """Draw this process's share of what is missing; whether the ``.npz`` is written then."""
    if shards.finished():
        shards.discard()
        progress.tell(f"{shards.target} holds these samples already")
        return True
    missing = set(shards.missing())
    share = [indices for indices in rank.share(shards.batches) if indices in missing]
    if len(missing) < len(shards.batches):
        progress.tell(f"{len(shards.batches) - len(missing)} of {len(shards.batches)} batches are drawn already")
    for indices, samples in zip(share, _checked(engine, settings, conditioning, share, progress), strict=True):
        shards.save(indices, samples)
    labels = conditioning.given.get("class_labels")
    return shards.merge({} if labels is None else {"labels": labels})


def _identity(
    path: Path, engine: Engine, execution: Execution, settings: SampleSettings, conditioning: Conditioning
) -> Mapping[str, Any]:
    """All that the samples' bytes depend on, but for the machine and its number of threads."""
    content = path / MANIFEST if path.is_dir() else path  # that file holds the hash of the tensors
    return {
        "version": __version__,
        "engine": sha256(content),
        "backend": engine.backend,
        "provider": execution.provider,
        "conditioning": conditioning.digest(),
        **{name: value for name, value in asdict(settings).items() if name != "labels"},
    }


def _show(
    name: str,
    batches: Iterable[Samples],
    others: Iterable[Samples] | None,
    picture: Path | None,
    decode_samples: Decode | None,
) -> float | None:
    """Write the picture, one batch in memory at a time; PSNR against ``others`` in dB, or None without."""
    from dmq_export.sampling.images import psnr, save_grid

    if picture is None and others is None:
        return None
    rows: dict[str, list[Samples]] = {"float": [], name: []} if others is not None else {name: []}
    decibels, count = 0.0, 0
    beside: Iterable[Samples | None] = repeat(None) if others is None else others
    for drawn, other in zip(batches, beside, strict=False):  # repeat has no end
        room = slice(0, max(0, SHOWN - count))
        rows[name].append(drawn[room])
        if other is not None:
            rows["float"].append(other[room])
            decibels += psnr(other, drawn) * len(drawn)
        count += len(drawn)
    if picture is not None and decode_samples is not None:
        save_grid({row: decode_samples(np.concatenate(shown)) for row, shown in rows.items()}, picture)
    return None if others is None else decibels / count
