"""Batch sizes as users write them."""

import pytest

from dmq_export.batch import Batch
from dmq_export.errors import DmqError


@pytest.mark.parametrize(
    ("text", "sizes", "fixed"), [("8", (8, 8, 8), 8), ("1:4:8", (1, 4, 8), None), ("2:2:2", (2, 2, 2), 2)]
)
def test_sizes_are_read(text: str, sizes: tuple[int, int, int], fixed: int | None) -> None:
    batch = Batch.parse(text)
    assert (batch.smallest, batch.usual, batch.largest) == sizes
    assert batch.fixed == fixed


@pytest.mark.parametrize("text", ["", "0", "-1", "1:8", "8:4:1", "1:2:3:4", "x", "1:4:2", "0:1:2"])
def test_anything_else_is_refused_with_what_is_allowed(text: str) -> None:
    with pytest.raises(DmqError, match="1:4:8"):
        Batch.parse(text)
