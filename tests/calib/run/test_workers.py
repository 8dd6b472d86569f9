"""Fits in other processes; that they give the same bytes is in test_resume.py."""

import multiprocessing
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import TINY_RECIPE

from calib.fit.layer import LayerWeights, fit_key, load_fit
from calib.model.layers import select_layers
from calib.model.load import load_model
from calib.quant.patches import weight_of
from calib.record.conditioning import Conditioning
from calib.record.layer_inputs import Captures
from calib.record.trajectories import SamplerSettings, record_trajectories
from calib.record.work_folder import WorkFolder
from calib.run.workers import FitTask, one_thread, run_tasks
from dmq_export.bits import Bits
from dmq_export.errors import DmqError

CPU = torch.device("cpu")


@pytest.fixture
def tasks(tiny_model: Path, tmp_path: Path) -> list[FitTask]:
    source = load_model(tiny_model, CPU)
    conditioning = Conditioning({"class_labels": torch.zeros(2, dtype=torch.int64)}, {})
    trajectories = record_trajectories(source, SamplerSettings(steps=2), conditioning, range(2), seed=0)
    specs = select_layers(source, Bits(4, 8), "asymmetric", ()).coverage.quantized[:3]
    work = WorkFolder(tmp_path)
    captures = Captures(work, [range(2)], trajectories.size.steps, specs, seed=0)
    captures.take(source.network, trajectories, range(2))
    layers = [LayerWeights(spec, weight_of(source.network.get_submodule(spec.name)), None) for spec in specs]
    return [FitTask((layer,), captures, TINY_RECIPE, work, CPU) for layer in layers]


@pytest.mark.parametrize("workers", [1, 2])
def test_every_task_is_done_once_and_its_fit_is_kept(tasks: list[FitTask], workers: int) -> None:
    done: list[dict[str, float]] = []
    run_tasks(tasks, workers, done.append)
    specs = [layer.spec for task in tasks for layer in task.layers]
    assert sorted(name for seconds in done for name in seconds) == sorted(spec.name for spec in specs)
    assert all(taken > 0 for seconds in done for taken in seconds.values())
    for spec in specs:
        assert fit_key(spec) in tasks[0].work
        assert load_fit(spec, tasks[0].work).layer.spec == spec


def test_a_failing_task_is_an_error_here(tasks: list[FitTask]) -> None:
    tasks[1].captures.forget()
    with pytest.raises(RuntimeError, match="patches"):
        run_tasks(tasks, 2, lambda *_: None)


def test_a_worker_that_is_killed_is_one_line(tasks: list[FitTask]) -> None:
    def kill(_: object) -> None:
        for process in multiprocessing.active_children():
            process.kill()

    with pytest.raises(DmqError, match="was killed, perhaps for want of memory: repeat the command, which goes on"):
        run_tasks(tasks * 20, 2, kill)


def test_an_interruption_does_not_wait_for_what_is_queued(tasks: list[FitTask]) -> None:
    done: list[object] = []

    def interrupt(seconds: dict[str, float]) -> None:
        done.append(seconds)
        raise KeyboardInterrupt

    start = time.perf_counter()
    slow = [replace(task, recipe=replace(task.recipe, les_iterations=10**6)) for task in tasks[1:]]
    with pytest.raises(KeyboardInterrupt):
        run_tasks([tasks[0], *slow * 20], 2, interrupt)
    assert time.perf_counter() - start < 60  # one of the others takes many minutes
    assert len(done) == 1
    assert not multiprocessing.active_children()


def test_one_thread_on_the_cpu_while_a_fit_runs() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(min(3, max(2, os.cpu_count() or 2)))
    try:
        with one_thread(CPU):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() > 1
    finally:
        torch.set_num_threads(before)
