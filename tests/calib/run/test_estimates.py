"""What a calibration of the bundled model is estimated to take, on a machine that is made up: the formulas' numbers."""

from dataclasses import asdict, replace

import pytest
import torch

import calib.device
import calib.run.time_estimate
from calib.model.layers import LayerSelection, select_layers
from calib.model.load import SourceModel, load_model
from calib.record.conditioning import recipe_conditioning
from calib.run.memory_estimate import estimate_memory
from calib.run.time_estimate import fit_seconds, stage_seconds
from dmq_export.common.bundled import model_folder
from dmq_export.layer import LayerSpec
from dmq_export.recipe import Recipe, recipe_from

CPU = torch.device("cpu")
BALANCED = recipe_from("balanced")
ADAROUND = replace(BALANCED, rounding="adaround", round_iterations=100, sensitive_share=0.1, clip=False)


@pytest.fixture(scope="module")
def digits() -> SourceModel:
    return load_model(model_folder("digits"), CPU)


@pytest.fixture(scope="module")
def selection(digits: SourceModel) -> LayerSelection:
    return select_layers(digits, BALANCED.bits, BALANCED.scheme, ())


@pytest.mark.parametrize(
    ("recipe", "calls", "block"),
    [(BALANCED, 0, 0), (ADAROUND, 987_033_600, 40_337_408)],
    ids=["balanced", "adaround"],
)
def test_the_bytes_of_the_bundled_model(
    digits: SourceModel,
    selection: LayerSelection,
    recipe: Recipe,
    calls: int,
    block: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(calib.device, "current_memory", lambda: 10**9)
    bytes_held = asdict(estimate_memory(digits, selection, recipe, recipe_conditioning(digits, recipe, 1)))
    activations = bytes_held.pop("sample")  # depends on how diffusers cuts the network into modules
    assert activations == pytest.approx(788_352, rel=0.1)
    assert bytes_held == {
        "fixed": 10**9 + 11_141_120,
        "check": 2_067_200,
        "waiting": 0,
        "fit": 142_508_032,
        "calls": calls,
        "block": block,
    }


@pytest.mark.parametrize(
    ("recipe", "fits", "stages"),
    [
        (BALANCED, 145.88819756076336, {"layer inputs": 62.94}),
        (
            ADAROUND,
            138.70917573730677,
            {"layer inputs": 125.88, "layer fits": 152.580093311, "sensitivity": 15.86, "AdaRound": 96.0},
        ),
    ],
    ids=["balanced", "adaround"],
)
def test_the_seconds_of_the_bundled_model(
    digits: SourceModel,
    selection: LayerSelection,
    recipe: Recipe,
    fits: float,
    stages: dict[str, float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def probe(_: SourceModel, spec: LayerSpec, recipe: Recipe) -> tuple[float, float]:
        return 1e-6 * spec.weight_count + 1e-3, 1e-5 * spec.weight_count + 1e-2

    monkeypatch.setattr(calib.run.time_estimate, "_probe", probe)
    specs = selection.coverage.quantized
    seconds = fit_seconds(digits, specs, recipe)
    assert sum(seconds) == pytest.approx(fits, rel=1e-9)
    by_stage = stage_seconds(0.01, recipe.samples, recipe, 2, len(specs), 3.0, sum(seconds))
    of_both = {
        "trajectories": 62.94,
        "layer fits": fits,
        "held-out trajectories": 3.2,
        "check": 12.48,
        "PTS votes": 15.36,
    }
    assert by_stage == pytest.approx(of_both | stages, rel=1e-9)
