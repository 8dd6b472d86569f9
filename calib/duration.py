"""Seconds a calibration takes, extrapolated from one evaluation of the model and a moment of one layer's fit."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import torch

from calib.capture import Extrema, LayerInputs, columns_of, patch_rows
from calib.fit import FloatLayer, equivalent_scaling, fit_layer
from calib.footprint import evaluate_zeros
from calib.les import OUTPUTS
from calib.model import SourceModel
from calib.recipe import Recipe
from calib.rounding import CHUNK
from calib.sensitivity import SAMPLES, STEPS
from calib.trajectories import Conditioning
from calib.workers import one_thread
from dmq_export.layer import LayerSpec

PROBE_COLUMNS, PROBE_ITERATIONS = 1200, 8
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
        # every iteration runs one block forth and back, 32 evaluations at a time; all blocks make up the network
        estimates["AdaRound"] = 32 * recipe.round_iterations * evaluation * 3
    return estimates


def fit_seconds(source: SourceModel, specs: Sequence[LayerSpec], recipe: Recipe, evaluations: int) -> list[float]:
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
