"""From sample arrays to pictures on disk."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from dmq_export.common.files import atomic_file
from dmq_export.errors import CheckFailedError, DmqError

TILE = 48  # smallest side of a picture in a grid, in pixels; smaller samples are enlarged
CAPTION = 56  # width of the column of names, in pixels
Samples = NDArray[np.float32]
Pixels = NDArray[np.uint8]


def require_pictures(channels: int) -> None:
    """Refuse samples that no picture can show.

    Raises:
        DmqError: they have neither one channel nor three.
    """
    if channels not in (1, 3):
        raise DmqError(
            f"samples of {channels} channels are latents, not pictures: give the pipeline that has their decoder with "
            "--pipeline, or save them with --npz, without -o"
        )


def require_drawn(samples: Samples, first: int = 0) -> None:
    """Refuse samples ``[N, C, H, W]`` in which nothing was drawn.

    Args:
        first: number of the first, for the message.

    Raises:
        CheckFailedError: naming the first sample that holds NaN or infinity, or is one colour (such as black) all over.
    """
    for number, one in enumerate(samples, first):
        if not np.isfinite(one).all():
            raise CheckFailedError(f"sample {number} holds NaN or infinity")
        seen = _quantized(one) if len(one) in (1, 3) else one  # latents have no colours
        if seen.max() == seen.min():
            raise CheckFailedError(f"sample {number} is one colour all over")


def to_pixels(samples: Samples) -> Pixels:
    """``[N, C, H, W]`` in -1..1 to ``[N, H, W, 3]`` in 0..255.

    Raises:
        DmqError: the samples are latents, not pictures of one or three channels.
        CheckFailedError: see :func:`require_drawn`.
    """
    require_pictures(samples.shape[1])
    require_drawn(samples)
    pixels = _quantized(samples)
    return np.broadcast_to(pixels.transpose(0, 2, 3, 1), (*pixels.shape[:1], *pixels.shape[2:], 3))


def _quantized(samples: Samples) -> Pixels:
    return np.rint((samples.clip(-1, 1) + 1) * 127.5).astype(np.uint8)


def psnr(reference: Samples, other: Samples) -> float:
    """Mean over pictures ``[N, ...]`` in -1..1 of the peak signal to noise ratio, in dB; at most 120."""
    axes = tuple(range(1, reference.ndim))
    error = np.square(reference.clip(-1, 1) - other.clip(-1, 1)).mean(axis=axes)
    return float(np.mean(10 * np.log10(4 / error.clip(min=4e-12))))


def save_grid(rows: Mapping[str, Samples], path: Path, *, columns: int = 10) -> None:
    """One picture: for every ``columns`` samples one line per entry of ``rows``, so that like stands under like.

    Args:
        rows: samples ``[N, C, H, W]`` by name, all with the same N.

    Raises:
        DmqError: see :func:`to_pixels`; the path cannot be written.
    """
    pixels = {name: to_pixels(samples) for name, samples in rows.items()}
    count, height, width, _ = next(iter(pixels.values())).shape
    columns = min(columns, count)
    zoom = max(1, -(-TILE // min(height, width)))
    tile_height, tile_width = height * zoom, width * zoom
    bands = -(-count // columns)
    size = (CAPTION + columns * tile_width, bands * len(pixels) * tile_height + 4 * (bands - 1))
    grid = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(grid)
    for band in range(bands):
        for line, (name, pictures) in enumerate(pixels.items()):
            top = band * (len(pixels) * tile_height + 4) + line * tile_height
            draw.text((4, top + tile_height // 2 - 6), name, fill="black")
            for column, picture in enumerate(pictures[band * columns : (band + 1) * columns]):
                tile = Image.fromarray(picture).resize((tile_width, tile_height), Image.Resampling.NEAREST)
                grid.paste(tile, (CAPTION + column * tile_width, top))
    with atomic_file(path) as scratch:
        grid.save(scratch, format="PNG")
