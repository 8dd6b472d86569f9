"""Second-order rounding against Optimal Brain Surgeon written out, and against every rounding there is."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.fit.gptq import BLOCK, DAMPING, SWEEPS, _Columns, _sweep, gptq_codes
from calib.quant.fake_quant import QParams, dequantize, quantize

SEEDS = st.integers(0, 2**16)


def random_weight(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, columns)))


def random_moments(seed: int, columns: int, samples: int = 200) -> torch.Tensor:
    """Of strongly correlated inputs, louder in some columns than in others."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((columns, columns)) + 2 * rng.standard_normal(columns)
    x = rng.standard_normal((samples, columns)) @ mixing * np.exp(rng.uniform(-1, 1, columns))
    return torch.from_numpy(x.T @ x)


def random_qparams(seed: int, weight: torch.Tensor, bits: int) -> QParams:
    """A step of its own for every weight, as layers with split inputs have; some weights are out of reach."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.5, 1.5, weight.shape) * 5 / 2**bits
    zero_point = rng.integers(0, 2**bits, weight.shape) * 0.4 + 0.3 * 2**bits
    return QParams(torch.from_numpy(scale), torch.from_numpy(zero_point.round()))


def quadratic_error(weight: torch.Tensor, codes: torch.Tensor, qparams: QParams, moments: torch.Tensor) -> torch.Tensor:
    """``|| (w - w^) X ||^2`` of every row, from ``X X^T``."""
    error = weight - dequantize(codes, qparams)
    return ((error @ moments) * error).sum(1)


def damped(moments: torch.Tensor) -> torch.Tensor:
    return moments + DAMPING * moments.diagonal().mean() * torch.eye(len(moments), dtype=moments.dtype)


def surgeon_row(w: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, moments: np.ndarray, bits: int) -> np.ndarray:
    """Codes of one row: round the loudest column left, make up for it by all columns left, drop it; then sweep."""
    codes = np.zeros(len(w))
    rest, left, inverse = w.copy(), list(np.argsort(-np.diag(moments))), None
    while left:
        inverse = np.linalg.inv(moments[np.ix_(left, left)])
        i = left[0]
        codes[i] = np.clip(np.rint(rest[i] / scale[i]) + zero_point[i], 0, 2**bits - 1)
        error = rest[i] - scale[i] * (codes[i] - zero_point[i])
        rest[left] -= error * inverse[0] / inverse[0, 0]
        left = left[1:]
    for _ in range(SWEEPS):
        for i in range(len(w)):
            tried = np.tile(codes, (2**bits, 1))
            tried[:, i] = np.arange(2**bits)
            error = w - scale * (tried - zero_point)
            codes[i] = ((error @ moments) * error).sum(1).argmin()
    return codes


def assert_codes_equal_obs(seed: int, columns: int, bits: int) -> None:
    weight, moments = random_weight(seed, 3, columns), random_moments(seed, columns)
    qparams = random_qparams(seed, weight, bits)
    rows = zip(weight.numpy(), qparams.scale.numpy(), qparams.zero_point.numpy(), strict=True)
    expected = [surgeon_row(*row, damped(moments).numpy(), bits) for row in rows]
    np.testing.assert_array_equal(gptq_codes(weight, qparams, moments, bits), expected)


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 7), st.integers(3, 5))
def test_codes_equal_obs_written_out(seed: int, columns: int, bits: int) -> None:
    assert_codes_equal_obs(seed, columns, bits)


def test_columns_are_made_up_for_across_blocks() -> None:
    assert_codes_equal_obs(0, BLOCK + 6, 4)


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 12), st.integers(3, 8))
def test_codes_are_integers_in_range(seed: int, columns: int, bits: int) -> None:
    weight = 3 * random_weight(seed, 4, columns)
    codes = gptq_codes(weight, random_qparams(seed, weight, bits), random_moments(seed, columns), bits)
    assert torch.equal(codes, codes.round().clamp(0, 2**bits - 1))


@pytest.mark.parametrize("seed", range(5))
def test_the_error_on_correlated_inputs_is_far_below_rounding_to_nearest(seed: int) -> None:
    weight, moments = random_weight(seed, 8, 24), random_moments(seed, 24)
    scale = torch.full_like(weight, 6 / 15)
    qparams = QParams(scale, torch.full_like(weight, 8))
    learned, nearest = gptq_codes(weight, qparams, moments, 4), quantize(weight, qparams, 4)
    errors = [quadratic_error(weight, codes, qparams, moments) for codes in (learned, nearest)]
    assert (errors[0] <= errors[1]).all()
    assert errors[0].sum() < 0.3 * errors[1].sum()


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 12), st.integers(3, 8))
def test_a_sweep_never_increases_the_error_whatever_it_starts_from(seed: int, columns: int, bits: int) -> None:
    weight, moments = random_weight(seed, 6, columns), random_moments(seed, columns)
    qparams = random_qparams(seed, weight, bits)
    codes = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**bits, (6, columns)).astype(float))
    before = quadratic_error(weight, codes, qparams, moments)
    swept = codes.T.contiguous()
    _sweep(_Columns(weight.T, qparams.scale.T, qparams.zero_point.T), swept, moments, bits)
    after = quadratic_error(weight, swept.T, qparams, moments)
    assert (after <= before * (1 + 1e-9)).all()


@settings(deadline=None, max_examples=20)
@given(SEEDS, st.integers(2, 8))
def test_the_column_swept_last_has_its_best_codes(seed: int, columns: int) -> None:
    weight, moments = random_weight(seed, 20, columns), random_moments(seed, columns)
    qparams = random_qparams(seed, weight, 4)
    codes = gptq_codes(weight, qparams, moments, 4)
    error = quadratic_error(weight, codes, qparams, damped(moments))
    for code in range(16):
        codes[:, -1] = code
        assert (quadratic_error(weight, codes, qparams, damped(moments)) >= error * (1 - 1e-9)).all()


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(1, 12), st.integers(3, 8))
def test_uncorrelated_inputs_give_rounding_to_nearest(seed: int, columns: int, bits: int) -> None:
    weight = random_weight(seed, 4, columns)
    qparams = random_qparams(seed, weight, bits)
    moments = torch.diag(random_moments(seed, columns).diagonal())
    assert torch.equal(gptq_codes(weight, qparams, moments, bits), quantize(weight, qparams, bits))


@pytest.mark.parametrize("seed", range(4))
def test_three_columns_come_close_to_the_best_of_all_roundings(seed: int) -> None:
    weight, moments = random_weight(seed, 60, 3), damped(random_moments(seed, 3))
    qparams = QParams(torch.full_like(weight, 0.7), torch.full_like(weight, 4))
    every = torch.tensor(list(product(range(8), repeat=3)))  # [512, 3]
    at_first = QParams(*(values[:1] for values in qparams))  # all weights have the same
    best = torch.stack([quadratic_error(row, every, at_first, moments).min() for row in weight])
    codes = gptq_codes(weight, qparams, random_moments(seed, 3), 3), quantize(weight, qparams, 3)
    learned, nearest = (quadratic_error(weight, choice, qparams, moments) for choice in codes)
    assert (learned >= best * (1 - 1e-9)).all()
    assert learned.sum() < 1.25 * best.sum()
    assert nearest.sum() > 2 * best.sum()


def test_fewer_samples_than_columns_are_enough() -> None:
    weight, moments = random_weight(0, 4, 20), random_moments(0, 20, samples=3)
    qparams = random_qparams(0, weight, 4)
    codes = gptq_codes(weight, qparams, moments, 4)
    nearest = quantize(weight, qparams, 4)
    assert quadratic_error(weight, codes, qparams, moments).sum() < (
        quadratic_error(weight, nearest, qparams, moments).sum()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30])
def test_an_input_that_is_always_zero_leaves_rounding_to_nearest(size: float, dtype: torch.dtype) -> None:
    weight = random_weight(0, 4, 6).to(dtype)
    qparams = QParams(*(values.to(dtype) for values in random_qparams(0, weight, 4)))
    codes = gptq_codes(weight, qparams, size * torch.eye(6, dtype=dtype), 4)
    assert torch.equal(codes, quantize(weight, qparams, 4))


def test_neither_weights_nor_moments_are_changed() -> None:
    weight, moments = random_weight(0, 3, 5), random_moments(0, 5)
    kept = weight.clone(), moments.clone()
    gptq_codes(weight, random_qparams(0, weight, 4), moments, 4)
    assert torch.equal(weight, kept[0])
    assert torch.equal(moments, kept[1])
