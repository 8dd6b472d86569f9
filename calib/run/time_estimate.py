"""Seconds a calibration takes, extrapolated from one evaluation of the model and a moment of one layer's fit."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from calib.fit.adaround import adaround_evaluations
from calib.fit.cuda_graph import WARM_UP_CALLS
from calib.fit.layer import LayerWeights, equivalent_scaling, fit_layer, fit_nanoseconds
from calib.fit.les import les_numbers
from calib.fit.mixed_precision import sensitivity_evaluations
from calib.model.load import SourceModel
from calib.record.conditioning import Conditioning
from calib.record.layer_inputs import Extrema, LayerInputs, columns_of, patch_rows
from calib.run.memory_estimate import evaluate_zeros
from calib.run.workers import one_thread
from dmq_export.layer import LayerSpec
from dmq_export.recipe import Recipe

PROBE_COLUMNS = 1200
PROBE_ITERATIONS = {"cpu": (1, 8), "cuda": (WARM_UP_CALLS + 1, 60)}  # of a short fit, and how many more in a longer one
CAPTURED = {"cpu": 2e8, "cuda": 1e9}  # bytes of patches that are gathered and written in a second
TIMED, LONG = 3, 2.0


def evaluation_seconds(source: SourceModel, conditioning: Conditioning, batch: int) -> float:
    """Seconds a sample takes, ``batch`` at a time, or as many as :data:`LONG` seconds take.

    What takes a sample so long keeps the processor busy, so that more at once are hardly faster each.
    """
    device = next(source.network.parameters()).device
    alone = _best_seconds(partial(evaluate_zeros, source, conditioning, 1), device)
    at_once = min(batch, int(LONG / alone))
    if at_once <= 1:
        return alone
    return _best_seconds(partial(evaluate_zeros, source, conditioning, at_once), device) / at_once


def stage_seconds(
    evaluation: float, rows: int, recipe: Recipe, passes: int, layers: int, capture: float, fits: float
) -> dict[str, float]:
    """By stage.

    Args:
        evaluation: seconds of evaluating one sample.
        rows: samples, twice with guidance.
        layers: to fit.
        capture: seconds of gathering and writing their inputs.
        fits: seconds of all layers' fits.
    """
    branches = rows // recipe.samples
    one_pass = rows * recipe.steps * evaluation * 1.2 + capture / passes
    further = passes - 1 + bool(recipe.sensitive_share)
    estimates = {
        "trajectories": one_pass,  # which capture the first pass's layer inputs
        "layer fits": fits,
        "held-out trajectories": recipe.check_samples * branches * recipe.steps * evaluation,
        "check": 3 * recipe.check_samples * branches * recipe.steps * evaluation * 1.3,
    }
    if further:
        estimates["layer inputs"] = further * one_pass
    if recipe.sensitive_share:
        estimates["sensitivity"] = sensitivity_evaluations(layers, recipe.steps) * evaluation
        estimates["layer fits"] *= 1 + recipe.sensitive_share
    if recipe.pts_layers != "none":
        voting = min(recipe.pts_samples, recipe.samples) * branches
        estimates["PTS votes"] = voting * recipe.steps * evaluation * 1.2
    if recipe.rounding == "adaround":
        estimates["AdaRound"] = adaround_evaluations(recipe.round_iterations) * evaluation
    return estimates


def fit_seconds(source: SourceModel, specs: Sequence[LayerSpec], recipe: Recipe) -> list[float]:
    """Per layer, from short fits of a narrow and a wide one of them on random numbers."""
    narrow = min(specs, key=columns_of)
    wide = max((spec for spec in specs if columns_of(spec) <= PROBE_COLUMNS), key=columns_of, default=narrow)
    probes = {spec: _probe(source, spec, recipe) for spec in (narrow, wide)}
    iteration = _line([(les_numbers(spec, recipe.les_batch), seconds) for spec, (seconds, _) in probes.items()])
    rest = _line([(fit_nanoseconds(spec, clip=False), seconds) for spec, (_, seconds) in probes.items()])
    return [
        recipe.les_iterations * iteration(les_numbers(spec, recipe.les_batch))
        + rest(fit_nanoseconds(spec, clip=recipe.clip))
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
    """Seconds of one LES iteration; and of the rest of a fit but clipping, which takes as long as the numbers say."""
    weight = source.network.get_submodule(spec.name).get_parameter("weight").detach()
    generator = torch.Generator().manual_seed(0)
    shape = (patch_rows(spec), spec.in_channels, math.prod(spec.kernel))
    patches = torch.rand(shape, generator=generator).to(weight.device) - 0.5
    high = patches.amax((0, 2)).expand(1, recipe.steps, -1)
    step = torch.arange(len(patches), device=weight.device) % recipe.steps
    inputs = LayerInputs(patches, step, Extrema(-high, high))

    layer = LayerWeights(spec, weight, None)
    few, more = PROBE_ITERATIONS[weight.device.type]
    least = min(recipe.les_iterations, few)  # without any, the gain of learned rounding is not estimated either

    def scaling(iterations: int) -> None:
        equivalent_scaling([layer], inputs, replace(recipe, les_iterations=iterations, les_rounding_gain=False))

    def fit() -> None:
        once, anew = replace(recipe, les_iterations=least, clip=False), replace(inputs)  # which has no moments yet
        fit_layer(layer, anew, once, equivalent_scaling([layer], anew, once))

    with one_thread(weight.device):
        short, long = (_best_seconds(partial(scaling, count), weight.device) for count in (few, few + more))
        iteration = max(long - short, 0.0) / more
        return iteration, max(_best_seconds(fit, weight.device) - least * iteration, 0.0)


def _best_seconds(function: Callable[[], object], device: torch.device) -> float:
    """The best of a few runs, since the first is slower and other processes come in between; a long one will do."""
    best = math.inf
    if device.type == "cuda":
        _finish(function, device)  # compiles kernels and loads libraries, which takes longer than what is timed
    for _ in range(TIMED):
        start = time.perf_counter()
        _finish(function, device)
        best = min(best, time.perf_counter() - start)
        if best > LONG:
            break
    return best


def _finish(function: Callable[[], object], device: torch.device) -> None:
    """Run, and on a GPU wait for what was started."""
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
