"""Second moments against NumPy, whatever was asked for before."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calib.quant.second_moments
from calib.quant.second_moments import BLOCK, SecondMoments, gram

CHANNELS, TAPS = 6, 3


def random_patches(seed: int = 0, rows: int = 40) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((rows, CHANNELS, TAPS)))


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 9))
def test_gram_is_the_product_with_the_transpose_in_blocks_of_any_size(rows: int, columns: int, block: int) -> None:
    x = np.random.default_rng(rows).integers(-9, 10, (rows, columns)).astype(np.float64)  # exact in any order
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calib.quant.second_moments, "BLOCK", block)
        np.testing.assert_array_equal(gram(torch.from_numpy(x)), x.T @ x)


def test_wide_gram_is_symmetric_to_the_bit() -> None:
    moments = gram(torch.randn(50, BLOCK + 70, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(moments, moments.T)


CHANNEL_SLICES = st.tuples(st.integers(0, CHANNELS - 1), st.integers(1, CHANNELS)).map(
    lambda ends: slice(min(ends), max(ends) if ends[0] != ends[1] else ends[1] + 1)
)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(CHANNEL_SLICES, st.booleans()), min_size=1, max_size=6))
def test_moments_are_those_of_the_channels_asked_for(asked: list[tuple[slice, bool]]) -> None:
    patches = random_patches()
    moments, tau = SecondMoments(patches), torch.linspace(0.5, 4, CHANNELS, dtype=torch.float64)
    for channels, divided in asked:
        x = (patches / tau[:, None] if divided else patches)[:, channels].flatten(1).numpy()
        found = moments.of(channels, tau if divided else None)
        np.testing.assert_allclose(found, x.T @ x, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(moments.columns(channels, tau if divided else None), x, rtol=1e-15)


def test_the_same_channels_are_multiplied_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    widths: list[int] = []
    monkeypatch.setattr(calib.quant.second_moments, "gram", lambda x: widths.append(x.shape[1]) or gram(x))
    moments = SecondMoments(random_patches())
    for channels in (slice(0, 2), slice(0, 2), slice(2, 6), slice(0, 2)):
        moments.of(channels, torch.ones(CHANNELS, dtype=torch.float64))
    assert widths == [2 * TAPS, 4 * TAPS, 2 * TAPS]
