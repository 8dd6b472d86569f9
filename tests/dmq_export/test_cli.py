"""The command line as a user meets it: results on stdout, one-line errors, exit statuses, nothing half-written."""

import json
import re
import shutil
from pathlib import Path

import click
import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from command_line import TINY, assert_refused, run
from models import save_tiny_conditional, save_tiny_transformer
from PIL import Image

from dmq_export.cli import main


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An empty folder to write to; a refused command must leave it empty."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.mark.parametrize("command", ["calibrate", "onnx", "sample", "quickstart"])
def test_every_command_has_help(command: str) -> None:
    result = run(command, "-h")
    assert result.exit_code == 0
    assert "Usage:" in result.stdout


def test_examples_in_the_help_are_lines_of_their_own() -> None:
    text = run("-h").stdout
    assert "\\b" not in text
    assert re.search(r"^ *dmq-export onnx ckpt -o model.onnx +export", text, re.M), text
    assert re.search(r"^ *torchrun --nproc-per-node 4 -m dmq_export calibrate", run("calibrate", "-h").stdout, re.M)


def test_no_summary_is_cut_off_in_a_terminal_of_80_columns() -> None:
    text = CliRunner().invoke(main, ["-h"], terminal_width=80).stdout
    for name, command in main.commands.items():
        assert re.search(rf"^  {name} +{re.escape(str(command.short_help))}$", text, re.M), name


@pytest.mark.parametrize("command", main.commands.values(), ids=main.commands)
def test_every_option_stands_in_the_help_once_and_says_what_it_does(command: click.Command) -> None:
    text = run(command.name, "-h").stdout
    for option in command.params:
        if isinstance(option, click.Option):
            assert len(re.findall(rf"^  (?:-\w, )?{option.opts[-1]}(?![\w-])", text, re.M)) == 1, option.opts
            assert (option.help or "").endswith((".", "]", "...")), option.opts


def test_the_options_of_calibrate_stand_in_groups() -> None:
    headings = re.findall(r"^(\w[\w ]+):$", run("calibrate", "-h").stdout, re.M)
    assert headings == ["What to calibrate on", "How to quantize", "How to run", "Options"]


def test_a_graph_for_tensorrt_is_float16_unless_told_otherwise(tiny_checkpoint_folder: Path, out: Path) -> None:
    command = ["onnx", tiny_checkpoint_folder, "-o", out / "m.onnx", "--no-verify", "--target"]
    for target, kind in (("tensorrt", onnx.TensorProto.FLOAT16), ("openvino", onnx.TensorProto.FLOAT)):
        assert run(*command, target).exit_code == 0
        assert onnx.load(out / "m.onnx").graph.input[0].type.tensor_type.elem_type == kind


def test_help_shows_the_defaults_of_each_preset() -> None:
    text = " ".join(run("calibrate", "-h").stdout.split())
    assert "[default: 64/256/256 with fast/balanced/paper]" in text
    assert "[default: w4a8]" in text


def test_an_export_for_openvino_says_on_stderr_where_openvino_did_not_execute_it(
    tiny_checkpoint_folder: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmq_export.commands.verify.find_spec", lambda name: None)
    result = run("onnx", tiny_checkpoint_folder, "-o", out / "m.onnx", "--target", "openvino")
    assert result.exit_code == 0, result.output
    assert result.stderr == "not executed by OpenVINO, which is not installed: pip install 'dmq-export[openvino]'\n"
    assert "OpenVINO" not in result.stdout


# the whole road


def test_calibrate_onnx_sample(tiny_model: Path, out: Path) -> None:
    calibrated = run("calibrate", tiny_model, "-o", out / "ckpt", "--bits", "w4a6", *TINY, "--labels", "0-1,2")
    assert calibrated.exit_code == 0, calibrated.output
    assert re.search(r"^conv_in +Conv2d? +72 +float +first layer$", calibrated.stdout, re.M | re.I), calibrated.stdout
    assert "split at" in calibrated.stdout
    exported = run("onnx", out / "ckpt", "-o", out / "model.onnx")
    assert exported.exit_code == 0, exported.output
    assert "all codes equal" in exported.stdout
    onnx.checker.check_model(out / "model.onnx", full_check=True)
    for engine in ("ckpt", "model.onnx"):
        sampled = run("sample", out / engine, "-o", out / "p.png", "--num", 4, "--npz", out / f"{engine}.npz")
        assert sampled.exit_code == 0, sampled.output
    drawn = [np.load(out / f"{engine}.npz")["samples"] for engine in ("ckpt", "model.onnx")]
    assert drawn[0].shape == (4, 1, 8, 8)
    # both run the same arithmetic from the same noise; they differ by what flips at rounding ties
    assert np.abs(drawn[0] - drawn[1]).mean() < 0.05 * drawn[0].std()


def test_a_transformer_on_latents_goes_the_same_road(out: Path) -> None:
    model = save_tiny_transformer(out / "dit")
    assert run("calibrate", model, "-o", out / "ckpt", *TINY).exit_code == 0
    assert "all codes equal" in run("onnx", out / "ckpt", "-o", out / "model.onnx").stdout
    assert_refused(run("sample", out / "model.onnx", "-o", out / "p.png"), "4 channels are latents, not pictures")
    assert run("sample", out / "model.onnx", "--npz", out / "s.npz", "--num", 2).exit_code == 0
    assert np.load(out / "s.npz")["samples"].shape == (2, 4, 8, 8)


def test_a_model_that_wants_text_is_refused(out: Path) -> None:
    model = save_tiny_conditional(out / "sd")
    assert_refused(
        run("calibrate", model, "-o", out / "ckpt", *TINY),
        r"UNet2DConditionModel is told what to draw by encoder_hidden_states \[S, L, 16\]: give --prompts FILE",
    )


def test_calibrate_reports_json(tiny_model: Path, out: Path) -> None:
    result = run("calibrate", tiny_model, "-o", out / "ckpt", *TINY, "--rounding", "nearest", "--json")
    report = json.loads(result.stdout)
    assert report["checkpoint"] == str(out / "ckpt")
    assert report["float"]["conv_in"] == "first layer"
    assert "mid_block.attentions.0.to_q" in report["quantized"]
    assert len(report["prediction_sqnr_db"]["both"]) == 3


def test_sample_draws_the_float_model_above(tiny_model: Path, tiny_onnx: Path, out: Path) -> None:
    result = run("sample", tiny_onnx, "-o", out / "grid.png", "--reference", tiny_model, "--num", 3, "--labels", 1)
    assert result.exit_code == 0, result.output
    assert re.search(r"PSNR against float \d+\.\d+ dB", result.stdout)
    with Image.open(out / "grid.png") as grid:
        assert grid.size[1] == 2 * 48  # two lines of pictures


def test_sample_depends_on_the_seed_alone(tiny_onnx: Path, out: Path) -> None:
    def draw(name: str, *options: object) -> np.ndarray:
        result = run("sample", tiny_onnx, "-o", out / "p.png", "--npz", out / name, *options)
        assert result.exit_code == 0, result.output
        return np.load(out / name)["samples"]

    first = draw("a.npz", "--num", 5, "--seed", 3)
    np.testing.assert_array_equal(draw("b.npz", "--num", 5, "--seed", 3), first)
    # the same samples whatever batch they are in; another batch size may sum in another order
    np.testing.assert_allclose(draw("c.npz", "--num", 5, "--seed", 3, "--batch", 2), first, atol=0.2)
    assert not np.allclose(draw("d.npz", "--num", 5, "--seed", 4), first, atol=0.2)


def test_sample_with_guidance_and_another_scheduler(tiny_onnx: Path, out: Path) -> None:
    guidance = ["--guidance-scale", 2, "--null-label", 2, "--labels", "0,1", "--scheduler", "euler", "--steps", 4]
    result = run("sample", tiny_onnx, "-o", out / "p.png", "--num", 2, *guidance)
    assert result.exit_code == 0, result.output


# mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "w9a9"], "9 weight bits are not supported: 3 to 8 are"),
        (["--bits", "int4"], "'int4' names no bit widths: write w4a8"),
        (["--preset", "quick"], "'quick' is not one of 'fast', 'balanced', 'paper'"),
        (["--rounding", "up"], "'up' is not one of"),
        (["--labels", "one"], "'one' is no list of labels: write 0,3,7 or 0-9"),
        (["--labels", "3"], "label 3 is unknown to the model: 0 to 2 are allowed"),
        (["--null-label", "7"], "label 7 is unknown to the model: 0 to 2 are allowed"),
        (["--guidance-scale", "2"], "give --null-label"),
        (["--float-layer", "nope*"], "'nope\\*' matches no layer"),
        (["--float-layer", "*"], "no layer is left to quantize"),
        (["--eta", "2"], "2.0 is not in the range 0<=x<=1"),
        (["--samples", "0"], "0 is not in the range x>=1"),
        (["--scheduler", "heun"], "'heun' is not one of 'ddim'"),
        (["--scheduler", "euler", "--eta", "1"], "EulerDiscreteScheduler takes none: use --scheduler ddim"),
        (["--steps", "101"], "does not take 101 steps"),
        (["--no-such-option"], "No such option"),
    ],
)
def test_calibrate_refuses_bad_settings(tiny_model: Path, out: Path, options: list[str], message: str) -> None:
    assert_refused(run("calibrate", tiny_model, "-o", out / "ckpt", *options), message)
    assert list(out.iterdir()) == []


def test_calibrate_refuses_what_is_no_model(out: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(run("calibrate", tmp_path / "missing", "-o", out / "ckpt"), "missing is not a folder: give a local")
    assert_refused(run("calibrate", empty, "-o", out / "ckpt"), "empty is not a diffusers model: it has no config.json")
    assert list(out.iterdir()) == []


def test_outputs_that_cannot_be_written_are_refused_at_once(
    tiny_model: Path, tiny_checkpoint_folder: Path, tiny_onnx: Path, out: Path
) -> None:
    """A file in place of a folder refuses everyone, root included."""
    (out / "file").touch()
    nowhere = out / "file" / "result"
    assert_refused(run("calibrate", tiny_model, "-o", nowhere), f"cannot write {nowhere}")
    assert_refused(run("onnx", tiny_checkpoint_folder, "-o", nowhere), f"cannot write {nowhere}")
    assert_refused(run("sample", tiny_onnx, "-o", nowhere), f"cannot write {nowhere}")
    assert_refused(run("sample", tiny_onnx, "-o", out / "p.png", "--npz", nowhere), f"cannot write {nowhere}")
    assert_refused(run("quickstart", "-o", nowhere), f"cannot create the folder {nowhere}")
    assert [path.name for path in out.iterdir()] == ["file"]


def test_calibrate_does_not_replace_a_folder_unasked(tiny_model: Path, out: Path) -> None:
    (out / "precious").touch()
    assert_refused(run("calibrate", tiny_model, "-o", out, *TINY), "exists and is not empty: .* --fresh")
    assert [path.name for path in out.iterdir()] == ["precious"]


def test_strict_refuses_layers_that_cannot_be_quantized(tiny_model: Path, out: Path) -> None:
    """The tiny model has none, so strict accepts it."""
    result = run("calibrate", tiny_model, "-o", out / "ckpt", *TINY, "--rounding", "nearest", "--strict")
    assert result.exit_code == 0, result.output


def test_onnx_refuses_a_damaged_checkpoint(tiny_checkpoint_folder: Path, out: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint_folder, damaged)
    content = bytearray((damaged / "dmq.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "dmq.safetensors").write_bytes(content)
    assert_refused(run("onnx", damaged, "-o", out / "model.onnx"), "damaged checkpoint: .*sha256")
    assert_refused(run("onnx", tmp_path, "-o", out / "model.onnx"), "is not a DMQ checkpoint: it has no dmq.json")
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--labels", "12"], "label 12 is unknown to the model: 0 to 2 are allowed"),
        (["--guidance-scale", "2"], "give --null-label"),
        (["--backend", "torch"], "runs on onnxruntime or openvino, not on torch"),
        (["--backend", "tpu"], "'tpu' is not one of"),
        (["--reference", "nowhere"], "nowhere is not a folder"),
        (["--scheduler", "euler", "--eta", "0.5"], "takes none: use --scheduler ddim"),
    ],
)
def test_sample_refuses_bad_settings(tiny_onnx: Path, out: Path, options: list[str], message: str) -> None:
    assert_refused(run("sample", tiny_onnx, "-o", out / "p.png", *options), message)
    assert list(out.iterdir()) == []


def test_sample_refuses_what_is_no_engine(tiny_onnx: Path, out: Path, tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(b"garbage")
    foreign = Path(__file__).parents[2] / "dmq_export/models/digits/classifier.onnx"
    assert_refused(
        run("sample", tmp_path / "none.onnx", "-o", out / "p.png"), "is no engine: give an .onnx file, a .plan, or"
    )
    assert_refused(run("sample", garbage, "-o", out / "p.png"), f"{garbage} is no ONNX file, or a damaged one")
    assert_refused(run("sample", tiny_onnx), "nothing to write: give -o for a picture, or --npz")
    assert_refused(run("sample", foreign, "-o", out / "p.png"), "was not exported by dmq-export")
    assert list(out.iterdir()) == []


def test_an_unknown_command_is_one_line() -> None:
    assert_refused(run("frobnicate"), "No such command 'frobnicate'")
