"""Prompts on the command line: read, and told to a model as the embeddings that its own pipeline makes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dmq_export.common.progress import Progress
from dmq_export.denoiser.embeddings import Embeddings, load_embeddings
from dmq_export.errors import DmqError


def read_prompts(path: Path) -> tuple[str, ...]:
    """One prompt per line; empty lines do not count.

    Raises:
        DmqError: the file cannot be read, is no UTF-8 text, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DmqError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DmqError(f"{path} is no UTF-8 text: {error}") from error
    prompts = tuple(line.strip() for line in lines if line.strip())
    if not prompts:
        raise DmqError(f"{path} holds no prompt: write one per line")
    return prompts


@dataclass(frozen=True)
class Prompting:
    """Where the text comes from: nowhere, or one of these.

    Attributes:
        prompts: themselves.
        file: of prompts, one per line.
        embeddings: an ``.npz`` file, see :func:`dmq_export.denoiser.embeddings.load_embeddings`.

    Raises:
        DmqError: more than one is given.
    """

    prompts: tuple[str, ...] = ()
    file: Path | None = None
    embeddings: Path | None = None

    def __post_init__(self) -> None:
        if sum(source is not None and source != () for source in (self.prompts, self.file, self.embeddings)) > 1:
            raise DmqError("--prompt, --prompts and --prompt-embeds each say what to draw: give one of them")

    def encoded(
        self,
        pipeline: Path | None,
        progress: Progress,
        *,
        guidance_scale: float | None,
        device: Any = "cpu",
        sample_size: int | None = None,
    ) -> Embeddings | None:
        """The embeddings, or None without any text.

        Args:
            pipeline: folder whose text encoder reads the prompts.
            guidance_scale, device, sample_size: as :func:`calib.pipeline.text_encoder.encode_prompts`.

        Raises:
            DmqError: a file is bad, there is no pipeline for prompts, or it cannot encode them.
        """
        if self.embeddings is not None:
            return load_embeddings(self.embeddings)
        prompts = self.prompts if self.file is None else read_prompts(self.file)
        if not prompts:
            return None
        if pipeline is None:
            raise DmqError("prompts need a text encoder: give the pipeline's folder with --pipeline")
        return _encode(pipeline, prompts, progress, guidance_scale, device, sample_size)


NO_TEXT = Prompting()


def _encode(
    pipeline: Path,
    prompts: Sequence[str],
    progress: Progress,
    guidance_scale: float | None,
    device: Any,
    sample_size: int | None,
) -> Embeddings:
    import torch

    from calib.pipeline.text_encoder import encode_prompts

    with progress.stage("prompts", len(prompts), "prompt") as advance:
        return encode_prompts(
            pipeline,
            prompts,
            guidance_scale=guidance_scale,
            device=torch.device(device),
            sample_size=sample_size,
            advance=advance,
        )
