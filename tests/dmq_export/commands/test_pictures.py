"""From samples to pictures: as they are, or through a decoder."""

from pathlib import Path

import numpy as np
import pytest
from pipelines import save_tiny_pipeline

from calib.pipeline.vae import decode
from dmq_export.commands.pictures import picture_decoder
from dmq_export.common.progress import Progress
from dmq_export.errors import DmqError
from dmq_export.metadata import ExportMetadata

QUIET = Progress(show=False)
RECIPE = {"steps": 2, "scales": "static"}
PIXELS = ExportMetadata("reference", "w4a8", {"in_channels": 3, "sample_size": 8}, {}, RECIPE, (1.0,))
LATENTS = ExportMetadata("reference", "w4a8", {"in_channels": 4, "sample_size": 8}, {}, RECIPE, (1.0,))


def test_pixels_are_pictures_already() -> None:
    samples = np.ones((2, 3, 8, 8), np.float32)
    assert picture_decoder(PIXELS, None, QUIET)(samples) is samples


def test_a_pipeline_without_a_decoder_draws_pixels(tmp_path: Path) -> None:
    folder = save_tiny_pipeline("ddpm", tmp_path)
    samples = np.ones((2, 3, 8, 8), np.float32)
    assert picture_decoder(PIXELS, folder, QUIET)(samples) is samples
    with pytest.raises(DmqError, match=r"4 channels are latents, not pictures: give the pipeline .* with --pipeline"):
        picture_decoder(LATENTS, folder, QUIET)


def test_latents_go_through_the_pipelines_decoder(tmp_path: Path) -> None:
    folder = save_tiny_pipeline("dit", tmp_path)
    samples = np.random.default_rng(0).standard_normal((2, 4, 8, 8)).astype(np.float32)
    progress = Progress(show=False)
    np.testing.assert_array_equal(picture_decoder(LATENTS, folder, progress)(samples), decode(folder / "vae", samples))
    assert "decoding" in progress.seconds


def test_latents_without_a_decoder_are_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(DmqError, match="latents, not pictures"):
        picture_decoder(LATENTS, None, QUIET)
    with pytest.raises(DmqError, match="none is not a folder: give a local diffusers pipeline's folder"):
        picture_decoder(LATENTS, tmp_path / "none", QUIET)
