"""Embeddings of prompts from tiny pipelines, compared with the pipelines' own ``encode_prompt``."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from models import FLUX, save_tiny_network
from pipelines import TEXT_LENGTH, TEXTUAL, save_tiny_pipeline

import calib.pipeline.text_encoder
from calib.pipeline.text_encoder import encode_prompts
from dmq_export.denoiser.embeddings import Embeddings
from dmq_export.errors import ModelError

CPU = torch.device("cpu")
PROMPTS = ["a red cat", "dog", "a dog"]
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
SAMPLE_SIZE = {"flux": 8}
NAMES = {
    "sd": ["encoder_hidden_states"],
    "sdxl": ["encoder_hidden_states", None, "added_cond_kwargs.text_embeds", None],
    "pixart": ["encoder_hidden_states", "encoder_attention_mask"],
    "sd3": ["encoder_hidden_states", None, "pooled_projections", None],
    "flux": ["encoder_hidden_states", "pooled_projections"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Filled with the kinds that are asked for."""
    return {kind: tmp_path_factory.mktemp(kind) / "pipeline" for kind in TEXTUAL}


def pipeline_folder(folders: dict[str, Path], kind: str) -> Path:
    return folders[kind] if folders[kind].exists() else save_tiny_pipeline(kind, folders[kind])


def encoded(folder: Path, kind: str, **options: Any) -> Embeddings:
    settings = {"guidance_scale": 3.0, "device": CPU, "sample_size": SAMPLE_SIZE.get(kind)} | options
    return encode_prompts(folder, PROMPTS, **settings)


def own_words(folder: Path, kind: str) -> tuple[list[Any], list[Any]]:
    """What the pipeline's ``encode_prompt`` says of the prompts, and of no prompt, in the order of :data:`NAMES`."""
    pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    if kind == "sd":
        given, without = pipeline.encode_prompt(PROMPTS, CPU, 1, True)
        return [given], [without]
    if kind == "sdxl":
        given, without, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, None, CPU, 1, True)
        return [given, None, pooled, None], [without, None, no_pooled, None]
    if kind == "pixart":
        given, mask, without, no_mask = pipeline.encode_prompt(PROMPTS)
        return [given, mask], [without, no_mask]
    if kind == "sd3":
        given, without, pooled, no_pooled = pipeline.encode_prompt(PROMPTS, None, None, CPU)
        return [given, None, pooled, None], [without, None, no_pooled, None]
    given, pooled, _ = pipeline.encode_prompt(PROMPTS, None, CPU)
    return [given, pooled], []


@needs_transformers
@pytest.mark.parametrize("kind", TEXTUAL)
def test_prompts_are_encoded_as_the_pipeline_encodes_them(folders: dict[str, Path], kind: str) -> None:
    folder = pipeline_folder(folders, kind)
    result = encoded(folder, kind)
    expected = own_words(folder, kind)
    for branch, words in zip((result.given, result.unconditional), expected, strict=True):
        for name, value in zip(NAMES[kind], words, strict=False):
            if name is not None:
                # the two runs may sum in another order; values are about 1
                np.testing.assert_allclose(branch[name], value.detach().numpy(), rtol=0, atol=1e-4)
    assert not np.allclose(result.given["encoder_hidden_states"][0], result.given["encoder_hidden_states"][1])
    if kind == "sdxl":  # pictures of 16 x 16, as long as they are wide, uncropped
        assert result.given["added_cond_kwargs.time_ids"].tolist() == [[16, 16, 0, 0, 16, 16]] * 3
    if kind == "flux":
        assert result.given["guidance"].tolist() == [3, 3, 3]
        assert result.unconditional == {}


@needs_transformers
def test_batches_of_prompts_make_the_same_embeddings(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline_folder(folders, "sd")
    whole = encoded(folder, "sd")
    monkeypatch.setattr(calib.pipeline.text_encoder, "BATCH", 2)
    done: list[int] = []
    parts = encoded(folder, "sd", advance=done.append)
    assert done == [2, 1]
    for name, value in whole.named().items():
        np.testing.assert_allclose(parts.named()[name], value, rtol=0, atol=1e-6)


@needs_transformers
def test_without_guidance_there_is_one_branch(folders: dict[str, Path]) -> None:
    folder = pipeline_folder(folders, "sd")
    alone = encoded(folder, "sd", guidance_scale=None)
    assert alone.unconditional == {}
    assert alone.given["encoder_hidden_states"].shape == (3, TEXT_LENGTH, 16)
    np.testing.assert_allclose(
        alone.given["encoder_hidden_states"], encoded(folder, "sd").given["encoder_hidden_states"], rtol=0, atol=1e-6
    )


@needs_transformers
def test_a_broken_encoder_is_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers import StableDiffusionPipeline

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("the reason\nand how it came to that")

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", fail)
    with pytest.raises(ModelError, match=r"^StableDiffusionPipeline cannot encode the prompts: the reason and how"):
        encoded(pipeline_folder(folders, "sd"), "sd")


@needs_transformers
def test_a_gpu_that_is_full_is_not_the_encoders_fault(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    def fail(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(StableDiffusionPipeline, "encode_prompt", fail)
    with pytest.raises(torch.OutOfMemoryError):  # which `reproducible` turns into a line
        encoded(pipeline_folder(folders, "sd"), "sd")


@needs_transformers
def test_guidance_for_a_pipeline_that_knows_none_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FLUX, "guidance_embeds", False)  # as FLUX.1-schnell
    folder = save_tiny_pipeline("flux", tmp_path / "schnell")
    with pytest.raises(ModelError, match="for 3 prompts: it knows no guidance, leave out --guidance-scale"):
        encoded(folder, "flux")
    assert encoded(folder, "flux", guidance_scale=None).given.keys() == {
        "encoder_hidden_states",
        "pooled_projections",
    }


def test_a_bare_denoiser_has_no_encoder(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is no pipeline: it has no model_index.json"):
        encoded(save_tiny_network("sd", tmp_path), "sd")


def test_a_pipeline_that_reads_no_prompts_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="DiTTransformer2DModel is told no text: leave out the prompts"):
        encoded(save_tiny_pipeline("dit", tmp_path / "dit"), "dit")
