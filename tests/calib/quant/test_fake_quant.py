"""Affine quantization on torch tensors against NumPy, bit for bit: both round every operation alike."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.quant.fake_quant import QParams, Range, choose_qparams, dequantize, fake_quantize, quantize, round_through
from dmq_export.layer import Scheme

BITS = st.integers(3, 8)
SEEDS = st.integers(0, 2**16)
SCHEMES = st.sampled_from(["asymmetric", "symmetric"])
DTYPES = st.sampled_from([np.float32, np.float64])


def random_range(seed: int, dtype: type = np.float64) -> tuple[np.ndarray, np.ndarray]:
    """``low <= 0 <= high [5, 1]`` over many orders of magnitude; some rows are one-sided."""
    rng = np.random.default_rng(seed)
    low, high = (np.exp(rng.uniform(-8, 8, (5, 1))) * rng.integers(0, 2, (5, 1)) for _ in range(2))
    low[0], high[0] = 1.7, 0.3
    return (-low).astype(dtype), high.astype(dtype)


def numpy_qparams(low: np.ndarray, high: np.ndarray, bits: int, scheme: Scheme) -> tuple[np.ndarray, np.ndarray]:
    if scheme == "symmetric":
        scale = np.maximum(np.maximum(-low, high) / (2 ** (bits - 1) - 1), low.dtype.type(1e-8))
        return scale, np.full(scale.shape, 2 ** (bits - 1))
    scale = np.maximum((high - low) / (2**bits - 1), low.dtype.type(1e-8))
    return scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1)


def numpy_codes(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int) -> np.ndarray:
    return np.clip(np.rint(x / scale) + zero_point, 0, 2**bits - 1).astype(np.int64)


def torch_range(low: np.ndarray, high: np.ndarray) -> Range:
    return Range(torch.from_numpy(low), torch.from_numpy(high))


@settings(deadline=None, max_examples=50)
@given(SEEDS, BITS, SCHEMES, DTYPES)
def test_qparams_codes_and_values_equal_numpy(seed: int, bits: int, scheme: Scheme, dtype: type) -> None:
    low, high = random_range(seed, dtype)
    # a third of the values lies outside the range
    x = (np.random.default_rng(seed).uniform(-1.5, 1.5, (5, 40)) * np.maximum(-low, high)).astype(dtype)
    scale, zero_point = numpy_qparams(low, high, bits, scheme)
    codes = numpy_codes(x, scale, zero_point, bits)

    qparams = choose_qparams(torch_range(low, high), bits, scheme)
    np.testing.assert_array_equal(qparams.scale, scale)
    np.testing.assert_array_equal(qparams.zero_point, zero_point)
    np.testing.assert_array_equal(quantize(torch.from_numpy(x), qparams, bits), codes)
    expected = scale * (codes - zero_point).astype(dtype)
    np.testing.assert_array_equal(fake_quantize(torch.from_numpy(x), qparams, bits), expected)


def test_ties_round_to_even() -> None:
    qparams = QParams(torch.tensor(0.25), torch.tensor(8.0))
    x = torch.tensor([0.125, 0.375, 0.625, -0.125, -0.375, -0.625])
    assert quantize(x, qparams, 4).tolist() == [8, 10, 10, 8, 6, 6]


@settings(deadline=None, max_examples=50)
@given(SEEDS, BITS, SCHEMES, DTYPES)
def test_zero_is_exact(seed: int, bits: int, scheme: Scheme, dtype: type) -> None:
    low, high = random_range(seed, dtype)
    qparams = choose_qparams(torch_range(low, high), bits, scheme)
    assert not fake_quantize(torch.zeros(5, 1), qparams, bits).any()


@settings(deadline=None, max_examples=50)
@given(SEEDS, BITS, SCHEMES)
def test_the_error_inside_the_range_is_at_most_half_a_step(seed: int, bits: int, scheme: Scheme) -> None:
    low, high = random_range(seed)
    x = torch.from_numpy(low + (high - low) * np.random.default_rng(seed).uniform(0, 1, (5, 40)))
    qparams = choose_qparams(torch_range(low, high), bits, scheme)
    error = (fake_quantize(x, qparams, bits) - x).abs()
    assert (error <= qparams.scale * (0.5 + 1e-9)).all()


@settings(deadline=None, max_examples=50)
@given(SEEDS, BITS, SCHEMES, DTYPES)
def test_every_code_survives_a_round_trip(seed: int, bits: int, scheme: Scheme, dtype: type) -> None:
    qparams = choose_qparams(torch_range(*random_range(seed, dtype)), bits, scheme)
    codes = torch.arange(2**bits).expand(5, -1)
    assert torch.equal(quantize(dequantize(codes, qparams), qparams, bits).long(), codes)


@pytest.mark.parametrize("bits", range(3, 9))
def test_a_symmetric_range_has_the_middle_code_for_zero_and_covers_both_ends(bits: int) -> None:
    span = Range(torch.tensor([-3.0, -1.0]), torch.tensor([1.0, 3.0]))
    qparams = choose_qparams(span, bits, "symmetric")
    middle = 2 ** (bits - 1)
    assert qparams.zero_point.tolist() == [middle, middle]
    assert quantize(torch.tensor([[-3.0], [3.0]]), qparams, bits).tolist() == [[1, 1], [2**bits - 1, 2**bits - 1]]


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_a_dead_channel_stays_zero_and_has_finite_gradients(scheme: Scheme) -> None:
    low, high = torch.zeros(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    qparams = choose_qparams(Range(low, high), 4, scheme)
    assert (qparams.scale > 0).all()
    x = torch.zeros(2, requires_grad=True)
    y = fake_quantize(x, qparams, 4)
    assert not y.any()
    y.sum().backward()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in (low, high, x))


def test_rounding_passes_gradients_straight_through() -> None:
    x = torch.tensor([-1.4, 0.5, 2.7], requires_grad=True)
    y = round_through(x)
    assert y.tolist() == [-1, 0, 3]
    (y * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3]


def test_values_inside_the_range_get_the_gradient_and_clipped_ones_none() -> None:
    x = torch.tensor([-9.0, -4.2, 0.0, 3.3, 30.0], requires_grad=True)
    fake_quantize(x, choose_qparams(Range(torch.tensor(-5.0), torch.tensor(10.0)), 4), 4).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 0]


@pytest.mark.parametrize(("x", "gradient"), [(30.0, [0, 1]), (-30.0, [1, 0])])
def test_a_clipped_value_moves_with_its_end_of_the_range(x: float, gradient: list[int]) -> None:
    # scale 1 and zero point 5: the end is a code, so the straight-through gradient is the true one
    low, high = torch.tensor(-5.0, requires_grad=True), torch.tensor(10.0, requires_grad=True)
    fake_quantize(torch.tensor(x), choose_qparams(Range(low, high), 4), 4).backward()
    assert [low.grad, high.grad] == pytest.approx(gradient, abs=1e-6)


def test_a_clipped_value_moves_with_the_larger_end_of_a_symmetric_range() -> None:
    low, high = torch.tensor(-7.0, requires_grad=True), torch.tensor(3.0, requires_grad=True)
    fake_quantize(torch.tensor(30.0), choose_qparams(Range(low, high), 4, "symmetric"), 4).backward()
    assert [low.grad, high.grad] == pytest.approx([-1, 0])
