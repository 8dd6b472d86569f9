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
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from calib.fit.layer import LayerWeights, equivalent_scaling, fit_layer
from calib.record.layer_inputs import Captures, LayerInputs
from calib.record.work_folder import WorkFolder
from dmq_export.errors import DmqError
from dmq_export.recipe import Recipe

WATCH_SECONDS = 1.0


@dataclass(frozen=True)
class FitTask:
    """Layers to fit, and where their inputs are and their fits go; those of one task share their equivalent scaling."""

    layers: tuple[LayerWeights, ...]
    captures: Captures
    recipe: Recipe
    work: WorkFolder
    device: torch.device

    def run(self) -> dict[str, float]:
        """Fit and keep the results; seconds by layer, the first one's with the scaling."""
        seconds = {}
        start = time.perf_counter()
        with one_thread(self.device):
            inputs = self._inputs(self.layers[0])
            les = equivalent_scaling(self.layers, inputs, self.recipe)
            for layer in self.layers:
                if layer is not self.layers[0]:
                    inputs = self._inputs(layer)
                fit_layer(layer, inputs, self.recipe, les).save(self.work)
                seconds[layer.spec.name] = time.perf_counter() - start
                start = time.perf_counter()
        return seconds

    def _inputs(self, layer: LayerWeights) -> LayerInputs:
        return self.captures.load(layer.spec).to(self.device)


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


def run_tasks(tasks: Sequence[FitTask], workers: int, done: Callable[[dict[str, float]], None]) -> None:
    """Run every task, in ``workers`` processes if more than one; ``done`` receives the seconds by layer of each.

    Raises:
        DmqError: one of the processes was killed.
    """
    if workers < 2 or len(tasks) < 2:
        for task in tasks:
            done(task.run())
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(min(workers, len(tasks)), context, initializer=_watch, initargs=(os.getpid(),)) as pool:
        try:
            for future in as_completed([pool.submit(FitTask.run, task) for task in tasks]):
                done(future.result())
        except BrokenProcessPool as error:
            raise DmqError(
                "a process that fitted layers was killed, perhaps for want of memory: repeat the command, which goes "
                "on, with fewer --workers or less --max-memory"
            ) from error
        except BaseException:
            for process in set(multiprocessing.active_children()) - others:
                process.terminate()  # or all that is queued would be fitted first
            raise


def _watch(parent: int) -> None:
    """End with the parent, also where that is killed and cannot tell."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
