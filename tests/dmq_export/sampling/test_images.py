"""Pictures: pixel values, the grid's layout, and refusal of what is no picture."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dmq_export.errors import CheckFailedError, DmqError
from dmq_export.sampling.images import CAPTION, psnr, save_grid, to_pixels


def gradient(count: int = 1, channels: int = 1, size: int = 16) -> np.ndarray:
    """Samples that run from -1 to 1."""
    line = np.linspace(-1, 1, size * size, dtype=np.float32).reshape(1, 1, size, size)
    return np.broadcast_to(line, (count, channels, size, size)).copy()


def test_pixels_span_black_to_white_and_clip_outside() -> None:
    samples = gradient()
    samples[0, 0, 0, :2] = -5, 5
    pixels = to_pixels(samples)
    assert pixels.shape == (1, 16, 16, 3)
    assert pixels.dtype == np.uint8
    assert pixels[0, 0, 0].tolist() == [0, 0, 0]
    assert pixels[0, 0, 1].tolist() == [255, 255, 255]


def test_zero_is_the_middle_grey() -> None:
    samples = gradient()
    samples[0, 0, 3, 3] = 0
    assert to_pixels(samples)[0, 3, 3, 0] in (127, 128)


def test_colour_channels_keep_their_order() -> None:
    samples = gradient(channels=3)
    samples[0, :, 0, 0] = -1, 0.5, 1
    assert to_pixels(samples)[0, 0, 0].tolist() == [0, 191, 255]


def test_latents_are_no_pictures() -> None:
    with pytest.raises(DmqError, match=r"samples of 4 channels are latents.*--npz"):
        to_pixels(np.zeros((1, 4, 8, 8), np.float32))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_sample_that_is_not_finite_is_reported(value: float) -> None:
    samples = gradient(3)
    samples[1, 0, 2, 2] = value
    with pytest.raises(CheckFailedError, match="sample 1 holds NaN or infinity"):
        to_pixels(samples)


@pytest.mark.parametrize("value", [-1.0, 0.0, 3.0])
def test_a_sample_of_one_colour_is_reported(value: float) -> None:
    samples = gradient(3)
    samples[2] = value
    with pytest.raises(CheckFailedError, match="sample 2 is one colour"):
        to_pixels(samples)


def test_psnr_is_that_of_pictures_with_a_range_of_two() -> None:
    reference = np.zeros((2, 1, 4, 4), np.float32)
    other = reference.copy()
    other[0] += 0.1  # 10 log10(4 / 0.01) = 26.02
    other[1] += 0.01  # 46.02
    assert psnr(reference, other) == pytest.approx(36.02, abs=0.01)


def test_psnr_of_equal_pictures_is_finite() -> None:
    assert psnr(gradient(), gradient()) == pytest.approx(120)


def test_like_stands_under_like(tmp_path: Path) -> None:
    rows = {"float": gradient(3), "w4a8": gradient(3)[..., ::-1].copy()}
    save_grid(rows, tmp_path / "grid.png", columns=2)
    with Image.open(tmp_path / "grid.png") as picture:
        grid = np.asarray(picture)
    tile = 48  # 16 pixels enlarged three times
    assert grid.shape == (4 * tile + 4, CAPTION + 2 * tile, 3)  # two bands of two lines
    first = grid[0:tile, CAPTION : CAPTION + tile]
    below = grid[tile : 2 * tile, CAPTION : CAPTION + tile]
    np.testing.assert_array_equal(first, to_pixels(rows["float"])[0].repeat(3, 0).repeat(3, 1))
    np.testing.assert_array_equal(below, to_pixels(rows["w4a8"])[0].repeat(3, 0).repeat(3, 1))
    assert (grid[-tile:, CAPTION + tile :] == 255).all()  # the second band has one column only


def test_a_refused_grid_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(CheckFailedError):
        save_grid({"w4a8": np.zeros((1, 1, 8, 8), np.float32)}, tmp_path / "grid.png")
    assert list(tmp_path.iterdir()) == []
