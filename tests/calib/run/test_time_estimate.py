"""How long a calibration is said to take."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import conv2d, linear
from models import TINY_RECIPE, save_small_model

import calib.run.time_estimate
from calib.fit.layer import fit_nanoseconds
from calib.model.load import SourceModel, load_model
from calib.record.conditioning import Conditioning
from calib.record.layer_inputs import columns_of
from calib.run.time_estimate import _line, fit_seconds
from dmq_export.layer import LayerSpec
from dmq_export.recipe import Recipe

CPU = torch.device("cpu")

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


def test_a_layer_takes_a_moment_and_what_it_multiplies(source: SourceModel, monkeypatch: pytest.MonkeyPatch) -> None:
    specs = [
        linear(parts=(64,), out_channels=8),
        conv2d(parts=(64,), out_channels=8),
        linear(parts=(9000,), out_channels=8),
    ]

    def rest(spec: LayerSpec) -> float:
        return 0.3 + 2e-9 * fit_nanoseconds(spec, clip=False)  # on a core half as fast

    def probe(_: SourceModel, spec: LayerSpec, recipe: Recipe) -> tuple[float, float]:
        return 1e-4 * columns_of(spec), rest(spec)

    monkeypatch.setattr(calib.run.time_estimate, "_probe", probe)
    without = replace(TINY_RECIPE, les_iterations=0, clip=False)
    recipe = replace(without, les_iterations=50)
    found = fit_seconds(source, specs, without)
    assert found == pytest.approx([rest(spec) for spec in specs])
    learned = [more - less for more, less in zip(fit_seconds(source, specs, recipe), found, strict=True)]
    assert learned == pytest.approx([50 * 1e-4 * columns_of(spec) for spec in specs])
    clipped = fit_seconds(source, specs, replace(without, clip=True))
    assert all(more > less for more, less in zip(clipped, found, strict=True))


def test_a_layer_twice_as_large_takes_about_as_much_longer_as_its_columns_say() -> None:
    """Clipping looks at so many numbers and no more, whole moments grow with the cube, and chunks of them do not."""

    def seconds(channels: int, out_channels: int = 128, **changes: int) -> float:
        return 1e-9 * fit_nanoseconds(conv2d(parts=(channels,), out_channels=out_channels, **changes), clip=True)

    assert 2 < seconds(256) / seconds(128) < 4
    assert 1.5 < seconds(1536) / seconds(768) < 2.2  # on fewer patches
    assert 1 < seconds(128, 256) / seconds(128, 128) < 1.3
    depthwise = seconds(128, groups=128)
    assert depthwise < 0.7 * seconds(128)


def test_a_long_probe_runs_once_and_a_short_one_until_it_is_warm(monkeypatch: pytest.MonkeyPatch) -> None:
    now, taken = iter([0.0, 5.0, 10.0, 10.4, 11.0, 11.1, 12.0, 12.2]), []
    monkeypatch.setattr(calib.run.time_estimate.time, "perf_counter", lambda: next(now))
    assert calib.run.time_estimate._best_seconds(lambda: taken.append(0), CPU) == 5.0
    assert len(taken) == 1
    assert calib.run.time_estimate._best_seconds(lambda: taken.append(0), CPU) == pytest.approx(0.1)
    assert len(taken) == 4


def test_on_a_gpu_a_probe_runs_once_untimed_and_waits_for_what_it_started(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is made up: what is started is done once somebody waits for it."""
    clock, started = [0.0], []

    def wait(_: object) -> None:
        clock[0] += sum(started)
        started.clear()

    monkeypatch.setattr(calib.run.time_estimate.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    seconds = iter([100.0, 3.0])  # the first compiles
    assert calib.run.time_estimate._best_seconds(lambda: started.append(next(seconds)), torch.device("cuda")) == 3.0


@pytest.mark.parametrize(
    ("alone", "runs"), [(0.125, [1, 1, 1, 8, 8, 8]), (0.5, [1, 1, 1, 4]), (1.5, [1, 1, 1]), (3.0, [1])]
)
def test_an_evaluation_is_timed_on_as_many_samples_as_take_a_moment(
    alone: float, runs: list[int], source: SourceModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time is made up: each sample takes as long, whatever it is evaluated with."""
    clock, evaluated = [0.0], []

    def evaluate(_: SourceModel, __: Conditioning, batch: int) -> None:
        evaluated.append(batch)
        clock[0] += alone * batch * (1 if batch == 1 else 1.125)

    monkeypatch.setattr(calib.run.time_estimate.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(calib.run.time_estimate, "evaluate_zeros", evaluate)
    seconds = calib.run.time_estimate.evaluation_seconds(source, Conditioning({}, {}), 8)
    assert evaluated == runs
    assert seconds == (alone if runs[-1] == 1 else 1.125 * alone)
