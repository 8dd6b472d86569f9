"""What counts as equal: codes but for ties, values but for float32 rounding, never anything that is not finite."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import conv2d, linear, random_input, random_layer, specs
from oracle import layer_output, quantize_input

from dmq_export.errors import CheckFailedError
from dmq_export.graph.compare import (
    TOLERANCE,
    LayerComparison,
    compare_layer,
    relative_error,
    require_equal,
    rms_ratio,
)
from dmq_export.graph.lowered_layer import LayerValues, plainly_lowered
from dmq_export.layer import LayerSpec, QuantizedLayer

NAN, INF = float("nan"), float("inf")


def values(layer: QuantizedLayer, x: np.ndarray, row: int = 0) -> LayerValues:
    """One layer in one evaluation, by the oracle."""
    codes = quantize_input(layer, x, row).astype(np.uint8)
    return LayerValues(x, codes, layer_output(layer, x, row).astype(np.float32))


def plain_layer(**changes: object) -> QuantizedLayer:
    """A linear layer whose quantizer is ``round(x) + 100``."""
    layer = random_layer(linear(), largest_shift=0)
    ones = {"tau": np.ones_like(layer.tau), "scale": np.ones_like(layer.scale)}
    return replace(layer, **ones, zero_point=np.full_like(layer.zero_point, 100), **changes)


PLAIN = plain_layer()


def codes_of(x: np.ndarray, codes: np.ndarray) -> LayerValues:
    return LayerValues(x, codes.astype(np.uint8), np.ones(1, np.float32))


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(1, 3), st.integers(0, 2**16))
def test_equal_values_pass(spec: LayerSpec, steps: int, seed: int) -> None:
    layer = random_layer(spec, steps=steps, seed=seed)
    reference = values(layer, random_input(spec, seed=seed), steps - 1)
    check = compare_layer(layer, plainly_lowered(layer), steps - 1, reference, reference)
    assert check == LayerComparison(spec.name, ties=0, wrong_codes=0, input_error=0.0, output_error=0.0)
    assert check.failure is None
    require_equal([check], "a runtime")


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(0, 2**16), st.data())
def test_a_code_that_differs_where_there_is_no_tie_fails(spec: LayerSpec, seed: int, data: st.DataObject) -> None:
    layer = random_layer(spec, seed=seed)
    reference = values(layer, random_input(spec, seed=seed))
    where = np.unravel_index(data.draw(st.integers(0, reference.codes.size - 1)), reference.codes.shape)
    codes = reference.codes.copy()
    codes[where] ^= 1
    check = compare_layer(layer, plainly_lowered(layer), 0, reference, replace(reference, codes=codes))
    assert (check.ties, check.wrong_codes) == (0, 1)
    assert check.failure == f"layer {spec.name}: 1 activation codes differ from the reference"


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(1, 3), st.integers(0, 2**16))
def test_codes_that_differ_at_ties_are_counted_and_do_not_fail(spec: LayerSpec, steps: int, seed: int) -> None:
    layer = random_layer(spec, steps=steps, seed=seed)
    row, rng = steps - 1, np.random.default_rng(seed)
    x = random_input(spec, seed=seed)
    shape = [1] * x.ndim
    shape[spec.channel_axis] = -1
    step = layer.tau.astype(np.float64) * np.repeat(layer.scale[row], spec.parts) * 2.0 ** -layer.shift.astype(float)
    below = rng.integers(-3, 3, x.shape)
    x = ((below + 0.5) * step.reshape(shape)).astype(np.float32)
    zero_point = np.repeat(layer.zero_point[row].astype(int), spec.parts).reshape(shape)
    highest = 2**spec.bits.activation - 1
    down, up = (below + zero_point).clip(0, highest), (below + 1 + zero_point).clip(0, highest)
    output = np.ones(1, np.float32)
    reference, graph = LayerValues(x, down.astype(np.uint8), output), LayerValues(x, up.astype(np.uint8), output)
    check = compare_layer(layer, plainly_lowered(layer), row, reference, graph)
    assert (check.ties, check.wrong_codes) == ((down != up).sum(), 0)
    assert check.failure is None


def ties_and_wrong_codes(value: np.float32, below: float) -> tuple[int, int]:
    """What eight ``value`` are taken for whose codes are ``below`` in the reference and one more in the graph."""
    x = np.full((1, 1, 8), value, np.float32)
    codes = np.full_like(x, below)
    check = compare_layer(PLAIN, plainly_lowered(PLAIN), 0, codes_of(x, codes), codes_of(x, codes + 1))
    return check.ties, check.wrong_codes


@pytest.mark.parametrize("value", [0.5, -0.5, 2.5, -7.5, 100.5])
@pytest.mark.parametrize("ulps", [0, 1, -1, 2, -2])
def test_a_value_a_few_ulps_from_a_tie_is_a_tie(value: float, ulps: int) -> None:
    near = np.float32(value) + ulps * np.spacing(np.float32(value))
    assert ties_and_wrong_codes(near, np.floor(value) + 100) == (8, 0)


@pytest.mark.parametrize("value", [0.5, -2.5, 100.5])
@pytest.mark.parametrize("distance", [1e-4, -1e-4, 0.1, 0.5])
def test_a_value_further_away_is_none(value: float, distance: float) -> None:
    assert ties_and_wrong_codes(np.float32(value + distance), np.floor(value) + 100) == (0, 8)


@pytest.mark.parametrize("value", [0.5, -2.5, 100.5])
@pytest.mark.parametrize("ulps", [10, -10, 14, -14, 100, -100])
def test_a_value_more_ulps_away_than_roundings_explain_is_none(value: float, ulps: int) -> None:
    near = np.float32(value) + ulps * np.spacing(np.float32(value))
    assert ties_and_wrong_codes(near, np.floor(value) + 100) == (0, 8)


def test_a_tie_excuses_one_step_and_no_more() -> None:
    x = np.full((1, 1, 8), 2.5, np.float32)
    codes = np.full_like(x, 102)
    check = compare_layer(PLAIN, plainly_lowered(PLAIN), 0, codes_of(x, codes), codes_of(x, codes + 2))
    assert (check.ties, check.wrong_codes) == (0, 8)


def test_ties_are_those_of_the_step_that_was_run() -> None:
    layer = plain_layer()
    layer = replace(layer, scale=np.array([[1.0], [0.4]], np.float32), zero_point=np.full((2, 1), 100, np.uint8))
    x = np.full((1, 1, 8), 0.5, np.float32)  # 0.5 steps in the first row, 1.25 in the second
    codes = np.full_like(x, 100)
    at_first, at_second = (
        compare_layer(layer, plainly_lowered(layer), row, codes_of(x, codes), codes_of(x, codes + 1)) for row in (0, 1)
    )
    assert (at_first.ties, at_second.wrong_codes) == (8, 8)


def test_a_static_layer_has_the_same_ties_at_every_step() -> None:
    x = np.full((1, 1, 8), 0.5, np.float32)
    codes = np.full_like(x, 100)
    assert compare_layer(PLAIN, plainly_lowered(PLAIN), 2, codes_of(x, codes), codes_of(x, codes + 1)).ties == 8


@pytest.mark.parametrize(
    ("what", "message"),
    [("output", "layer conv: output differs by"), ("input", "layer conv: the graph before it differs by")],
)
def test_values_may_differ_by_the_tolerance_and_no_more(what: str, message: str) -> None:
    layer = random_layer(conv2d())
    reference = values(layer, random_input(layer.spec))
    original = getattr(reference, what)
    where = np.unravel_index(np.abs(original).argmin(), original.shape)  # small there: relative to the largest
    for share, fails in ((0.5, False), (2.0, True)):
        changed = original.copy()
        changed[where] += share * TOLERANCE * np.abs(original).max()
        check = compare_layer(layer, plainly_lowered(layer), 0, reference, replace(reference, **{what: changed}))
        assert getattr(check, f"{what}_error") == pytest.approx(share * TOLERANCE, rel=0.1)
        assert (check.failure or "").startswith(message) is fails


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("what", ["input", "output"])
def test_what_is_not_finite_never_passes(what: str, bad: float) -> None:
    layer = random_layer(conv2d())
    reference = values(layer, random_input(layer.spec))
    changed = getattr(reference, what).copy()
    changed.flat[0] = bad
    broken = replace(reference, **{what: changed})
    for pair in ((reference, broken), (broken, broken), (broken, reference)):
        # a NaN input has no codes to compare with; the error is what counts
        with np.errstate(invalid="ignore"):
            assert compare_layer(layer, plainly_lowered(layer), 0, *pair).failure is not None


def test_relative_error_is_of_the_largest_magnitude() -> None:
    assert relative_error(np.array([1.0, -4.0]), np.array([1.5, -4.0])) == 0.125
    assert relative_error(np.zeros(3), np.zeros(3)) == 0.0
    assert relative_error(np.zeros(3), np.array([0, 0, 1e-3])) > 1


@pytest.mark.parametrize(("reference", "other"), [(1.0, NAN), (NAN, 1.0), (NAN, NAN), (1.0, INF), (INF, INF)])
def test_relative_error_of_what_is_not_finite_is_infinite(reference: float, other: float) -> None:
    with np.errstate(invalid="ignore"):
        assert relative_error(np.array([reference, 1.0]), np.array([other, 1.0])) == INF


def test_rms_ratio_is_of_root_mean_squares() -> None:
    assert rms_ratio(np.array([3.0, 4.0]), np.array([6.0, 8.0])) == pytest.approx(0.5)
    assert rms_ratio(np.zeros(2), np.zeros(2)) == 0.0


def test_the_first_layer_that_differs_is_named() -> None:
    fine = LayerComparison("fine", 3, 0, TOLERANCE, TOLERANCE)
    bad, worse = replace(fine, name="bad", wrong_codes=2), replace(fine, name="worse", output_error=1.0)
    require_equal([], "a runtime")
    require_equal([fine, fine], "a runtime")
    with pytest.raises(
        CheckFailedError, match="layer bad: 2 activation codes differ from the reference, executed by a runtime"
    ):
        require_equal([fine, bad, worse], "a runtime")
    with pytest.raises(CheckFailedError, match=r"layer worse: output differs by 1\.0e\+00 \(allowed 1e-05\)"):
        require_equal([fine, worse, bad], "a runtime")
