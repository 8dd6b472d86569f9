"""Samples written by the tens of thousands: killed and restarted, by several processes, and what the user is told."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dmq_export.commands import sample as command
from dmq_export.commands.engine import Engine, Execution, open_engine
from dmq_export.commands.sample import Outputs, sample_engine
from dmq_export.commands.sampler import SampleSettings, draw_samples
from dmq_export.common.progress import Progress
from dmq_export.errors import CheckFailedError, DmqError

ROOT = Path(__file__).resolve().parents[3]
SETTINGS = SampleSettings(count=11, batch=3, seed=4)
QUIET = Progress(show=False)


def run(path: Path, outputs: Outputs, settings: SampleSettings = SETTINGS) -> command.Sampled:
    return sample_engine(path, settings, outputs, QUIET, Execution(threads=1))


def arguments(engine: Path, npz: Path) -> list[str]:
    options = ["--num", "11", "--batch", "3", "--seed", "4", "--threads", "1"]
    return [sys.executable, str(ROOT / "cli.py"), "sample", str(engine), "--npz", str(npz), *options]


@pytest.fixture
def whole(tiny_onnx: Path, tmp_path: Path) -> bytes:
    """What an undisturbed run writes."""
    path = tmp_path / "whole.npz"
    assert run(tiny_onnx, Outputs(npz=path)).written == (path,)
    return path.read_bytes()


def test_the_file_holds_the_samples(tiny_onnx: Path, whole: bytes, tmp_path: Path) -> None:
    expected = draw_samples(open_engine(tiny_onnx, Execution(threads=1)), SETTINGS, QUIET)
    with np.load(tmp_path / "whole.npz") as file:
        np.testing.assert_array_equal(file["samples"], expected)
        assert file["labels"].tolist() == [i % 3 for i in range(11)]


@pytest.mark.parametrize("batches", range(4))
def test_a_run_that_was_stopped_goes_on(
    batches: int, tiny_onnx: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "resumed.npz"
    drawn: list[range] = []
    draw = command.draw_batches

    def some(engine: Engine, settings: Any, conditioning: Any, wanted: list[range], progress: Any) -> Any:
        for indices, samples in zip(wanted, draw(engine, settings, conditioning, wanted, progress), strict=True):
            if len(drawn) == batches:
                raise KeyboardInterrupt
            drawn.append(indices)
            yield samples

    with monkeypatch.context() as patch:
        patch.setattr(command, "draw_batches", some)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_onnx, Outputs(npz=path))
    assert not path.exists()
    again: list[range] = []
    monkeypatch.setattr(
        command,
        "draw_batches",
        lambda engine, settings, conditioning, wanted, progress: (
            again.extend(wanted) or draw(engine, settings, conditioning, wanted, progress)
        ),
    )
    run(tiny_onnx, Outputs(npz=path))
    assert len(drawn) + len(again) == 4
    assert not set(drawn) & set(again)
    assert path.read_bytes() == whole


def test_a_killed_process_leaves_nothing_that_harms(tiny_onnx: Path, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "killed.npz"
    process = subprocess.Popen(arguments(tiny_onnx, path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(tmp_path.glob("killed.npz.parts/0*")):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    subprocess.run(arguments(tiny_onnx, path), check=True, capture_output=True)
    assert path.read_bytes() == whole
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole.npz", "killed.npz"}


def test_two_processes_share_the_work(tiny_onnx: Path, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "shared.npz"
    processes = [
        subprocess.Popen(
            arguments(tiny_onnx, path),
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert any(line.strip() == str(path) for line in said)
    assert path.read_bytes() == whole
    assert {entry.name for entry in tmp_path.iterdir()} == {"whole.npz", "shared.npz"}


def test_a_share_alone_writes_no_file(
    tiny_onnx: Path, whole: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "shared.npz"
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    waiting = run(tiny_onnx, Outputs(npz=path))
    assert waiting.waits_for == 2
    assert "other processes still draw 2 batches" in waiting.text()
    assert not path.exists()
    monkeypatch.setenv("RANK", "0")
    assert run(tiny_onnx, Outputs(npz=path)).written == (path,)
    assert path.read_bytes() == whole


@pytest.mark.parametrize("outputs", [Outputs(picture=Path("p.png")), Outputs(npz=Path("s.npz"), reference="digits")])
def test_processes_share_nothing_but_raw_samples(
    outputs: Outputs, tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(DmqError, match="2 processes share the work of --npz alone"):
        run(tiny_onnx, outputs)


def test_a_finished_file_is_not_drawn_again(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "s.npz"
    run(tiny_onnx, Outputs(npz=path))
    before = path.stat().st_mtime_ns
    monkeypatch.setattr(command, "draw_batches", None)
    assert run(tiny_onnx, Outputs(picture=tmp_path / "p.png", npz=path)).written == (tmp_path / "p.png", path)
    assert path.stat().st_mtime_ns == before
    assert f"Note: {path} holds these samples already\n" in capsys.readouterr().err


@pytest.mark.parametrize("change", [{"seed": 5}, {"labels": (1, 2)}, {"steps": 2}, {"count": 10}])
def test_other_settings_are_drawn_anew(change: dict[str, Any], tiny_onnx: Path, whole: bytes, tmp_path: Path) -> None:
    run(tiny_onnx, Outputs(npz=tmp_path / "whole.npz"), replace(SETTINGS, **change))
    assert (tmp_path / "whole.npz").read_bytes() != whole


def test_parts_of_another_engine_are_refused(
    tiny_onnx: Path, tiny_checkpoint_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs = Outputs(npz=tmp_path / "s.npz")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    run(tiny_onnx, outputs)
    with pytest.raises(DmqError, match=r"holds part of another run \(backend onnxruntime there, torch here"):
        run(tiny_checkpoint_folder, outputs)


def test_psnr_over_batches_is_that_of_all(tiny_model: Path, tiny_onnx: Path, tmp_path: Path) -> None:
    outputs = Outputs(picture=tmp_path / "p.png", reference=str(tiny_model))
    in_batches = run(tiny_onnx, outputs)
    at_once = run(tiny_onnx, outputs, replace(SETTINGS, batch=11))
    stored = run(tiny_onnx, replace(outputs, npz=tmp_path / "s.npz"))
    assert in_batches.psnr is not None
    # other batch sizes may sum in another order and flip a few codes at ties
    assert in_batches.psnr == pytest.approx(at_once.psnr, abs=1)
    assert stored.psnr == pytest.approx(in_batches.psnr, abs=1e-9)


def test_a_picture_shows_the_first_samples_and_says_so(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: dict[str, np.ndarray] = {}
    monkeypatch.setattr(command, "SHOWN", 4)
    monkeypatch.setattr("dmq_export.sampling.images.save_grid", lambda rows, path: shown.update(rows))
    run(tiny_onnx, Outputs(picture=tmp_path / "p.png"))
    assert "Note: the picture shows the first 4 of 11 samples" in capsys.readouterr().err
    expected = draw_samples(open_engine(tiny_onnx, Execution(threads=1)), SETTINGS, QUIET)
    np.testing.assert_array_equal(shown["w4a8"], expected[:4])


def test_departures_from_the_calibration_are_told(
    tiny_onnx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = Outputs(npz=tmp_path / "s.npz")
    run(tiny_onnx, outputs)
    assert capsys.readouterr().err == ""
    run(tiny_onnx, outputs, replace(SETTINGS, scheduler="pndm", steps=5))
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "Note: scheduler PNDMScheduler, calibrated with DDIMScheduler"
    assert told[1].startswith("Note: ")
    assert "evaluations at other timesteps than the 3 calibrated: each uses the ranges of the nearest" in told[1]


@pytest.mark.parametrize(
    ("value", "message"), [(np.nan, "sample 3 holds NaN or infinity"), (-7.0, "sample 3 is one colour all over")]
)
def test_a_picture_in_which_nothing_was_drawn_stops_the_run(
    value: float, message: str, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = command.draw_batches

    def broken(engine: Engine, settings: Any, conditioning: Any, wanted: list[range], progress: Any) -> Any:
        for indices, samples in zip(wanted, draw(engine, settings, conditioning, wanted, progress), strict=True):
            if 3 in indices:
                samples[3 - indices.start] = value
            yield samples

    monkeypatch.setattr(command, "draw_batches", broken)
    with pytest.raises(CheckFailedError, match=message):
        run(tiny_onnx, Outputs(npz=tmp_path / "s.npz"))
    with pytest.raises(CheckFailedError, match=message):
        run(tiny_onnx, Outputs(picture=tmp_path / "p.png"))
    assert [path.name for path in tmp_path.iterdir()] == ["s.npz.parts"]  # the batches before it


def test_it_needs_neither_pytorch_nor_diffusers(tiny_onnx: Path, whole: bytes, tmp_path: Path) -> None:
    path = tmp_path / "deployed.npz"
    options = arguments(tiny_onnx, path)[2:]
    blocked = "torch diffusers onnx onnx_ir onnxscript safetensors"
    code = f"import sys; sys.modules.update(dict.fromkeys('{blocked}'.split())); "
    code += f"from dmq_export.cli import main; main({[*options, '-o', str(tmp_path / 'p.png')]!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert path.read_bytes() == whole


def test_memory_does_not_grow_with_the_number_of_samples(
    tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No more than two batches are alive at any time."""
    import gc
    import weakref

    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    draw = command.draw_batches

    def counted(*given: Any) -> Any:
        nonlocal most
        for samples in draw(*given):
            alive.append(weakref.ref(samples))
            most = max(most, sum(one() is not None for one in alive))
            yield samples
            del samples
            gc.collect()

    monkeypatch.setattr(command, "draw_batches", counted)
    run(tiny_onnx, Outputs(npz=tmp_path / "s.npz"), replace(SETTINGS, batch=1))
    assert len(alive) == 11
    assert most <= 2
