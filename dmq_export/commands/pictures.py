"""From samples to pictures: as they are, or through the decoder of the pipeline that they are latents of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dmq_export.common.progress import Progress
from dmq_export.denoiser.config import sample_shape
from dmq_export.errors import DmqError
from dmq_export.metadata import ExportMetadata

Samples = NDArray[np.float32]
Decode = Callable[[Samples], Samples]
"""``samples [N, ...] -> pictures [N, C, H, W]`` in -1..1"""


def picture_decoder(metadata: ExportMetadata, pipeline: Path | None, progress: Progress) -> Decode:
    """What makes pictures of the samples of a network; the decoder is loaded when there is something to decode.

    Args:
        metadata: of the network.
        pipeline: a diffusers pipeline's folder; None for a network that draws pixels.

    Raises:
        DmqError: the samples are no pictures, and there is no decoder.
    """
    from dmq_export.sampling.images import require_pictures

    if pipeline is None:
        require_pictures(sample_shape(metadata.config)[0])
        return lambda samples: samples
    from calib.pipeline.vae import decode, decoder_folder

    if not pipeline.is_dir():
        raise DmqError(f"{pipeline} is not a folder: give a local diffusers pipeline's folder with --pipeline")
    folder = decoder_folder(pipeline)
    if folder is None:
        require_pictures(sample_shape(metadata.config)[0])
        return lambda samples: samples

    def decode_samples(samples: Samples) -> Samples:
        with progress.stage("decoding", len(samples), "picture") as advance:
            return decode(folder, samples, advance=advance)

    return decode_samples
