"""What each element of the method is worth on the bundled model.

    python bench/ablation.py                           # three seeds, some hours on one core
    python bench/ablation.py --seeds 1 --only climbing # about 8 minutes

Prints, for every recipe, the SQNR of the noise prediction (mean over steps, and worst step) on held-out
trajectories and the PSNR of final samples against float, as mean +- standard deviation over the seeds. The first
table climbs from min-max quantization to the method as published, with the default below; the second takes one
element away from the default, or swaps it. Seeds change the calibration set and everything drawn from it; the
held-out set changes with them.

Recipes that differ only after learned equivalent scaling share its fits, which are the same for all of them.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

import calib.fit.layer
from calib.calibrate import calibrated
from calib.fit.les import LesResult, LesSettings, fit_les
from calib.model.denoiser import fake_quantized_denoiser
from calib.model.layers import select_layers
from calib.model.load import SourceModel, load_model
from calib.record.layer_inputs import LayerInputs
from calib.run.plan import Resources
from dmq_export.bits import Bits
from dmq_export.checkpoint import Checkpoint
from dmq_export.commands.engine import Engine, float_engine
from dmq_export.commands.sampler import SampleSettings, draw_samples
from dmq_export.common.bundled import BUNDLED
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.layer import LayerSpec
from dmq_export.metadata import export_metadata, metadata_from_json
from dmq_export.recipe import Recipe, recipe_from
from dmq_export.sampling.images import psnr

NO_LABEL = 10
PICTURES = 64

DEFAULT = replace(recipe_from("fast"), null_label=NO_LABEL, check_samples=32)
MIN_MAX = replace(DEFAULT, weight_grid=False, les_iterations=0, clip=False, pts_layers="none", rounding="nearest")
GRID = replace(MIN_MAX, weight_grid=True)
LES = replace(GRID, les_iterations=DEFAULT.les_iterations, timestep_alpha=0.0)
WEIGHTED = replace(LES, timestep_alpha=20.0)
PTS = replace(WEIGHTED, pts_layers="skip")
GPTQ = replace(PTS, rounding="gptq")
ADAROUND = replace(PTS, rounding="adaround", round_iterations=600)

LADDER = {
    "min-max, round to nearest": MIN_MAX,
    "+ weight grid": GRID,
    "+ LES": LES,
    "+ timestep weighting (alpha 20)": WEIGHTED,
    "+ PTS on shortcuts": PTS,
    "+ second-order rounding": GPTQ,
    "+ AdaRound after it": ADAROUND,
    "default: no weighting, no AdaRound, clipped ranges": DEFAULT,
}
VARIATIONS = {
    "default": DEFAULT,
    "without the weight grid": replace(DEFAULT, weight_grid=False),
    "without LES": replace(DEFAULT, les_iterations=0),
    "LES longer (500 iterations of 256)": replace(DEFAULT, les_iterations=500, les_batch=256),
    "queries, keys, values scaled apart": replace(DEFAULT, les_joint=False),
    "with timestep weighting (alpha 20)": replace(DEFAULT, timestep_alpha=20.0),
    "without clipping": replace(DEFAULT, clip=False),
    "without PTS": replace(DEFAULT, pts_layers="none"),
    "PTS on all layers": replace(DEFAULT, pts_layers="all"),
    "round to nearest": replace(DEFAULT, rounding="nearest"),
    "with AdaRound": replace(DEFAULT, rounding="adaround", round_iterations=600),
    "w7a8 for 2 % of the weights": replace(DEFAULT, sensitive_share=0.02),
    "w7a8 for 5 % of the weights": replace(DEFAULT, sensitive_share=0.05),
    "w7a8 for 10 % of the weights": replace(DEFAULT, sensitive_share=0.1),
    "static activation ranges": replace(DEFAULT, scales="static"),
    "symmetric activations": replace(DEFAULT, scheme="symmetric"),
}
TABLES = {"climbing": LADDER, "changed": VARIATIONS}


@dataclass(frozen=True)
class Task:
    """All recipes of some tables at one bit width and seed; of ``rows`` those whose names contain one of them."""

    bits: Bits
    seed: int
    tables: tuple[str, ...]
    rows: tuple[str, ...]

    def recipes(self, title: str) -> dict[str, Recipe]:
        """Those of one table."""
        return {name: recipe for name, recipe in TABLES[title].items() if any(row in name for row in self.rows)}


@dataclass(frozen=True)
class Score:
    """Its quality in dB."""

    sqnr_mean: float
    sqnr_worst: float
    psnr: float


def scores_of(task: Task) -> dict[str, Score]:
    """Every recipe, one after the other."""
    torch.set_num_threads(1)
    source = load_model(BUNDLED / "digits", torch.device("cpu"))
    calib.fit.layer.fit_les = remembering(fit_les)  # type: ignore[attr-defined]
    recipes = {name: recipe for title in task.tables for name, recipe in task.recipes(title).items()}
    scores = {}
    for name, recipe in recipes.items():
        scores[name] = score(source, replace(recipe, bits=task.bits, seed=task.seed))
        print(f"{task.bits} seed {task.seed} {name}: {scores[name]}", file=sys.stderr, flush=True)
    return scores


def remembering(fit: Callable[..., LesResult]) -> Callable[..., LesResult]:
    """``fit_les`` that fits the same layer with the same settings only once."""
    known: dict[tuple[object, ...], LesResult] = {}

    def remembered(
        spec: LayerSpec, weight: torch.Tensor, inputs: LayerInputs, settings: LesSettings, **options: object
    ) -> LesResult:
        key = (spec, settings, *sorted(options.items()))
        if key not in known:
            known[key] = fit(spec, weight, inputs, settings, **options)
        return known[key]

    return remembered


def score(source: SourceModel, recipe: Recipe) -> Score:
    """Calibrate and measure."""
    selection = select_layers(source, recipe.bits, recipe.scheme, recipe.float_layers)
    checkpoint = calibrated(source, selection, recipe, Resources(torch.device("cpu"), workers=1), Progress(show=False))
    sqnr = checkpoint.metrics["prediction_sqnr_db"]["both"]
    expected, drawn = _pictures(checkpoint)
    return Score(float(np.mean(sqnr)), min(sqnr), psnr(expected, drawn))


def _pictures(checkpoint: Checkpoint) -> Iterator[np.ndarray]:
    """Final samples of the float model and of the reference from the same noise."""
    metadata = metadata_from_json(export_metadata(checkpoint, "reference"))
    reference = Engine("reference", "torch", fake_quantized_denoiser(checkpoint, torch.device("cpu")), metadata)
    settings = SampleSettings(count=PICTURES, seed=1000 + checkpoint.recipe["seed"], null_label=NO_LABEL, batch=64)
    for engine in (float_engine("digits", reference), reference):
        yield draw_samples(engine, settings, Progress(show=False))


def show(title: str, scores: dict[str, list[Score]]) -> None:
    """One table."""
    columns = ("sqnr_mean", "sqnr_worst", "psnr")
    rows = [(name, *(_spread([getattr(s, c) for s in of_seeds]) for c in columns)) for name, of_seeds in scores.items()]
    print("\n" + table((title, "SQNR mean", "SQNR worst step", "PSNR"), rows, right=(1, 2, 3)), flush=True)


def _spread(values: Sequence[float]) -> str:
    return f"{np.mean(values):.2f} +- {np.std(values, ddof=1):.2f}" if len(values) > 1 else f"{values[0]:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bits", nargs="+", default=["w4a8", "w4a6"])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", nargs="+", default=[""], help="only rows whose names contain one of these")
    parser.add_argument("--only", choices=list(TABLES), help="one of the two tables")
    options = parser.parse_args()
    tables = tuple(TABLES) if options.only is None else (options.only,)
    rows = tuple(options.rows)
    tasks = [Task(Bits.parse(bits), seed, tables, rows) for bits in options.bits for seed in range(options.seeds)]
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        results = pool.imap(scores_of, tasks)
        for bits in options.bits:
            of_seeds = [next(results) for _ in range(options.seeds)]
            for title in tables:
                names = Task(Bits.parse(bits), 0, tables, rows).recipes(title)
                show(f"{bits}, {title}", {name: [scores[name] for scores in of_seeds] for name in names})


if __name__ == "__main__":
    main()
