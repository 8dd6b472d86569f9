"""Batches that a network does not take as they are."""

from collections.abc import Mapping

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from engines.batching import Array, batches, run_batched


@given(count=st.integers(1, 20), smallest=st.integers(1, 6), more=st.none() | st.integers(0, 6))
def test_every_row_runs_once_in_a_size_the_network_takes(count: int, smallest: int, more: int | None) -> None:
    arrays = {"sample": np.arange(count)[:, None], "labels": np.arange(count), "timestep": np.array(7.0)}
    sizes = (smallest, None if more is None else smallest + more)
    sums = []

    def run(piece: Mapping[str, Array]) -> Array:
        assert smallest <= len(piece["sample"]) <= (sizes[1] or max(count, smallest))
        assert piece["timestep"] == 7.0
        assert set(piece["labels"]) <= set(range(count))  # what pads is a row as good as any
        sums.append(len(piece["sample"]))
        return piece["sample"][:, 0] + 100 * piece["labels"]

    assert run_batched(run, arrays, sizes).tolist() == [101 * row for row in range(count)]
    assert sum(sums) < count + smallest


def test_a_batch_that_fits_is_not_copied() -> None:
    arrays = {"sample": np.zeros((4, 1)), "labels": np.arange(4)}
    for largest in (8, None):
        ((piece, count),) = batches(arrays, 1, largest)
        assert count == 4
        assert all(piece[name] is arrays[name] for name in arrays)


def test_what_is_no_batch_stays_whole() -> None:
    arrays = {"sample": np.zeros((4, 1)), "positions": np.arange(6)}
    cut = [piece for piece, _ in batches(arrays, 1, 2)]
    assert [len(piece["sample"]) for piece in cut] == [2, 2]
    assert all(len(piece["positions"]) == 6 for piece in cut)
