"""A calibration that is stopped and started again, or shared by processes, ends with the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from models import TINY_RECIPE, save_small_model, save_tiny_model

import calib.run.plan
import calib.run.stages
from calib.calibrate import calibrate, planned, work_folder
from calib.record.layer_inputs import Captures
from calib.record.work_folder import WorkFolder
from calib.run.plan import Resources
from dmq_export.checkpoint import MANIFEST, TENSORS
from dmq_export.common.progress import Progress
from dmq_export.errors import DmqError

ROOT = Path(__file__).resolve().parents[2]
CPU, QUIET = Resources(torch.device("cpu")), Progress(show=False)
# two groups of samples, every stage
RECIPE = replace(
    TINY_RECIPE, samples=20, steps=2, rounding="adaround", round_iterations=3, pts_kappa=0.0, sensitive_share=0.3
)
ARGUMENTS = ["--samples=20", "--steps=2", "--les-iters=2", "--rounding=adaround", "--round-iters=3"]
ARGUMENTS += ["--sensitive-share=0.3"]


class Stopped(BaseException):
    """As if the process had been killed between two items."""


def stop(*_: object, **__: object) -> None:
    raise Stopped


def run(model: Path, output: Path, limits: Resources = CPU, recipe=RECIPE, **options: bool) -> None:
    calibrate(model, output, recipe, limits, Progress(show=False), **options)


def contents(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / name).read_bytes() for name in (MANIFEST, TENSORS))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def undisturbed(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, ...]:
    folder = tmp_path_factory.mktemp("undisturbed") / "out"
    run(small_model, folder)
    assert not work_folder(folder).exists()
    return contents(folder)


@pytest.fixture
def saves(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every item that is saved, in order."""
    saved: list[str] = []
    save = WorkFolder.save

    def note(self: WorkFolder, key: str, *rest: object) -> None:
        save(self, key, *rest)  # type: ignore[arg-type]
        saved.append(key)

    monkeypatch.setattr(WorkFolder, "save", note)
    return saved


def test_stopped_after_any_item_it_goes_on_and_ends_with_the_same_bytes(
    small_model: Path, undisturbed: tuple[bytes, ...], tmp_path: Path, saves: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small_model, tmp_path / "alone")
    items = list(saves)
    assert len(items) == len(set(items))
    assert {key.split("/")[0] for key in items} == {
        "trajectories",
        "captures",
        "fits",
        "sensitivity",
        "blocks",
        "votes",
        "held-out trajectories",
        "check",
    }
    saves.clear()
    recording = WorkFolder.save

    def stop_every_time(self: WorkFolder, key: str, *rest: object) -> None:
        recording(self, key, *rest)  # type: ignore[arg-type]
        raise Stopped

    monkeypatch.setattr(WorkFolder, "save", stop_every_time)
    for _ in items:
        with pytest.raises(Stopped):
            run(small_model, tmp_path / "out")
    # each once, none again; what was not captured while trajectories were recorded is captured from them
    assert sorted(saves) == sorted(items)
    run(small_model, tmp_path / "out")
    assert len(saves) == len(items)
    assert contents(tmp_path / "out") == undisturbed
    assert not work_folder(tmp_path / "out").exists()


def test_another_recipe_does_not_go_on_with_it(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calib.run.stages, "run_tasks", stop)
    with pytest.raises(Stopped):
        run(small_model, tmp_path / "out")
    with pytest.raises(DmqError, match=r"holds an unfinished calibration with seed 0, this one has 1"):
        run(small_model, tmp_path / "out", recipe=replace(RECIPE, seed=1))
    with pytest.raises(Stopped):
        run(small_model, tmp_path / "out", recipe=replace(RECIPE, seed=1), fresh=True)


def test_it_goes_on_with_the_batch_it_began_with_whatever_memory_is_free_now(
    small_model: Path, undisturbed: tuple[bytes, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as now:
        now.setattr(calib.run.stages, "run_tasks", stop)
        with pytest.raises(Stopped):
            run(small_model, tmp_path / "out")
    monkeypatch.setattr(calib.run.plan, "BATCHES", (1,))
    assert planned(small_model, tmp_path / "out", RECIPE, CPU, QUIET)[1].batch == 16
    assert planned(small_model, tmp_path / "out", RECIPE, CPU, QUIET, fresh=True)[1].batch == 1
    run(small_model, tmp_path / "out")
    assert contents(tmp_path / "out") == undisturbed


def test_the_number_of_workers_changes_nothing(
    small_model: Path, undisturbed: tuple[bytes, ...], tmp_path: Path
) -> None:
    run(small_model, tmp_path / "out", Resources(torch.device("cpu"), workers=2))
    assert contents(tmp_path / "out") == undisturbed


def test_the_number_of_passes_changes_nothing(tmp_path: Path) -> None:
    """What the first pass captures while trajectories are recorded, the others capture from these; with guidance."""
    model, recipe = save_tiny_model(tmp_path / "model"), replace(RECIPE, guidance_scale=2.0, null_label=0, samples=18)
    recipe = replace(recipe, rounding="gptq", sensitive_share=0.0)
    run(model, tmp_path / "one", recipe=recipe)
    run(model, tmp_path / "many", Resources(torch.device("cpu"), disk=1), recipe)
    plans = [json.loads((tmp_path / name / "run.json").read_text())["plan"]["passes"] for name in ("one", "many")]
    assert plans[0] == 1 < plans[1]
    assert contents(tmp_path / "one") == contents(tmp_path / "many")


def test_what_is_captured_is_not_captured_again_where_there_is_less_room_now(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPE, rounding="gptq", sensitive_share=0.0)
    run(small_model, tmp_path / "alone", recipe=recipe)
    with monkeypatch.context() as now:
        now.setattr(calib.run.stages, "run_tasks", stop)
        with pytest.raises(Stopped):
            run(small_model, tmp_path / "out", recipe=recipe)
    taken, take = [], Captures.take

    def noted(self: Captures, *arguments: Any, **options: Any) -> None:
        taken.append(self)
        take(self, *arguments, **options)

    monkeypatch.setattr(Captures, "take", noted)
    less = planned(small_model, tmp_path / "out", recipe, CPU, QUIET)[1].disk - 1
    run(small_model, tmp_path / "out", Resources(torch.device("cpu"), disk=less), recipe)
    assert len(taken) == len(taken[0].batches) == 2  # of the second pass; the first held that and more
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def command(model: Path, output: Path, *arguments: str) -> list[str]:
    return ["-m", "dmq_export", "calibrate", str(model), "-o", str(output), *ARGUMENTS, *arguments]


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.mark.slow
def test_two_processes_of_torchrun_end_with_the_same_bytes_as_one(small_model: Path, tmp_path: Path) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    subprocess.run([sys.executable, *command(small_model, alone)], env=ENVIRONMENT, check=True, capture_output=True)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    together = [*launcher, *command(small_model, shared, "--json")]
    done = subprocess.run(together, env=ENVIRONMENT, check=True, capture_output=True, text=True, timeout=300)
    assert contents(shared) == contents(alone)
    assert json.loads(done.stdout)["checkpoint"] == str(shared)  # one of them speaks
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "shared"]


@pytest.mark.slow
def test_killed_it_takes_its_workers_along_and_goes_on(small_model: Path, tmp_path: Path) -> None:
    arguments = command(small_model, tmp_path / "out", "--workers=2", "--les-iters=60")
    subprocess.run(
        [sys.executable, *command(small_model, tmp_path / "alone", "--les-iters=60")],
        env=ENVIRONMENT,
        check=True,
        capture_output=True,
    )
    process = subprocess.Popen([sys.executable, *arguments], env=ENVIRONMENT, stdout=subprocess.PIPE, process_group=0)
    fits = work_folder(tmp_path / "out") / "fits"
    while not list(fits.rglob("*.safetensors")) and process.poll() is None:
        time.sleep(0.02)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.send_signal(signal.SIGKILL)  # to it alone: its workers notice by themselves
    process.communicate()
    assert children
    deadline = time.monotonic() + 30
    while any(_running(pid) for pid in children) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(_running(pid) for pid in children)
    subprocess.run([sys.executable, *arguments], env=ENVIRONMENT, check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


def _running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    try:
        return "State:\tZ" not in status.read_text()
    except OSError:
        return False
