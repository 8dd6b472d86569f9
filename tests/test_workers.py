"""Fits in other processes; that they give the same bytes is in test_resume.py."""

import os
from pathlib import Path

import pytest
import torch
from models import TINY_RECIPE

from calib.capture import Captures, group_count
from calib.fit import fit_key, load_fit
from calib.layer_op import weight_of
from calib.model import load_model
from calib.survey import survey
from calib.trajectories import Conditioning, SamplerSettings, record_trajectories
from calib.work import WorkFolder
from calib.workers import FitTask, one_thread, run_tasks
from dmq_export.bits import Bits

CPU = torch.device("cpu")


@pytest.fixture
def tasks(tiny_model: Path, tmp_path: Path) -> list[FitTask]:
    source = load_model(tiny_model, CPU)
    told = Conditioning({"class_labels": torch.zeros(2, dtype=torch.int64)}, {})
    trajectories = record_trajectories(source, SamplerSettings(steps=2), told, range(2), seed=0)
    specs = survey(source, Bits(4, 8), "asymmetric", ()).coverage.quantized[:3]
    work = WorkFolder(tmp_path)
    captures = Captures(work, trajectories, specs, seed=0)
    for group in range(group_count(trajectories)):
        captures.take(source.network, group)
    return [
        FitTask(spec, weight_of(source.network.get_submodule(spec.name)), None, captures, TINY_RECIPE, work, CPU)
        for spec in specs
    ]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once_and_its_fit_is_kept(tasks: list[FitTask], workers: int) -> None:
    done: list[tuple[str, float]] = []
    run_tasks(tasks, workers, lambda name, seconds: done.append((name, seconds)))
    assert sorted(name for name, _ in done) == sorted(task.spec.name for task in tasks)
    assert all(seconds > 0 for _, seconds in done)
    for task in tasks:
        assert fit_key(task.spec) in task.work
        assert load_fit(task.spec, task.work).layer.spec == task.spec


def test_a_failing_task_is_an_error_here(tasks: list[FitTask]) -> None:
    tasks[1].captures.forget()
    with pytest.raises(RuntimeError, match="patches"):
        run_tasks(tasks, 2, lambda *_: None)


def test_one_thread_on_the_cpu_while_a_fit_runs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(min(3, max(2, os.cpu_count() or 2)))
    try:
        with one_thread(CPU):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() > 1
    finally:
        torch.set_num_threads(before)
