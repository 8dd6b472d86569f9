"""Memory is counted in bytes."""

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmq_export.common.memory import available_memory, current_memory, in_words, parse_size, peak_memory
from dmq_export.errors import DmqError


def test_a_large_array_shows_in_the_peak() -> None:
    code = "from dmq_export.common.memory import peak_memory; array = b'x' * (256 * 2**20); print(peak_memory())"
    peak = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    # Linux lets a child inherit its parent's peak, so there is no tight upper bound; the unit is what can be wrong
    assert 256 * 2**20 < peak < 256 * 2**30


def test_what_is_held_now_is_no_more_than_the_peak_and_follows_an_array() -> None:
    before = current_memory()
    array = bytearray(b"x" * (64 * 2**20))
    assert current_memory() - before > 56 * 2**20
    assert current_memory() <= peak_memory() + 2**20
    assert len(array) == 64 * 2**20


def test_the_machine_has_something_left() -> None:
    available = available_memory()
    assert available is None or 2**20 < available < 2**50


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8GB", 8 * 2**30),
        ("8g", 8 * 2**30),
        ("1.5 GiB", 3 * 2**29),
        ("800M", 800 * 2**20),
        ("2TiB", 2**41),
        ("64kb", 2**16),
        ("1000", 1000),
        ("1000B", 1000),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "8XB", "1e9", "8 GB 1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(DmqError, match="is no size: write 800M, 8GB or 1"):
        parse_size(text)


@given(st.integers(2**10, 2**50))
def test_sizes_in_words_are_read_back(size: int) -> None:
    assert parse_size(in_words(size)) == pytest.approx(size, rel=0.06)
