"""What a calibration will take, before it starts: passes, files, memory, time.

Memory and the files are computed from the layers' shapes and one evaluation of the model; the time is extrapolated from
that evaluation and from fitting one of the layers for a moment.
"""

import math
import os
import shutil
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calib.capture import Extrema, LayerInputs, capture_bytes, columns_of, patch_rows
from calib.conditioning import conditioning_for
from calib.families import example_conditioning
from calib.fit import LOOKED_AT, FloatLayer, equivalent_scaling, fit_layer
from calib.les import OUTPUTS
from calib.model import SourceModel, predict
from calib.recipe import Recipe
from calib.rounding import CHUNK
from calib.survey import Survey
from calib.workers import one_thread
from dmq_export.errors import DmqError
from dmq_export.layer import LayerSpec
from dmq_export.memory import available_memory, current_memory, in_words, peak_memory
from dmq_export.table import table

WORKER_BYTES = 400 * 2**20  # a process that has imported PyTorch
PROBE_COLUMNS, PROBE_ITERATIONS = 1200, 8
BATCHES = (16, 8, 4, 2, 1)
TIMED, LONG = 3, 2.0
WORTH_WORKERS = 15.0  # seconds of fits below which starting processes does not pay
FLOAT = 4
Family = tuple[LayerSpec, ...]  # layers that share an equivalent scaling


@dataclass(frozen=True)
class Limits:
    """What a calibration may use.

    Attributes:
        device: that the network runs on and layers are fitted on.
        memory: bytes, of the GPU on CUDA and of the main memory otherwise; None for what is free.
        disk: bytes for captured layer inputs; more layers than fit are captured in several passes; None for half
            of what is free.
        workers: processes that fit layers on the CPU; None for as many as there are cores and memory, where it pays.
    """

    device: torch.device
    memory: int | None = None
    disk: int | None = None
    workers: int | None = None


@dataclass(frozen=True)
class Plan:
    """How a calibration will run, and what it will take.

    Attributes:
        passes: over the calibration set; the layers whose inputs each captures, by family.
        batch: samples per evaluation.
        workers: processes that fit layers; 1 for none but the main one.
        memory: bytes, at the worst moment, of all processes together.
        disk: bytes, likewise.
        seconds: by stage.
    """

    passes: tuple[tuple[Family, ...], ...]
    batch: int
    workers: int
    memory: int
    disk: int
    seconds: Mapping[str, float]

    @property
    def layers(self) -> int:
        """Layers to fit, in all passes."""
        return sum(len(family) for families in self.passes for family in families)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "layers": self.layers,
            "passes": len(self.passes),
            "batch": self.batch,
            "workers": self.workers,
            "memory_bytes": self.memory,
            "disk_bytes": self.disk,
            "seconds": {stage: round(seconds, 1) for stage, seconds in self.seconds.items()},
        }

    def text(self) -> str:
        """The plan as a table."""
        total = sum(self.seconds.values())
        rows = [
            ("layers to fit", str(self.layers)),
            ("passes over the calibration set", str(len(self.passes))),
            ("samples per evaluation", str(self.batch)),
            ("processes that fit layers", str(self.workers)),
            ("peak memory", in_words(self.memory)),
            ("disk for layer inputs", in_words(self.disk)),
            *((f"time: {stage}", _duration(seconds)) for stage, seconds in self.seconds.items()),
            ("time: total", _duration(total)),
        ]
        return table(("plan", "estimate"), rows, right=(1,))


def make_plan(
    source: SourceModel, surveyed: Survey, recipe: Recipe, limits: Limits, work: Path, *, batch: int | None = None
) -> Plan:
    """The plan that respects ``limits``.

    Args:
        work: a folder on the disk that layer inputs will go to, or one that is still to be made.
        batch: samples per evaluation of the calibration this goes on with; None for what the memory takes.

    Raises:
        DmqError: no plan does.
    """
    specs = surveyed.coverage.quantized
    branches = 2 if conditioning_for(source, recipe, 1).unconditional else 1
    activations = branches * activation_bytes(source)
    rows = recipe.samples * branches
    families = surveyed.siblings if recipe.les_joint else tuple((spec,) for spec in specs)
    passes = split_passes(families, rows * recipe.steps, _disk_limit(limits, work))
    fits = _fit_seconds(source, specs, recipe, rows * recipe.steps)
    limit = _memory_limit(limits)
    fixed = current_memory() + _trajectory_bytes(source, recipe, branches)
    fit = max(fit_bytes(spec, recipe, rows * recipe.steps) for spec in specs)
    # the check holds all layers' codes beside the model, a byte each, and makes one layer's weights of them at a time
    sizes = [math.prod(spec.weight_shape) for spec in specs]
    codes = sum(sizes) + 3 * FLOAT * max(sizes)
    batch = batch or next((b for b in BATCHES if fixed + codes + b * activations <= limit), 1)
    needed = fixed + max(codes + batch * activations, fit)
    if needed > limit:
        at_once = "1 sample" if batch == 1 else f"{batch} samples"
        raise DmqError(
            f"calibrating {source.class_name}, {at_once} at a time, takes about {in_words(needed)}, "
            f"{in_words(limit)} is allowed: raise --max-memory, or free memory"
        )
    workers = _workers(limits, limit - fixed, fit, sum(fits) if limits.workers is None else math.inf)
    if workers > 1:
        needed = max(needed, fixed + workers * (fit + WORKER_BYTES))
    disk = max(sum(_captured(family, rows * recipe.steps) for family in families) for families in passes)
    seconds = _seconds(_evaluation_seconds(source, batch), rows, recipe, len(passes), sum(fits) / workers)
    return Plan(passes, batch, workers, max(needed, peak_memory()), disk, seconds)


def split_passes(families: Sequence[Family], evaluations: int, disk: int) -> tuple[tuple[Family, ...], ...]:
    """Layers whose captured inputs fit on the disk together; at least one family at a time."""
    passes: list[list[Family]] = []
    used = 0
    for family in families:
        size = _captured(family, evaluations)
        if not passes or used + size > disk:
            passes.append([])
            used = 0
        passes[-1].append(family)
        used += size
    return tuple(tuple(chosen) for chosen in passes)


def _captured(family: Family, evaluations: int) -> int:
    return sum(capture_bytes(spec, evaluations) for spec in family)


def fit_bytes(spec: LayerSpec, recipe: Recipe, evaluations: int) -> int:
    """Memory that fitting a layer takes: its patches, second moments and their factors, the weights' gradients."""
    columns = columns_of(spec)
    chunk = min(columns, CHUNK)
    patches = capture_bytes(spec, evaluations)
    rounding = FLOAT * (6 * chunk**2 + 2 * patch_rows(spec) * chunk + 7 * spec.out_channels * columns)
    learning = FLOAT * 14 * columns * (recipe.les_batch + min(spec.out_channels, OUTPUTS))
    return patches + max(rounding, learning, 5 * FLOAT * LOOKED_AT)


def activation_bytes(source: SourceModel) -> int:
    """What evaluating one sample holds at its worst moment: module outputs, and as much again between modules."""
    with _live_outputs(source.network) as live:
        _evaluate_zeros(source, 1)
    return 2 * live.most


def _evaluation_seconds(source: SourceModel, batch: int) -> float:
    """Seconds a sample takes, ``batch`` at a time: the best of three, or the first if that takes long."""
    best = math.inf
    for _ in range(TIMED):
        start = time.perf_counter()
        _evaluate_zeros(source, batch)
        best = min(best, time.perf_counter() - start)
        if best > LONG:
            break
    return best / batch


def _evaluate_zeros(source: SourceModel, batch: int) -> None:
    device = next(source.network.parameters()).device
    example = example_conditioning(source.class_name, source.config, batch=batch)
    told = {key: value.to(device) for key, value in example.items()}
    with torch.no_grad():
        sample = torch.zeros(batch, *source.sample_shape, device=device)
        predict(source.network, sample, torch.tensor(1.0, device=device), told).cpu()


class _Live:
    """Bytes of the tensors that are alive now, and the most there were."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._known:
            return
        self._known.add(address)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._drop, address, storage.nbytes())

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


@contextmanager
def _live_outputs(network: nn.Module) -> Iterator[_Live]:
    """Counts what the network's modules put out while the block runs."""
    live = _Live()

    def note(_: nn.Module, __: Any, output: Any) -> None:
        for value in output if isinstance(output, tuple) else (output,):
            if isinstance(value, Tensor):
                live.add(value)

    handles = [module.register_forward_hook(note) for module in network.modules()]
    try:
        yield live
    finally:
        for handle in handles:
            handle.remove()


def _trajectory_bytes(source: SourceModel, recipe: Recipe, branches: int) -> int:
    """Inputs and predictions of both sets."""
    kept = (recipe.samples + recipe.check_samples) * branches * recipe.steps
    return 2 * FLOAT * kept * math.prod(source.sample_shape)


def _memory_limit(limits: Limits) -> float:
    if limits.device.type == "cuda":
        on_gpu, _ = torch.cuda.mem_get_info(limits.device)
        return current_memory() + float(min(limits.memory or on_gpu, on_gpu))
    available = available_memory()
    free: float = math.inf if available is None else current_memory() + available / _processes_here()
    return min(limits.memory or math.inf, free)


def _processes_here() -> int:
    """Processes of torchrun that share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def _disk_limit(limits: Limits, work: Path) -> int:
    existing = next(folder for folder in (work, *work.resolve().parents) if folder.is_dir())
    return limits.disk or shutil.disk_usage(existing).free // 2


def _workers(limits: Limits, room: float, fit: int, seconds: float) -> int:
    """Processes that fit layers at once: those asked for, the cores, what the memory takes, one if it does not pay."""
    if limits.device.type != "cpu" or seconds < WORTH_WORKERS:
        return 1
    cores = max(1, len(os.sched_getaffinity(0)) // _processes_here())
    return max(1, min(limits.workers or cores, int(room // (fit + WORKER_BYTES)) if room < math.inf else cores))


def _seconds(evaluation: float, rows: int, recipe: Recipe, passes: int, fits: float) -> dict[str, float]:
    branches = rows // recipe.samples
    estimates = {
        "trajectories": (recipe.samples + recipe.check_samples) * branches * recipe.steps * evaluation,
        "layer inputs": passes * rows * recipe.steps * evaluation * 1.2,
        "layer fits": fits,
        "check": 3 * recipe.check_samples * branches * recipe.steps * evaluation * 1.3,
    }
    if recipe.pts_layers != "none":
        estimates["PTS votes"] = rows * recipe.steps * evaluation * 1.2
    if recipe.rounding == "adaround":
        # every iteration runs one block forth and back, 32 evaluations at a time; all blocks make up the network
        estimates["AdaRound"] = 32 * recipe.round_iterations * evaluation * 3
    return estimates


def _fit_seconds(source: SourceModel, specs: Sequence[LayerSpec], recipe: Recipe, evaluations: int) -> list[float]:
    """Per layer, from a short fit of one of them on random numbers."""
    smaller = [spec for spec in specs if columns_of(spec) <= PROBE_COLUMNS]
    probe = max(smaller, key=columns_of) if smaller else min(specs, key=columns_of)
    iteration, rest = _probe(source, probe, recipe)
    per_number, per_operation = iteration / _iteration_numbers(probe, recipe), rest / _rounding_operations(probe)
    return [
        recipe.les_iterations * per_number * _iteration_numbers(spec, recipe)
        + per_operation * _rounding_operations(spec)
        for spec in specs
    ]


def _probe(source: SourceModel, spec: LayerSpec, recipe: Recipe) -> tuple[float, float]:
    """Seconds of one LES iteration, and of everything else in a fit."""
    weight = source.network.get_submodule(spec.name).get_parameter("weight").detach()
    generator = torch.Generator().manual_seed(0)
    shape = (patch_rows(spec), spec.in_channels, math.prod(spec.kernel))
    patches = torch.randn(shape, generator=generator).to(weight.device)
    high = patches.amax((0, 2)).expand(1, recipe.steps, -1)
    step = torch.arange(len(patches), device=weight.device) % recipe.steps
    inputs = LayerInputs(patches, step, Extrema(-high, high))

    layer = FloatLayer(spec, weight, None)

    def fit(iterations: int) -> float:
        start = time.perf_counter()
        once = replace(recipe, les_iterations=iterations)
        fit_layer(layer, inputs, once, equivalent_scaling([layer], inputs, once))
        return time.perf_counter() - start

    with one_thread(weight.device):
        fit(1)  # the first time is slower
        without = fit(0)
        return max(fit(PROBE_ITERATIONS) - without, 0.0) / PROBE_ITERATIONS, without


def _iteration_numbers(spec: LayerSpec, recipe: Recipe) -> int:
    """What an LES iteration goes through: patches and weights."""
    return columns_of(spec) * (spec.groups * recipe.les_batch + min(spec.out_channels, OUTPUTS))


def _rounding_operations(spec: LayerSpec) -> int:
    """What rounding a layer takes: moments, factors, and the columns one by one."""
    columns = columns_of(spec)
    chunk = min(columns, CHUNK)
    return spec.groups * columns * chunk * (patch_rows(spec) + chunk + 3 * spec.out_channels)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
