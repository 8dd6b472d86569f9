"""From latents to pictures, with the decoder of a diffusers pipeline."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.model.load import reason
from dmq_export.common.files import read_json
from dmq_export.denoiser.config import FLUX_PATCH
from dmq_export.errors import DmqError, ModelError

CPU = torch.device("cpu")
DECODER_FOLDERS = ("vae", "vqvae")


def decoder_folder(pipeline: Path) -> Path | None:
    """Where the decoder of the pipeline in that folder lies; None for one that draws pixels."""
    found = (pipeline / name for name in DECODER_FOLDERS)
    return next((folder for folder in found if (folder / "config.json").is_file()), None)


def decode(
    folder: Path,
    latents: NDArray[np.float32],
    *,
    device: torch.device = CPU,
    advance: Callable[[int], None] = lambda _: None,
) -> NDArray[np.float32]:
    """Pictures ``[N, 3, H, W]`` in -1..1 of ``latents``, ``[N, C, h, w]`` or Flux's packed ``[N, tokens, 4 C]``.

    One at a time, for a decoder needs more memory than the network.

    Args:
        folder: of the decoder, see :func:`decoder_folder`.
        advance: called with 1 after each picture, for progress.

    Raises:
        ModelError: the decoder does not load.
    """
    decoder = _decoder(folder).to(device).eval().requires_grad_(False)
    pictures = []
    with torch.no_grad():
        for row in torch.from_numpy(latents):
            pictures.append(decoder.decode(unscaled(unpacked(row[None]), decoder.config).to(device)).sample.cpu())
            advance(1)
    drawn: NDArray[np.float32] = torch.cat(pictures).float().clamp(-1, 1).numpy()
    return drawn


def unpacked(latents: Tensor) -> Tensor:
    """Flux's square of tokens ``[N, tokens, 4 C]`` as latents ``[N, C, h, w]``; others as they are."""
    if latents.dim() == 4:
        return latents
    count, tokens, width = latents.shape
    side, channels = math.isqrt(tokens), width // FLUX_PATCH**2
    squares = latents.view(count, side, side, channels, FLUX_PATCH, FLUX_PATCH).permute(0, 3, 1, 4, 2, 5)
    return squares.reshape(count, channels, side * FLUX_PATCH, side * FLUX_PATCH)


def unscaled(latents: Tensor, config: Any) -> Tensor:
    """Latents as the decoder was trained on them: ``latents * std / scaling_factor + mean + shift_factor``."""
    latents = latents / config.get("scaling_factor", 1.0)
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        mean, std = (torch.tensor(config[key]).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std"))
        latents = latents * std + mean
    return latents + (config.get("shift_factor") or 0.0)


def _decoder(folder: Path) -> Any:
    try:
        class_name = str(read_json(folder / "config.json").get("_class_name"))
    except DmqError as error:
        raise ModelError(str(error)) from error
    decoder_class: Any = getattr(diffusers, class_name, None)
    if not hasattr(decoder_class, "decode"):
        raise ModelError(f"{folder}/config.json names {class_name!r}, which is no decoder of diffusers")
    try:
        return decoder_class.from_pretrained(str(folder), local_files_only=True, low_cpu_mem_usage=False)
    except Exception as error:  # as calib.model.load: whatever diffusers raises
        raise ModelError(f"the decoder in {folder} does not load: {reason(error)}") from error
