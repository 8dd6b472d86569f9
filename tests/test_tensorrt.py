"""What of the TensorRT engine can be tested without a GPU: how a batch meets a plan's range, and refusals."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmq_export.errors import DmqError
from engines.shapes import ShapeRange
from engines.tensorrt import TensorRtDenoiser, _require_inputs, batches


def sample_range(smallest: int, largest: int) -> ShapeRange:
    return ShapeRange((smallest, 1), (smallest, 1), (largest, 1))


@given(count=st.integers(1, 20), smallest=st.integers(1, 6), more=st.integers(0, 6))
def test_every_row_runs_once_in_a_size_the_plan_takes(count: int, smallest: int, more: int) -> None:
    arrays = {"sample": np.arange(count)[:, None], "labels": np.arange(count), "timestep": np.array(7.0)}
    rows = []
    for piece, used in batches(arrays, sample_range(smallest, smallest + more)):
        assert smallest <= len(piece["sample"]) <= smallest + more
        np.testing.assert_array_equal(piece["sample"][:, 0], piece["labels"])
        assert piece["timestep"] == 7.0
        rows += piece["labels"][:used].tolist()
    assert rows == list(range(count))


def test_a_batch_that_fits_is_not_copied() -> None:
    arrays = {"sample": np.zeros((4, 1)), "labels": np.arange(4)}
    ((piece, count),) = batches(arrays, sample_range(1, 8))
    assert count == 4
    assert all(piece[name] is arrays[name] for name in arrays)


def test_what_is_no_batch_stays_whole() -> None:
    arrays = {"sample": np.zeros((4, 1)), "positions": np.arange(6)}
    pieces = [piece for piece, _ in batches(arrays, sample_range(1, 2))]
    assert [len(piece["sample"]) for piece in pieces] == [2, 2]
    assert all(len(piece["positions"]) == 6 for piece in pieces)


def test_inputs_must_be_those_of_the_plan() -> None:
    shapes = {"sample": sample_range(1, 2), "timestep": ShapeRange((), (), ())}
    one = np.zeros(1)
    _require_inputs({"sample": one, "timestep": one}, shapes)
    with pytest.raises(DmqError, match="input timestep is missing: the plan takes sample, timestep"):
        _require_inputs({"sample": one}, shapes)
    with pytest.raises(DmqError, match="input labels is unknown: the plan takes sample, timestep"):
        _require_inputs({"sample": one, "timestep": one, "labels": one}, shapes)


def test_without_tensorrt_the_engine_says_what_is_missing(tmp_path: Path) -> None:
    from engines.trt_environment import missing

    if not missing():
        pytest.skip("this machine has TensorRT and a GPU")
    with pytest.raises(DmqError, match="TensorRT cannot work here"):
        TensorRtDenoiser(tmp_path / "model.plan")
