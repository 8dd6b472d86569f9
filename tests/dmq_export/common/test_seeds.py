"""Random streams by name, and the noise drawn from them."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmq_export.common.seeds import stream_seed
from dmq_export.sampling.noise import initial_noise

KEYS = st.lists(st.one_of(st.integers(0, 99), st.from_regex(r"[a-z][a-z._]*", fullmatch=True)), max_size=3)


def test_a_seed_never_changes_between_versions() -> None:
    digest = hashlib.sha256(b"7/noise/3").digest()
    assert stream_seed(7, "noise", 3) == int.from_bytes(digest[:8], "little") // 2
    assert stream_seed(7, "noise", 3) == 6955512473938529536


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 2**64), KEYS)
def test_every_generator_accepts_the_seed(seed: int, keys: list[str | int]) -> None:
    assert 0 <= stream_seed(seed, *keys) < 2**63


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.integers(0, 99), KEYS), unique_by=str, min_size=2, max_size=20))
def test_different_names_are_different_streams(names: list[tuple[int, list[str | int]]]) -> None:
    assert len({stream_seed(seed, *keys) for seed, keys in names}) == len(names)


def test_noise_never_changes_between_versions() -> None:
    noise = initial_noise((2, 2), range(3, 4), seed=7)
    expected = np.random.Generator(np.random.Philox(6955512473938529536)).standard_normal((1, 2, 2), np.float32)
    np.testing.assert_array_equal(noise, expected, strict=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 9), st.integers(0, 20), st.integers(1, 5))
def test_a_sample_does_not_depend_on_its_batch(seed: int, start: int, count: int) -> None:
    batch = initial_noise((3, 4, 4), range(start, start + count), seed)
    alone = [initial_noise((3, 4, 4), range(i, i + 1), seed)[0] for i in range(start, start + count)]
    np.testing.assert_array_equal(batch, alone)


def test_every_sample_and_every_seed_has_noise_of_its_own() -> None:
    noise = np.concatenate([initial_noise((8,), range(10), seed) for seed in range(10)])
    assert len(np.unique(noise, axis=0)) == 100
    assert len(np.unique(noise)) > 790  # 800 numbers; float32 normals rarely coincide


def test_the_noise_is_standard_normal() -> None:
    noise = initial_noise((100, 100), range(10), 0)
    # 100,000 draws: the standard errors of mean, deviation and share are 0.003, 0.002 and 0.0015; five of each
    assert noise.mean() == pytest.approx(0, abs=0.016)
    assert noise.std() == pytest.approx(1, abs=0.011)
    assert (np.abs(noise) < 1).mean() == pytest.approx(0.6827, abs=0.0075)
