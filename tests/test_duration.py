"""How long a calibration is said to take."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import conv2d, linear
from models import TINY_RECIPE, save_small_model

import calib.duration
from calib.duration import _line, fit_seconds
from calib.model import SourceModel, load_model
from calib.recipe import Recipe
from dmq_export.layer import LayerSpec

POSITIVE = st.floats(0.01, 100)


@given(POSITIVE, POSITIVE, POSITIVE, POSITIVE)
def test_an_offset_and_a_slope_are_found_again(offset: float, slope: float, first: float, more: float) -> None:
    line = _line([(x, offset + slope * x) for x in (first, first + more)])
    # what is left of the slope after the offset is taken off both ends
    assert line(3 * first) == pytest.approx(offset + slope * 3 * first, rel=1e-6 * (1 + (offset + first) / more))


@pytest.mark.parametrize("points", [[(1.0, 5.0), (4.0, 2.0)], [(1.0, 0.1), (4.0, 2.0)], [(4.0, 2.0)]])
def test_points_that_make_no_sense_are_a_proportion(points: list[tuple[float, float]]) -> None:
    """A narrow layer slower than a wide one, one that says no work takes less than no time, and a single one."""
    line = _line(points)
    assert line(0) == 0
    assert line(6) == pytest.approx(3.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    return load_model(save_small_model(tmp_path_factory.mktemp("small")), torch.device("cpu"))


def test_wider_layers_take_longer_by_what_they_multiply(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [linear(parts=(64,)), conv2d(parts=(64,)), conv2d(parts=(640,))]

    def probe(_: SourceModel, spec: LayerSpec, recipe: Recipe) -> tuple[float, float]:
        """A second per thousand columns, and as much again where they are many."""
        columns = spec.in_channels * (9 if spec.kind == "conv2d" else 1)
        return 1e-3, columns * 1e-3 * (1 if columns < 100 else 2)

    monkeypatch.setattr(calib.duration, "_probe", probe)
    narrow, wide, wider = fit_seconds(source, specs, replace(TINY_RECIPE, les_iterations=0))
    assert narrow == pytest.approx(0.064)
    assert wide == pytest.approx(2 * 0.576)
    assert wider > 10 * wide
