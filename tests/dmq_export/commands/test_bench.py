"""``bench``: what is measured and how it is told; how long anything takes is not tested."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from models import TINY_RECIPE, random_embeddings, save_tiny_network

from calib.calibrate import calibrate
from calib.run.plan import Resources
from dmq_export.cli import main
from dmq_export.commands import bench
from dmq_export.commands.bench import BenchSettings, Latency, bench_engines
from dmq_export.commands.export import export_onnx
from dmq_export.common.bundled import BUNDLED
from dmq_export.common.progress import Progress
from dmq_export.denoiser.arguments import arguments
from dmq_export.errors import DmqError

QUIET = Progress(show=False)


def test_engines_of_one_model_stand_side_by_side(
    tiny_model: Path, tiny_onnx: Path, tiny_checkpoint_folder: Path
) -> None:
    engines = (f"onnxruntime-cpu:{tiny_onnx}", f"openvino:{tiny_onnx}", str(tiny_checkpoint_folder))
    settings = BenchSettings(batch=2, repeat=3, warm_up=1, threads=1)
    result = bench_engines(engines, settings, QUIET, reference=str(tiny_model))
    assert [one.engine for one in result.timings] == [f"float {tiny_model}", *engines]
    assert [one.backend for one in result.timings] == ["torch", "onnxruntime", "openvino", "torch"]
    assert result.timings[0].ratio == 1
    for one in result.timings:
        assert 0 < one.p50 <= one.p90 <= one.p99
        assert one.load_seconds > 0
        assert one.warm_up_seconds > 0


def test_the_figures_follow_from_the_durations(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    durations = [Latency((0.1, 0.2, 0.3)), Latency((0.05, 0.05, 0.05))]
    monkeypatch.setattr(
        bench, "measure_interleaved", lambda calls, repeat, advance: dict(zip(calls, durations, strict=True))
    )
    result = bench_engines([str(tiny_onnx)] * 2, BenchSettings(batch=4), QUIET)
    slow, fast = result.timings
    assert (slow.p50, slow.p90, slow.p99) == pytest.approx((200, 280, 298))
    assert slow.images_per_second == pytest.approx(4 / (0.2 * 3))  # three steps were calibrated
    assert (slow.ratio, fast.ratio) == pytest.approx((1, 4))


def test_timesteps_take_turns(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[float] = []
    monkeypatch.setattr(
        "engines.onnxruntime.OnnxRuntimeDenoiser.__call__", lambda self, sample, timestep, **rest: seen.append(timestep)
    )
    bench_engines([str(tiny_onnx)], BenchSettings(repeat=4, warm_up=1), QUIET)
    assert seen == [67, 67, 34, 1, 67]


def test_the_batch_is_that_of_the_graph(tiny_fixed_onnx: Path, tiny_onnx: Path, tiny_model: Path) -> None:
    settings = BenchSettings(repeat=1, warm_up=1, threads=1)
    result = bench_engines([str(tiny_fixed_onnx), str(tiny_onnx)], settings, QUIET, reference=str(tiny_model))
    assert result.settings.batch == 4
    assert result.notes == ()
    assert bench_engines([str(tiny_onnx)], settings, QUIET).settings.batch == 1


def test_a_padded_batch_is_said(tiny_fixed_onnx: Path, tiny_onnx: Path) -> None:
    result = bench_engines([str(tiny_onnx), str(tiny_fixed_onnx)], BenchSettings(repeat=1, warm_up=1, batch=5), QUIET)
    assert result.notes == (f"{tiny_fixed_onnx} takes 4 at a time: a batch of 5 is padded to 8",)
    assert result.text().endswith(result.notes[0])


@pytest.fixture(scope="module")
def textual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that is told text and its sizes, ``model``, its ``checkpoint`` and ``graph.onnx``."""
    folder = tmp_path_factory.mktemp("textual")
    config = json.loads((save_tiny_network("sdxl", folder / "model") / "unet" / "config.json").read_text())
    told = arguments("UNet2DConditionModel", config)
    cheap = {"samples": 1, "check_samples": 1, "les_iterations": 0, "rounding": "nearest", "clip": False}
    recipe = replace(TINY_RECIPE, **cheap, embeddings=random_embeddings(told, 1))
    calibrate(folder / "model", folder / "checkpoint", recipe, Resources(torch.device("cpu")), QUIET)
    export_onnx(folder / "checkpoint", folder / "graph.onnx", QUIET, verify=False)
    return folder


def test_a_model_that_is_told_text_is_timed_without_any(textual: Path) -> None:
    graph, checkpoint = str(textual / "graph.onnx"), str(textual / "checkpoint")
    settings = BenchSettings(repeat=1, warm_up=1, threads=1, batch=2)
    engines = [graph, f"openvino:{graph}", checkpoint]
    result = bench_engines(engines, settings, QUIET, reference=str(textual / "model"))
    assert [one.backend for one in result.timings] == ["torch", "onnxruntime", "openvino", "torch"]
    (note,) = result.notes
    assert note.startswith("told random numbers as encoder_hidden_states, added_cond_kwargs.text_embeds, added_cond_")


def test_engines_of_different_models_are_refused(tiny_onnx: Path) -> None:
    with pytest.raises(DmqError, match=r"digits makes samples of \(1, 16, 16\), the engine of \(1, 8, 8\)"):
        bench_engines([str(tiny_onnx)], BenchSettings(), QUIET, reference=str(BUNDLED / "digits"))


def test_the_command_prints_a_table_or_json(tiny_onnx: Path) -> None:
    arguments = ["bench", str(tiny_onnx), f"openvino:{tiny_onnx}", "--repeat", "2", "--warm-up", "1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("engine ")
    assert result.stdout.count(str(tiny_onnx)) == 2
    report = json.loads(CliRunner().invoke(main, [*arguments, "--json"]).stdout)
    assert [one["backend"] for one in report["timings"]] == ["onnxruntime", "openvino"]
    assert report["settings"]["repeat"] == 2


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ("none.onnx", "none.onnx is no engine"),
        ("openvino:none.onnx", "none.onnx is no engine"),
        ("torch:{tiny}", "runs on onnxruntime or openvino, not on torch"),
        ("tensorrt:{tiny}", "runs on onnxruntime or openvino, not on tensorrt"),
        ("tensorrt-rtx:{tiny}", "runs on onnxruntime or openvino, not on tensorrt-rtx"),
        ("onnxruntime-tpu:{tiny}", "no provider tpu: cpu, "),
    ],
)
def test_an_engine_that_does_not_open_is_one_line(engine: str, message: str, tiny_onnx: Path) -> None:
    result = CliRunner().invoke(main, ["bench", engine.format(tiny=tiny_onnx)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
