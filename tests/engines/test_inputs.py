"""What a network is given, checked against what it takes."""

import numpy as np
import pytest

from dmq_export.errors import DmqError
from engines.inputs import Input, batch_sizes, checked_inputs, first_line

EXPECTED = {
    "sample": Input(np.float32, ["batch", 1, 8, 8]),
    "timestep": Input(np.float32, []),
    "anything": Input(None, ["rows"]),
}
GIVEN = {"sample": np.zeros((2, 1, 8, 8), np.float32), "timestep": 3, "anything": np.zeros(2, np.int8)}


def test_inputs_become_what_the_network_takes() -> None:
    given = {**GIVEN, "sample": np.zeros((2, 8, 8, 1), np.float64).transpose(0, 3, 1, 2)}
    checked = checked_inputs(EXPECTED, given)
    assert list(checked) == list(EXPECTED)
    assert checked["sample"].flags.c_contiguous
    assert [value.dtype for value in checked.values()] == [np.float32, np.float32, np.int8]


def test_what_fits_is_not_copied() -> None:
    assert np.shares_memory(checked_inputs(EXPECTED, GIVEN)["sample"], GIVEN["sample"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sample": np.zeros((2, 3, 8, 8))}, r"input sample has shape \[2, 3, 8, 8\], the model takes \['batch', 1, 8"),
        ({"timestep": np.zeros(1)}, r"input timestep has shape \[1\], the model takes \[\]"),
        ({"prompt": np.zeros(1)}, "no input 'prompt': it takes sample, timestep, anything"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(DmqError, match=message):
        checked_inputs(EXPECTED, {**GIVEN, **change})


def test_what_is_missing_is_refused() -> None:
    with pytest.raises(DmqError, match="input timestep is missing: the model takes sample, timestep, anything"):
        checked_inputs(EXPECTED, {"sample": GIVEN["sample"], "anything": GIVEN["anything"]})


def test_the_sample_says_which_batches_are_taken() -> None:
    assert batch_sizes(EXPECTED) == (1, None)
    assert batch_sizes({"sample": Input(np.float32, [4, 1, 8, 8])}) == (4, 4)


def test_an_error_is_told_in_its_first_line() -> None:
    assert first_line(ValueError("\nwhat\n where")) == "what"
    assert first_line(ValueError()) == "ValueError"
