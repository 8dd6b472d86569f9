"""Prompts on the command line, and the whole road of a pipeline with text."""

import re
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from models import random_embeddings, save_tiny_conditional
from PIL import Image
from pipelines import save_tiny_pipeline

from dmq_export.checkpoint import load_checkpoint
from dmq_export.cli import main
from dmq_export.commands.prompts import NO_TEXT, Prompting, read_prompts
from dmq_export.common.progress import Progress
from dmq_export.denoiser.arguments import Argument
from dmq_export.errors import DmqError

TINY = ["--samples", "2", "--steps", "2", "--les-iters", "2", "--rounding", "nearest"]
QUIET = Progress(show=False)
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
TEXT = Argument("encoder_hidden_states", (None, 16))


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.fullmatch(rf"Error: .*{message}.*\n", result.stderr), result.stderr


def test_a_file_holds_a_prompt_per_line(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat \n\n  un café\r\ndog", encoding="utf-8")
    assert read_prompts(path) == ("a red cat", "un café", "dog")


@pytest.mark.parametrize(
    ("content", "message"), [(b"\n \n", "holds no prompt: write one per line"), (b"\xff\xfe", "is no UTF-8 text")]
)
def test_a_file_without_prompts_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(DmqError, match=message):
        read_prompts(tmp_path / "prompts.txt")
    with pytest.raises(DmqError, match=r"cannot read .*none.txt: No such file"):
        read_prompts(tmp_path / "none.txt")


@pytest.mark.parametrize(
    "sources",
    [
        {"prompts": ("a",), "file": Path("f")},
        {"prompts": ("a",), "embeddings": Path("e")},
        {"file": Path("f"), "embeddings": Path("e")},
    ],
)
def test_what_to_draw_is_said_once(sources: dict[str, object]) -> None:
    with pytest.raises(DmqError, match="each say what to draw: give one of them"):
        Prompting(**sources)  # type: ignore[arg-type]


def test_prompts_need_a_pipeline_and_nothing_needs_none() -> None:
    assert NO_TEXT.encoded(None, QUIET, guidance_scale=None) is None
    with pytest.raises(DmqError, match="prompts need a text encoder: give the pipeline's folder with --pipeline"):
        Prompting(("a cat",)).encoded(None, QUIET, guidance_scale=None)


def test_embeddings_go_the_whole_road_without_a_text_encoder(tmp_path: Path) -> None:
    model = save_tiny_conditional(tmp_path / "sd")
    embeddings = random_embeddings([TEXT], 4, uncond=True)
    np.savez(tmp_path / "e.npz", **embeddings.named())
    told = ["--prompt-embeds", tmp_path / "e.npz", "--guidance-scale", "3"]
    result = run("calibrate", model, "-o", tmp_path / "ckpt", *TINY, *told, "--json")
    assert result.exit_code == 0, result.output
    # two samples draw the first two prompts; what is measured is measured on the others
    probe = load_checkpoint(tmp_path / "ckpt").probe.conditioning[TEXT.name]
    np.testing.assert_array_equal(probe, embeddings.given[TEXT.name][2:])
    assert "the check draws them again" not in result.stderr
    drawn = run("sample", tmp_path / "ckpt", "--npz", tmp_path / "s.npz", "--num", 3, *told, "--reference", model)
    assert drawn.exit_code == 0, drawn.output
    assert np.load(tmp_path / "s.npz")["samples"].shape == (3, 4, 8, 8)
    refused(run("sample", tmp_path / "ckpt", "--npz", tmp_path / "t.npz"), "give --prompts FILE")
    refused(run("sample", tmp_path / "ckpt", "--npz", tmp_path / "t.npz", "--prompt", "cat"), "give .* --pipeline")
    refused(run("calibrate", model, "-o", tmp_path / "c", *TINY, "--prompts", tmp_path / "e.npz"), "is no UTF-8 text")
    refused(
        run("calibrate", model, "-o", tmp_path / "c", *TINY, "--sample-size", 8), "states its sample size, 8: leave"
    )
    assert not (tmp_path / "c").exists()


@needs_transformers
def test_prompts_go_the_whole_road_to_pictures(tmp_path: Path) -> None:
    folder = save_tiny_pipeline("sd", tmp_path / "sd")
    (tmp_path / "prompts.txt").write_text("a red cat\ndog\n")
    told = ["--prompts", tmp_path / "prompts.txt", "--guidance-scale", "3"]
    result = run("calibrate", folder, "-o", tmp_path / "ckpt", *TINY, *told)
    assert result.exit_code == 0, result.output
    assert "no more prompts than the 2 samples: the check draws them again, from other noise" in result.stderr
    asked = ["--pipeline", folder, "--prompt", "a red cat", "--prompt", "dog", "--guidance-scale", "3", "--num", "2"]
    drawn = run("sample", tmp_path / "ckpt", "-o", tmp_path / "p.png", "--npz", tmp_path / "s.npz", *asked)
    assert drawn.exit_code == 0, drawn.output
    with Image.open(tmp_path / "p.png") as picture:
        assert min(picture.size) >= 16  # decoded: the latents are 8 x 8
    first = np.load(tmp_path / "s.npz")["samples"]
    asked[3] = "a dog"
    assert run("sample", tmp_path / "ckpt", "--npz", tmp_path / "t.npz", *asked).exit_code == 0
    other = np.load(tmp_path / "t.npz")["samples"]
    assert np.abs(first[0] - other[0]).max() > 1e-3  # another prompt, another picture from the same noise
    np.testing.assert_allclose(first[1], other[1], rtol=0, atol=1e-5)
