"""Fits layers in processes of their own, one thread each.

A layer's fit is a long chain of small operations: a second thread mostly waits, a second process does not. The result
does not depend on how many there are, since a fit takes one thread on the CPU in any case.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.capture import Captures
from calib.fit import fit_layer
from calib.recipe import Recipe
from calib.work import WorkFolder
from dmq_export.layer import LayerSpec

WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class FitTask:
    """One layer to fit, and where its inputs are and its fit goes."""

    spec: LayerSpec
    weight: Tensor
    bias: Tensor | None
    captures: Captures
    recipe: Recipe
    work: WorkFolder
    device: torch.device

    def run(self) -> tuple[str, float]:
        """Fit and keep the result; the layer's name, and seconds."""
        inputs = self.captures.load(self.spec).to(self.device)
        start = time.perf_counter()
        with one_thread(self.device):
            fit = fit_layer(self.spec, self.weight, self.bias, inputs, self.recipe)
        fit.save(self.work)
        return self.spec.name, time.perf_counter() - start


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """While the block runs, PyTorch's operations on the CPU take one thread."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_tasks(tasks: Sequence[FitTask], workers: int, done: Callable[[str, float], None]) -> None:
    """Run every task, in ``workers`` processes if more than one; ``done`` receives name and seconds of each."""
    if workers < 2 or len(tasks) < 2:
        for task in tasks:
            done(*task.run())
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
    pool = ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_watch, initargs=(os.getpid(),))
    with pool:
        for future in as_completed([pool.submit(FitTask.run, task) for task in tasks]):
            done(*future.result())


def _watch(parent: int) -> None:
    """End with the parent, also where that is killed and cannot tell."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
