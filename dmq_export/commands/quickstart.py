"""``dmq-export quickstart``: the whole road on the bundled model, with the figures to judge it by."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dmq_export.bits import Bits
from dmq_export.checkpoint import Checkpoint
from dmq_export.commands.engine import float_engine, open_engine
from dmq_export.commands.export import Export, export_onnx
from dmq_export.commands.sampler import Samples, SampleSettings, draw_samples
from dmq_export.common.bundled import BUNDLED
from dmq_export.common.extras import require
from dmq_export.common.files import make_folder
from dmq_export.common.memory import peak_memory
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.recipe import recipe_from

MODEL = "digits"
NO_LABEL = 10  # the bundled model's label for "any digit"
VARIANTS = ("w4a8", "w4a6")
SHOWN = 20  # samples in the picture


@dataclass(frozen=True)
class Row:
    """One line of the result.

    Attributes:
        layer_bytes: of the layers that are quantized.
        sqnr_mean, sqnr_worst: over the steps, of the noise prediction, in dB; None for the float model.
        psnr: of the final samples against the float model's from the same noise, in dB.
        agreement: share of samples that the classifier takes for the digit asked for.
    """

    name: str
    layer_bytes: int
    sqnr_mean: float | None
    sqnr_worst: float | None
    psnr: float | None
    agreement: float


@dataclass(frozen=True)
class Quickstart:
    """The result; ``seconds`` per variant and stage, ``peak_memory`` in bytes."""

    rows: tuple[Row, ...]
    seconds: dict[str, dict[str, float]]
    peak_memory: int
    grid: Path

    def text(self) -> str:
        """Both tables, the memory, and where the picture is."""
        memory = f"peak memory {self.peak_memory / 2**30:.1f} GiB"
        return f"{self.results()}\n\n{self.times()}\n\n{memory}\npictures of all three from the same noise: {self.grid}"

    def results(self) -> str:
        """The rows as a table."""
        header = ("model", "quantized layers", "SQNR mean", "SQNR worst", "PSNR", "label agreement")
        cells = [
            (
                row.name,
                f"{row.layer_bytes / 1024:.0f} KiB",
                _decibels(row.sqnr_mean),
                _decibels(row.sqnr_worst),
                _decibels(row.psnr),
                f"{100 * row.agreement:.1f} %",
            )
            for row in self.rows
        ]
        return table(header, cells, right=range(1, len(header)))

    def times(self) -> str:
        """Seconds as a table, one column per variant."""
        stages = dict.fromkeys(stage for stages in self.seconds.values() for stage in stages)
        cells = [
            (stage, *(f"{taken[stage]:.1f}" if stage in taken else "" for taken in self.seconds.values()))
            for stage in stages
        ]
        totals = ("total", *(f"{sum(taken.values()):.1f}" for taken in self.seconds.values()))
        header = ("seconds", *self.seconds)
        return table(header, [*cells, totals], right=range(1, len(header)))


def quickstart(folder: Path, progress: Progress, *, count: int = 400, seed: int = 0) -> Quickstart:
    """Calibrate, export and sample the bundled model at W4A8 and W4A6 into ``folder``.

    Args:
        count: samples drawn per variant, to count label agreement on.

    Raises:
        DmqError: a library is missing, or the folder cannot be written.
    """
    from dmq_export.sampling.images import psnr, save_grid

    require("quickstart", "torch", "diffusers", "onnxscript", "onnxruntime")
    make_folder(folder)
    settings = SampleSettings(count=count, seed=seed, null_label=NO_LABEL, batch=64)
    rows: list[Row] = []
    seconds: dict[str, dict[str, float]] = {}
    samples: dict[str, Samples] = {}
    for name in VARIANTS:
        stages = progress.restarted()
        checkpoint, export = _make(folder, name, seed, stages)
        engine = open_engine(export.path)
        if not samples:
            float_stages = progress.restarted()
            samples["float"] = draw_samples(float_engine(MODEL, engine), settings, float_stages)
            seconds["float"] = float_stages.seconds
            rows.append(Row("float", export.float32_bytes, None, None, None, _agreement(samples["float"])))
        samples[name] = draw_samples(engine, settings, stages)
        seconds[name] = stages.seconds
        sqnr = checkpoint.metrics["prediction_sqnr_db"]["both"]
        quality = (float(np.mean(sqnr)), min(sqnr), psnr(samples["float"], samples[name]))
        rows.append(Row(name, export.quantized_bytes, *quality, _agreement(samples[name])))
    grid = folder / "samples.png"
    save_grid({name: drawn[:SHOWN] for name, drawn in samples.items()}, grid)
    return Quickstart(tuple(rows), seconds, peak_memory(), grid)


def _make(folder: Path, name: str, seed: int, progress: Progress) -> tuple[Checkpoint, Export]:
    """Calibrate and export one variant."""
    import torch

    from calib.calibrate import calibrate
    from calib.run.plan import Resources

    recipe = recipe_from("fast", bits=Bits.parse(name), null_label=NO_LABEL, seed=seed)
    resources = Resources(torch.device("cpu"))
    checkpoint = calibrate(BUNDLED / MODEL, folder / name, recipe, resources, progress, fresh=True)
    return checkpoint, export_onnx(folder / name, folder / f"{name}.onnx", progress)


def _agreement(samples: Samples) -> float:
    """Share of samples in which the classifier sees the digit asked for; labels cycle through 0..9."""
    from engines.onnxruntime import OnnxSession

    classifier = OnnxSession(BUNDLED / MODEL / "classifier.onnx")
    (scores,) = classifier.run({"image": samples.clip(-1, 1)}).values()
    wanted = np.arange(len(samples)) % NO_LABEL
    return float((scores.argmax(1) == wanted).mean())


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"
