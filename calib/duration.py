"""Seconds a calibration takes, extrapolated from one evaluation of the model and a moment of one layer's fit."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from calib.adaround import BATCH
from calib.capture import Extrema, LayerInputs, columns_of, patch_rows
from calib.fit import LOOKED_AT, LOOKED_OUTPUTS, FloatLayer, equivalent_scaling, fit_layer
from calib.footprint import evaluate_zeros
from calib.les import OUTPUTS
from calib.model import SourceModel
from calib.recipe import Recipe
from calib.replay import WARM_UP
from calib.rounding import CHUNK
from calib.sensitivity import SAMPLES, STEPS
from calib.trajectories import Conditioning
from calib.workers import one_thread
from dmq_export.layer import LayerSpec

PROBE_COLUMNS = 1200
PROBE_ITERATIONS = {"cpu": (1, 8), "cuda": (WARM_UP + 1, 60)}  # of a short fit, and how many more in a longer one
CLIPPING = 16  # how often about clipping and the report multiply what they look at
TIMED, LONG = 3, 2.0


def evaluation_seconds(source: SourceModel, told: Conditioning, batch: int) -> float:
    """Seconds a sample takes, ``batch`` at a time: the best of three, or the first if that takes long."""
    best = math.inf
    for _ in range(TIMED):
        start = time.perf_counter()
        evaluate_zeros(source, told, batch)
        best = min(best, time.perf_counter() - start)
        if best > LONG:
            break
    return best / batch


def stage_seconds(
    evaluation: float, rows: int, recipe: Recipe, passes: int, layers: int, fits: float
) -> dict[str, float]:
    """By stage.

    Args:
        evaluation: seconds of evaluating one sample.
        rows: samples, twice with guidance.
        layers: to fit.
        fits: seconds of all layers' fits.
    """
    branches = rows // recipe.samples
    estimates = {
        "trajectories": (recipe.samples + recipe.check_samples) * branches * recipe.steps * evaluation,
        "layer inputs": passes * rows * recipe.steps * evaluation * 1.2,
        "layer fits": fits,
        "check": 3 * recipe.check_samples * branches * recipe.steps * evaluation * 1.3,
    }
    if recipe.sensitive_share:
        estimates["sensitivity"] = layers * SAMPLES * min(STEPS, recipe.steps) * evaluation * 1.3
        estimates["layer inputs"] *= 2
        estimates["layer fits"] *= 1 + recipe.sensitive_share
    if recipe.pts_layers != "none":
        estimates["PTS votes"] = rows * recipe.steps * evaluation * 1.2
    if recipe.rounding == "adaround":
        # every iteration runs one block forth and back, some evaluations at a time; all blocks make up the network
        estimates["AdaRound"] = BATCH * recipe.round_iterations * evaluation * 3
    return estimates


def fit_seconds(source: SourceModel, specs: Sequence[LayerSpec], recipe: Recipe) -> list[float]:
    """Per layer, from short fits of a narrow and a wide one of them on random numbers."""
    narrow = min(specs, key=columns_of)
    wide = max((spec for spec in specs if columns_of(spec) <= PROBE_COLUMNS), key=columns_of, default=narrow)
    probes = {spec: _probe(source, spec, recipe) for spec in (narrow, wide)}
    iteration = _line([(_iteration_numbers(spec, recipe), seconds) for spec, (seconds, _) in probes.items()])
    rest = _line([(_rounding_operations(spec), seconds) for spec, (_, seconds) in probes.items()])
    return [
        recipe.les_iterations * iteration(_iteration_numbers(spec, recipe)) + rest(_rounding_operations(spec))
        for spec in specs
    ]


def _line(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Through two points, rising from no less than zero; through zero and the last point where they say otherwise."""
    (x, y), (far, high) = points[0], points[-1]
    slope = (high - y) / (far - x) if far > x else 0.0
    if slope <= 0 or y < slope * x:
        return lambda at: at * high / far
    return lambda at: y + slope * (at - x)


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
        once, anew = replace(recipe, les_iterations=iterations), replace(inputs)  # which has no moments yet
        start = time.perf_counter()
        fit_layer(layer, anew, once, equivalent_scaling([layer], anew, once))
        return time.perf_counter() - start

    with one_thread(weight.device):
        few, more = PROBE_ITERATIONS[weight.device.type]
        least = min(recipe.les_iterations, few)  # without any, the gain of learned rounding is not estimated either
        fit(least)  # the first time is slower
        short = fit(least)
        iteration = max(fit(least + more) - short, 0.0) / more
        return iteration, max(short - least * iteration, 0.0)


def _iteration_numbers(spec: LayerSpec, recipe: Recipe) -> int:
    """What an LES iteration goes through: patches and weights."""
    return columns_of(spec) * (spec.groups * recipe.les_batch + min(spec.out_channels, OUTPUTS))


def _rounding_operations(spec: LayerSpec) -> int:
    """What rounding a layer takes: moments, factors, the columns one by one; and what clipping looks at."""
    columns = columns_of(spec)
    chunk = min(columns, CHUNK)
    rounding = spec.groups * columns * chunk * (patch_rows(spec) + chunk + 3 * spec.out_channels)
    return rounding + CLIPPING * LOOKED_AT * min(spec.out_channels, LOOKED_OUTPUTS)
