"""How a calibration will run and what it will take, before it starts: passes, files, memory, time."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from calib.device import evaluating, memory_for_us, most_memory_held, processes_here
from calib.model.layers import LayerSelection
from calib.model.load import SourceModel
from calib.record.conditioning import recipe_conditioning
from calib.record.layer_inputs import capture_bytes
from calib.record.work_folder import WorkFolder
from calib.run.memory_estimate import WORKER_BYTES, estimate_memory
from calib.run.time_estimate import CAPTURED, evaluation_seconds, fit_seconds, stage_seconds
from dmq_export.common.memory import in_words
from dmq_export.common.table import table
from dmq_export.errors import DmqError
from dmq_export.layer import LayerSpec
from dmq_export.recipe import Recipe

BATCHES = (16, 8, 4, 2, 1)
WORTH_WORKERS = 15.0  # seconds of fits below which starting processes does not pay
ScalingGroup = tuple[LayerSpec, ...]  # layers that share an equivalent scaling


@dataclass(frozen=True)
class Resources:
    """What a calibration may use.

    Attributes:
        device: that the network runs on and layers are fitted on.
        memory: bytes, of the GPU on CUDA and of the main memory otherwise; None for what is free.
        disk: bytes for captured layer inputs; more layers than fit are captured in several passes; None for half
            of what is free, or was before they were captured.
        workers: processes that fit layers on the CPU; None for as many as there are cores and memory, where it pays.
    """

    device: torch.device
    memory: int | None = None
    disk: int | None = None
    workers: int | None = None


@dataclass(frozen=True)
class CalibrationPlan:
    """How a calibration will run, and what it will take.

    Attributes:
        passes: over the calibration set; the layers whose inputs each captures, by group.
        batch: samples per evaluation.
        workers: processes that fit layers; 1 for none but the main one.
        memory: bytes of the device, at the worst moment; on the CPU of all processes together.
        disk: bytes, likewise.
        seconds: by stage.
    """

    passes: tuple[tuple[ScalingGroup, ...], ...]
    batch: int
    workers: int
    memory: int
    disk: int
    seconds: Mapping[str, float]

    @property
    def layers(self) -> int:
        """Layers to fit, in all passes."""
        return sum(len(group) for groups in self.passes for group in groups)

    def only(self, layers: Mapping[str, LayerSpec]) -> "CalibrationPlan":
        """The passes over the groups with these layers, by name."""
        passes = (
            tuple(tuple(layers[spec.name] for spec in group) for group in groups if group[0].name in layers)
            for groups in self.passes
        )
        return replace(self, passes=tuple(groups for groups in passes if groups))

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
    source: SourceModel,
    selection: LayerSelection,
    recipe: Recipe,
    resources: Resources,
    work: Path,
    *,
    batch: int | None = None,
) -> CalibrationPlan:
    """The plan that respects ``resources``.

    Args:
        work: a folder on the disk that layer inputs will go to, or one that is still to be made.
        batch: samples per evaluation of the calibration this goes on with; None for what the memory takes.

    Raises:
        DmqError: no plan does.
    """
    specs = selection.coverage.quantized
    conditioning = recipe_conditioning(source, recipe, 1)
    rows = recipe.samples * conditioning.branches
    evaluations = rows * recipe.steps
    groups = selection.input_groups if recipe.les_joint else tuple((spec,) for spec in specs)
    passes = split_passes(groups, evaluations, _disk_limit(resources, work))
    fits = fit_seconds(source, specs, recipe)
    bytes_held, limit = estimate_memory(source, selection, recipe, conditioning), memory_for_us(resources.device)
    limit = min(resources.memory or math.inf, limit)
    batch = batch or next((b for b in BATCHES if bytes_held.evaluating(b) <= limit), 1)
    _require_room(source, bytes_held.peak(batch, 1), batch, limit)
    workers = _workers(resources, limit - bytes_held.fixed, bytes_held.fit, sum(fits))
    disk = max(sum(_captured(group, evaluations) for group in chosen) for chosen in passes)
    memory = max(bytes_held.peak(batch, workers), most_memory_held(resources.device))
    capture = sum(capture_bytes(spec, evaluations) for spec in specs) / CAPTURED[resources.device.type]
    with evaluating(resources.device):
        evaluation = evaluation_seconds(source, conditioning, batch)
    seconds = stage_seconds(evaluation, rows, recipe, len(passes), len(specs), capture, sum(fits) / workers)
    return CalibrationPlan(passes, batch, workers, memory, disk, seconds)


def _require_room(source: SourceModel, needed: int, batch: int, limit: float) -> None:
    if needed > limit:
        at_once = "1 sample" if batch == 1 else f"{batch} samples"
        raise DmqError(
            f"calibrating {source.class_name}, {at_once} at a time, takes about {in_words(needed)}, "
            f"{in_words(limit)} is allowed: raise --max-memory, or free memory"
        )


def split_passes(groups: Sequence[ScalingGroup], evaluations: int, disk: int) -> tuple[tuple[ScalingGroup, ...], ...]:
    """Layers whose captured inputs fit on the disk together; at least one group at a time."""
    passes: list[list[ScalingGroup]] = []
    used = 0
    for group in groups:
        size = _captured(group, evaluations)
        if not passes or used + size > disk:
            passes.append([])
            used = 0
        passes[-1].append(group)
        used += size
    return tuple(tuple(chosen) for chosen in passes)


def _captured(group: ScalingGroup, evaluations: int) -> int:
    return sum(capture_bytes(spec, evaluations) for spec in group)


def _disk_limit(resources: Resources, work: Path) -> int:
    existing = next(folder for folder in (work, *work.resolve().parents) if folder.is_dir())
    return resources.disk or (shutil.disk_usage(existing).free + WorkFolder(work).raw_bytes()) // 2


def _workers(resources: Resources, room: float, fit: int, seconds: float) -> int:
    """Processes that fit layers at once: those asked for, the cores, what the memory takes, one if it does not pay."""
    if resources.device.type != "cpu" or (resources.workers is None and seconds < WORTH_WORKERS):
        return 1
    cores = max(1, len(os.sched_getaffinity(0)) // processes_here())
    return max(1, min(resources.workers or cores, int(room // (fit + WORKER_BYTES)) if room < math.inf else cores))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
