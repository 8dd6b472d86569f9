"""Signal to noise ratios against their definition."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.metrics import CEILING, decibels

# decibels are computed in float32: 1e-6 of 120 dB
TOLERANCE = 1e-3


def numpy_decibels(reference: np.ndarray, other: np.ndarray) -> float:
    reference, other = reference.astype(np.float64), other.astype(np.float64)
    return float(10 * np.log10((reference**2).sum() / ((reference - other) ** 2).sum()))


def random_pair(seed: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(3, 4, 5, generator=generator)
    return reference, reference + noise * torch.randn(3, 4, 5, generator=generator)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**16), st.floats(1e-3, 1e3))
def test_decibels_equal_numpy(seed: int, noise: float) -> None:
    reference, other = random_pair(seed, noise)
    expected = numpy_decibels(reference.numpy(), other.numpy())
    assert decibels(reference, other) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize(("error", "expected"), [(1.0, 0.0), (0.1, 20.0), (0.01, 40.0), (10.0, -20.0)])
def test_a_tenth_of_the_amplitude_is_twenty_decibels(error: float, expected: float) -> None:
    reference = torch.ones(8)
    assert decibels(reference, reference + error) == pytest.approx(expected, abs=TOLERANCE)


@pytest.mark.parametrize("size", [0.0, 1e-9, 1.0, 1e9])
def test_identical_tensors_reach_the_ceiling(size: float) -> None:
    reference = size * random_pair(0, 1.0)[0]
    assert decibels(reference, reference.clone()) == pytest.approx(CEILING, abs=TOLERANCE)


def test_no_difference_exceeds_the_ceiling() -> None:
    reference = torch.ones(8, dtype=torch.float64)
    assert decibels(reference, reference + 1e-9) == pytest.approx(CEILING, abs=TOLERANCE)


def test_noise_on_a_silent_reference_is_far_below_zero() -> None:
    assert decibels(torch.zeros(4), torch.ones(4)) < -100


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**16), st.floats(1e-6, 1e6))
def test_decibels_do_not_depend_on_the_common_scale(seed: int, scale: float) -> None:
    reference, other = random_pair(seed, 0.1)
    assert decibels(scale * reference, scale * other) == pytest.approx(decibels(reference, other), abs=TOLERANCE)
