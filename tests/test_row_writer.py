"""Rows find their places in a file, whenever they are written."""

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.row_writer import RowWriter


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(7)), st.integers(1, 3))
def test_rows_written_in_any_order_are_where_they_belong(order: list[int], width: int) -> None:
    content = torch.arange(14.0 * width).view(14, width)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows"
        file.touch()
        writer = RowWriter()
        for pair in order:
            writer.write(file, 2 * pair, content[2 * pair : 2 * pair + 2])
        writer.flush()
        assert np.array_equal(np.fromfile(file, np.float32).reshape(14, width), content.numpy())


def test_what_the_system_writes_in_pieces_is_written_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, content, offset: pwrite(file, content[:3], offset))
    (tmp_path / "rows").touch()
    RowWriter().write(tmp_path / "rows", 0, torch.arange(5.0)[:, None])
    assert np.fromfile(tmp_path / "rows", np.float32).tolist() == [0, 1, 2, 3, 4]


def test_rows_on_the_cpu_are_written_at_once_and_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "rows").write_bytes(np.full(6, 7, np.float32).tobytes())
    columns = torch.arange(4.0).view(2, 2).T  # not contiguous
    RowWriter().write(tmp_path / "rows", 1, columns)
    assert np.fromfile(tmp_path / "rows", np.float32).tolist() == [7, 7, 0, 2, 1, 3]
