"""From latents to pictures, compared with diffusers' decoders and packing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from hypothesis import given
from hypothesis import strategies as st
from pipelines import save_tiny_pipeline

from calib.pipeline.vae import decode, decoder_folder, unpacked, unscaled
from dmq_export.errors import ModelError


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_pipeline("dit", tmp_path_factory.mktemp("dit"))


def test_pictures_are_those_of_the_pipelines_own_decoder(dit: Path) -> None:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    folder = decoder_folder(dit)
    assert folder == dit / "vae"
    done: list[int] = []
    pictures = decode(folder, latents.numpy(), advance=done.append)
    vae = AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False).eval()
    with torch.no_grad():
        expected = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
    assert done == [1, 1, 1]
    assert pictures.shape == (3, 3, 16, 16)
    np.testing.assert_allclose(pictures, expected.numpy(), rtol=0, atol=1e-5)  # one at a time, or three together


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
def test_unpacking_undoes_how_flux_packs(count: int, channels: int, side: int) -> None:
    latents = torch.arange(count * channels * 4 * side * side, dtype=torch.float32).view(count, channels, 2 * side, -1)
    tokens = torch.stack(  # token by token: the 2x2 square at row i, column j
        [
            latents[:, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2].reshape(count, -1)
            for i in range(side)
            for j in range(side)
        ],
        dim=1,
    )
    torch.testing.assert_close(unpacked(tokens), latents, rtol=0, atol=0)
    assert unpacked(latents) is latents


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, [2.0, 4.0]),
        ({"scaling_factor": 0.5}, [4.0, 8.0]),
        ({"scaling_factor": 0.5, "shift_factor": 1.0}, [5.0, 9.0]),
        ({"scaling_factor": 0.5, "latents_mean": [1.0, 2.0], "latents_std": [3.0, 0.5]}, [13.0, 6.0]),
        ({"shift_factor": None, "latents_mean": None, "latents_std": None}, [2.0, 4.0]),
    ],
)
def test_latents_are_unscaled_as_the_decoder_was_trained(config: dict[str, Any], expected: list[float]) -> None:
    latents = torch.tensor([2.0, 4.0]).view(1, 2, 1, 1)
    assert unscaled(latents, config).flatten().tolist() == expected


def test_a_pipeline_of_pixels_has_no_decoder(tmp_path: Path) -> None:
    assert decoder_folder(save_tiny_pipeline("ddpm", tmp_path)) is None


def test_a_decoder_that_does_not_load_says_why(dit: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "DDIMScheduler"}')
    with pytest.raises(ModelError, match="'DDIMScheduler', which is no decoder of diffusers"):
        decode(tmp_path, np.zeros((1, 4, 8, 8), np.float32))
    (tmp_path / "config.json").write_bytes((dit / "vae" / "config.json").read_bytes())
    with pytest.raises(ModelError, match=r"the decoder in .* does not load: "):
        decode(tmp_path, np.zeros((1, 4, 8, 8), np.float32))
