"""``dmq-export quickstart``: the whole road on the bundled model, with the figures to judge it by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dmq_export.batch import Batch
from dmq_export.bits import Bits
from dmq_export.checkpoint import Checkpoint
from dmq_export.commands.engine import float_engine, open_engine
from dmq_export.commands.export import Export, export_onnx
from dmq_export.commands.sampler import Samples, SampleSettings, draw_samples
from dmq_export.commands.trt_build import Order, build_engine
from dmq_export.common.bundled import BUNDLED
from dmq_export.common.extras import require
from dmq_export.common.files import make_folder
from dmq_export.common.memory import peak_memory
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.errors import DmqError
from dmq_export.recipe import recipe_from

if TYPE_CHECKING:
    from engines.tensorrt.summary import KernelSummary

MODEL = "digits"
NO_LABEL = 10  # the bundled model's label for "any digit"
VARIANTS = ("w4a8", "w4a6")
SHOWN = 20  # samples in the picture
ENGINE_BATCH = Batch(8, 8, 8)  # of the engines: one size, so that the bytes they move are known


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
    """The result.

    Attributes:
        seconds: by variant and stage.
        peak_memory: in bytes.
        engines: what NVIDIA's compiler made of each variant, and of the float16 network; none where it is not here.
        compiler: its name and version, or why there are no engines.
    """

    rows: tuple[Row, ...]
    seconds: dict[str, dict[str, float]]
    peak_memory: int
    grid: Path
    engines: dict[str, KernelSummary]
    compiler: str

    def text(self) -> str:
        """All tables, the memory, and where the picture is."""
        memory = f"peak memory {self.peak_memory / 2**30:.1f} GiB"
        pictures = f"pictures of all three from the same noise: {self.grid}"
        return "\n\n".join([self.results(), self.made(), self.times(), f"{memory}\n{pictures}"])

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

    def made(self) -> str:
        """What the compiler made of the variants, as a table."""
        if not self.engines:
            return f"no engine was built: {self.compiler}"
        from engines.tensorrt.summary import figures_table

        return f"engines, built by {self.compiler}\n\n{figures_table(self.engines)}"

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
    stages = {name: progress.restarted() for name in ("float", *VARIANTS)}
    rows: list[Row] = []
    samples: dict[str, Samples] = {}
    for name in VARIANTS:
        checkpoint, export = _make(folder, name, seed, stages[name])
        engine = open_engine(export.path)
        if not samples:
            samples["float"] = draw_samples(float_engine(MODEL, engine), settings, stages["float"])
            rows.append(Row("float", export.float32_bytes, None, None, None, _agreement(samples["float"])))
        samples[name] = draw_samples(engine, settings, stages[name])
        sqnr = checkpoint.metrics["prediction_sqnr_db"]["both"]
        quality = (float(np.mean(sqnr)), min(sqnr), psnr(samples["float"], samples[name]))
        rows.append(Row(name, export.quantized_bytes, *quality, _agreement(samples[name])))
    engines, compiler = _engines(folder, stages)
    grid = folder / "samples.png"
    save_grid({name: drawn[:SHOWN] for name, drawn in samples.items()}, grid)
    seconds = {name: each.seconds for name, each in stages.items()}
    return Quickstart(tuple(rows), seconds, peak_memory(), grid, engines, compiler)


def _make(folder: Path, name: str, seed: int, progress: Progress) -> tuple[Checkpoint, Export]:
    """Calibrate and export one variant."""
    import torch

    from calib.calibrate import calibrate
    from calib.run.plan import Resources

    recipe = recipe_from("fast", bits=Bits.parse(name), null_label=NO_LABEL, seed=seed)
    resources = Resources(torch.device("cpu"))
    checkpoint = calibrate(BUNDLED / MODEL, folder / name, recipe, resources, progress, fresh=True)
    return checkpoint, export_onnx(folder / name, folder / f"{name}.onnx", progress)


def _engines(folder: Path, stages: Mapping[str, Progress]) -> tuple[dict[str, KernelSummary], str]:
    """Engines of all variants for RTX GPUs, and what built them; or none, and why there is none."""
    from engines.tensorrt.build import BuildSettings
    from engines.tensorrt.rtx_build import require_rtx

    try:
        require_rtx()
    except DmqError as error:
        return {}, str(error)
    engines: dict[str, KernelSummary] = {}
    compiler, order = "", Order(runtime="tensorrt-rtx", beside_float16=True)
    for name in VARIANTS:
        onnx = folder / f"{name}-tensorrt.onnx"
        export_onnx(folder / name, onnx, stages[name], target="tensorrt", dtype="float16", batch=ENGINE_BATCH)
        plan = folder / f"{name}.plan"
        metadata = build_engine(onnx, plan, order, BuildSettings(), stages[name], lambda _: None).metadata
        assert metadata.kernels is not None
        assert metadata.float16 is not None
        compiler, engines[name] = metadata.machine.title, metadata.kernels
        float16 = metadata.float16
    return engines | {"plain float16": float16}, compiler


def _agreement(samples: Samples) -> float:
    """Share of samples in which the classifier sees the digit asked for; labels cycle through 0..9."""
    from engines.onnxruntime import OnnxSession

    classifier = OnnxSession(BUNDLED / MODEL / "classifier.onnx")
    (scores,) = classifier.run({"image": samples.clip(-1, 1)}).values()
    wanted = np.arange(len(samples)) % NO_LABEL
    return float((scores.argmax(1) == wanted).mean())


def _decibels(value: float | None) -> str:
    return "" if value is None else f"{value:.1f} dB"
