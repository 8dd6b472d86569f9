"""Rows find their places in a file, whenever they are written."""

import errno
import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import calib.record.row_writer
from calib.record.row_writer import RowWriter
from dmq_export.errors import DmqError


@settings(deadline=None, max_examples=25)
@given(st.permutations(range(7)), st.integers(1, 3), st.integers(0, 60))
def test_rows_written_in_any_order_are_where_they_belong(order: list[int], width: int, waiting: int) -> None:
    """As on a GPU, where some bytes wait."""
    content = torch.arange(14.0 * width).view(14, width)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as now:
        now.setattr(calib.record.row_writer, "on_gpu", lambda _: True)
        now.setattr(calib.record.row_writer, "MOST_WAITING", waiting)
        file = Path(folder) / "rows"
        file.touch()
        writer = RowWriter()
        for pair in order:
            writer.write(file, 2 * pair, content[2 * pair : 2 * pair + 2])
        writer.flush()
        assert np.array_equal(np.fromfile(file, np.float32).reshape(14, width), content.numpy())


def test_rows_on_a_gpu_wait_until_they_are_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calib.record.row_writer, "on_gpu", lambda _: True)
    monkeypatch.setattr(calib.record.row_writer, "MOST_WAITING", 8)
    file, writer, sizes = tmp_path / "rows", RowWriter(), []
    file.touch()
    for row in range(6):
        writer.write(file, row, torch.ones(1, 1))
        sizes.append(file.stat().st_size)
    assert sizes == [0, 0, 12, 12, 12, 24]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    (tmp_path / "rows").touch()
    with pytest.raises(DmqError, match=r"rows cannot be written \(No space left on device\): make room, and repeat"):
        RowWriter().write(tmp_path / "rows", 0, torch.ones(1, 1))


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
