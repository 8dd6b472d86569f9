"""Settings of a calibration: presets, changes, the record in the checkpoint, and what is refused."""

import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmq_export.bits import Bits
from dmq_export.denoiser.embeddings import Embeddings
from dmq_export.errors import DmqError
from dmq_export.recipe import PRESETS, Preset, Recipe, recipe_from


def from_json(values: dict[str, Any]) -> Recipe:
    tuples = {name: tuple(values[name]) for name in ("labels", "float_layers")}
    return Recipe(**values | tuples | {"bits": Bits.parse(values["bits"])})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_without_changes_is_itself(preset: Preset) -> None:
    assert recipe_from(preset) == PRESETS[preset]


def test_the_balanced_preset_is_the_defaults() -> None:
    assert recipe_from("balanced") == Recipe()


def test_the_paper_preset_has_the_published_settings() -> None:
    paper = recipe_from("paper")
    assert (paper.samples, paper.steps, paper.eta) == (256, 20, 1.0)
    assert (paper.les_iterations, paper.les_learning_rate, paper.timestep_alpha) == (6000, 1e-3, 20.0)
    assert (paper.rounding, paper.round_iterations, paper.weight_grid) == ("adaround", 20000, True)
    assert (paper.pts_layers, paper.pts_kappa) == ("skip", 0.85)


def test_prompts_beyond_the_samples_are_held_out() -> None:
    words, empty = np.arange(5.0).reshape(5, 1), np.zeros((1, 1))
    recipe = Recipe(samples=3, embeddings=Embeddings({"text": words}, {"text": empty}))
    assert not recipe.shares_prompts
    rest = recipe.held_out().embeddings
    assert rest == Embeddings({"text": words[3:]}, {"text": empty})
    shared = replace(recipe, samples=5)
    assert shared.shares_prompts
    assert shared.held_out() is shared
    assert not Recipe().shares_prompts
    assert Recipe().held_out() == Recipe()


def test_a_change_of_none_keeps_the_preset() -> None:
    recipe = recipe_from("paper", steps=7, les_iterations=None, eta=None, scheduler=None)
    assert recipe.steps == 7
    assert (recipe.les_iterations, recipe.eta) == (6000, 1.0)


@pytest.mark.parametrize(
    ("name", "value"), [("les_iterations", 0), ("eta", 0.0), ("weight_grid", False), ("labels", ()), ("seed", 0)]
)
def test_a_change_to_something_empty_is_a_change(name: str, value: object) -> None:
    assert getattr(recipe_from("paper", **{name: value}), name) == value


@pytest.mark.parametrize("preset", PRESETS)
def test_every_setting_is_recorded(preset: Preset) -> None:
    recorded = json.loads(json.dumps(recipe_from(preset).to_json()))
    assert recorded.keys() == {field.name for field in fields(Recipe)}
    assert from_json(recorded) == recipe_from(preset)


@settings(deadline=None, max_examples=30)
@given(
    st.builds(Bits, st.integers(3, 8), st.integers(3, 8)),
    st.lists(st.integers(0, 1000), max_size=3),
    st.lists(st.text(max_size=5), max_size=3),
    st.none() | st.floats(0, 20),
)
def test_what_was_recorded_gives_the_recipe_back(
    bits: Bits, labels: list[int], patterns: list[str], guidance: float | None
) -> None:
    recipe = Recipe(bits=bits, labels=tuple(labels), float_layers=tuple(patterns), guidance_scale=guidance)
    recorded = recipe.to_json()
    assert recorded["bits"] == f"w{bits.weight}a{bits.activation}"
    assert json.loads(json.dumps(recorded)) == recorded
    assert from_json(recorded) == recipe


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", ["samples", "steps", "check_samples", "les_batch"])
def test_a_count_below_one_is_refused_by_name(name: str, value: int) -> None:
    with pytest.raises(DmqError, match=f"{name} is {value}: at least 1 is needed"):
        recipe_from("fast", **{name: value})


@pytest.mark.parametrize("name", ["eta", "guidance_scale", "timestep_alpha", "sensitive_share", "les_learning_rate"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_finite_number_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(DmqError, match=f"{name} is (nan|inf): a finite number is needed"):
        recipe_from("fast", **{name: value})


def test_iterations_that_nothing_would_do_are_refused() -> None:
    with pytest.raises(DmqError, match="--round-iters is of AdaRound, the rounding is gptq: add --rounding adaround"):
        recipe_from("fast", round_iterations=5)
    assert recipe_from("fast", round_iterations=5, rounding="adaround").round_iterations == 5
    assert recipe_from("paper", rounding="gptq").rounding == "gptq"
