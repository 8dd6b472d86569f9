"""``dmq-export calibrate``: from a diffusers folder to a DMQ checkpoint."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dmq_export.checkpoint import RUN, Checkpoint, require_place
from dmq_export.commands.prompts import NO_TEXT, Prompting
from dmq_export.common.bundled import model_folder
from dmq_export.common.distributed import Rank
from dmq_export.common.files import read_json
from dmq_export.common.memory import in_words
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.coverage import Coverage
from dmq_export.errors import DmqError, StoppedError
from dmq_export.recipe import PRESETS, Recipe

if TYPE_CHECKING:
    from calib.run.plan import CalibrationPlan, Resources

Device = Literal["auto", "cpu", "cuda"]
WORST_SHOWN = 5
PEAKS = {
    "peak_memory_bytes": "",
    "peak_gpu_memory_bytes": " on the GPU",
    "peak_memory_of_a_worker_bytes": " in a worker",
}


@dataclass(frozen=True)
class Calibration:
    """A written checkpoint, and what it took as its run.json says."""

    folder: Path
    checkpoint: Checkpoint
    run: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        coverage = self.checkpoint.coverage
        return {
            "checkpoint": str(self.folder),
            "quantized": [layer.name for layer in coverage.quantized],
            "float": {layer.name: layer.reason for layer in coverage.float_layers},
            "prediction_sqnr_db": self.checkpoint.metrics["prediction_sqnr_db"],
            "seconds": self.run["seconds"],
            **{key: self.run[key] for key in PEAKS if key in self.run},
        }

    def text(self) -> str:
        """The coverage of every layer, then the quality, the worst layers and the time."""
        coverage = self.checkpoint.coverage
        return "\n\n".join(
            [
                coverage.table(),
                self._quality(),
                self._worst_layers(),
                self._cost(),
                f"{coverage.summary()}\n{self.folder} written",
            ]
        )

    def _cost(self) -> str:
        seconds = self.run["seconds"]
        rows = [(stage, f"{taken:.1f}") for stage, taken in seconds.items()]
        times = table(("seconds", ""), [*rows, ("total", f"{sum(seconds.values()):.1f}")], right=(1,))
        peaks = [f"{in_words(self.run[key])}{where}" for key, where in PEAKS.items() if key in self.run]
        return f"{times}\n\npeak memory {', '.join(peaks)}"

    def _quality(self) -> str:
        sqnr = self.checkpoint.metrics["prediction_sqnr_db"]
        rows = [
            (what, f"{sum(sqnr[what]) / len(sqnr[what]):.1f} dB", f"{min(sqnr[what]):.1f} dB")
            for what in ("weights", "activations", "both")
        ]
        return table(("quantized", "SQNR of the prediction, mean", "worst step"), rows, right=(1, 2))

    def _worst_layers(self) -> str:
        layers = self.checkpoint.metrics["layers"]
        worst = sorted(layers, key=lambda name: layers[name]["output_db"])[:WORST_SHOWN]
        columns = ("output_db", "weights_db", "activations_db")
        rows = [(name, *(f"{layers[name][column]:.1f} dB" for column in columns)) for name in worst]
        return table(("worst layers", "output SQNR", "weights alone", "activations alone"), rows, right=(1, 2, 3))


@dataclass(frozen=True)
class Means:
    """What a calibration may use, and where it says what it does.

    Attributes:
        device: to calibrate on.
        memory: bytes; None for what is free.
        workers: processes that fit layers on the CPU; None for as many as there are cores, where it pays.
        log: file for a line of JSON per event.
    """

    device: Device = "auto"
    memory: int | None = None
    workers: int | None = None
    log: Path | None = None

    def resources(self) -> Resources:
        """The same for the calibrator.

        Raises:
            DmqError: ``cuda`` was asked for and is not there.
        """
        from calib.run.plan import Resources

        return Resources(choose_device(self.device), memory=self.memory, workers=self.workers)


@dataclass(frozen=True)
class PlannedCalibration:
    """What would be quantized, and what that would take."""

    coverage: Coverage
    plan: CalibrationPlan

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        return {
            "quantized": [layer.name for layer in self.coverage.quantized],
            "float": {layer.name: layer.reason for layer in self.coverage.float_layers},
            **self.plan.to_json(),
        }

    def text(self) -> str:
        """The coverage of every layer, then the plan."""
        return "\n\n".join([self.coverage.table(), self.coverage.summary(), self.plan.text()])


def calibrate_model(
    model: str | Path,
    output: str | Path,
    recipe: Recipe = PRESETS["balanced"],
    means: Means = Means(),
    prompting: Prompting = NO_TEXT,
    *,
    strict: bool = False,
    fresh: bool = False,
) -> Calibration:
    """Calibrate ``model`` and write the checkpoint to the folder ``output``.

    A calibration that was stopped goes on where it was when the same is asked for again.

    Args:
        model: a diffusers folder, or the name of a bundled model.
        prompting: where the prompts of a model come from that takes text.
        strict: refuse a model with layers that cannot be quantized.
        fresh: replace what is at ``output``, and start over.

    Raises:
        DmqError: bad input, and nothing is written then; or the user stopped it, and the same goes on.
    """
    from calib.calibrate import calibrate, work_folder

    folder, output = model_folder(str(model)), Path(output)
    progress, resources = Progress(log=means.log), means.resources()
    require_place(output, replace_existing=fresh)  # before any prompt is encoded
    recipe = _with_prompts(recipe, folder, prompting, resources, progress)
    try:
        checkpoint = calibrate(folder, output, recipe, resources, progress, strict=strict, fresh=fresh)
    except KeyboardInterrupt as error:
        kept = work_folder(output)
        rest = f"what is finished is in {kept}, the same command goes on" if kept.exists() else "nothing is finished"
        raise StoppedError(f"interrupted: {rest}") from error
    return Calibration(output, checkpoint, read_json(output / RUN))


def plan_model(
    model: str | Path,
    output: str | Path,
    recipe: Recipe = PRESETS["balanced"],
    means: Means = Means(),
    prompting: Prompting = NO_TEXT,
    *,
    strict: bool = False,
    fresh: bool = False,
) -> PlannedCalibration:
    """What :func:`calibrate_model` would do; nothing is written.

    Raises:
        DmqError: as :func:`calibrate_model`, as far as can be seen beforehand.
    """
    from calib.calibrate import planned

    folder, output = model_folder(str(model)), Path(output)
    progress, resources = Progress(log=means.log), means.resources()
    require_place(output, replace_existing=fresh)
    recipe = _with_prompts(recipe, folder, prompting, resources, progress)
    selection, plan = planned(folder, output, recipe, resources, progress, strict=strict, fresh=fresh)
    return PlannedCalibration(selection.coverage, plan)


def _with_prompts(
    recipe: Recipe, folder: Path, prompting: Prompting, resources: Resources, progress: Progress
) -> Recipe:
    """The recipe with the embeddings of what is to be drawn.

    Raises:
        DmqError: the text is not what the model needs.
    """
    embeddings = prompting.encoded(
        folder,
        progress,
        guidance_scale=recipe.guidance_scale,
        device=resources.device,
        sample_size=recipe.sample_size,
    )
    recipe = recipe if embeddings is None else replace(recipe, embeddings=embeddings)
    if recipe.shares_prompts and not Rank.of(os.environ).index:
        progress.tell(
            f"no more prompts than the {recipe.samples} samples: the check draws them again, from other noise"
        )
    return recipe


def choose_device(device: Device) -> Any:
    """The torch device; ``auto`` is CUDA where there is one.

    Raises:
        DmqError: ``cuda`` was asked for and is not there.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DmqError(f"PyTorch {torch.__version__} sees no CUDA device: use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
