"""Puts rows of numbers where they belong in files that several processes fill."""

import os
from pathlib import Path

from torch import Tensor

MOST_WAITING = 2**28  # bytes on a GPU that are not yet written


class RowWriter:
    """Writes rows into files; those that lie on a GPU together, since fetching each would stop it each time."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, int, Tensor]] = []
        self._bytes = 0

    def write(self, file: Path, first: int, rows: Tensor) -> None:
        """Put ``rows`` where row number ``first`` of the file is, now or later."""
        self._waiting.append((file, first, rows))
        self._bytes += rows.nbytes
        if self._bytes > MOST_WAITING or not rows.is_cuda:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        for file, first, rows in self._waiting:
            content = memoryview(rows.cpu().contiguous().numpy().tobytes())
            _write_at(file, first * rows[0].nbytes, content)
        self._waiting, self._bytes = [], 0


def _write_at(file: Path, offset: int, content: memoryview) -> None:
    descriptor = os.open(file, os.O_WRONLY)
    try:
        while content:
            written = os.pwrite(descriptor, content, offset)
            content, offset = content[written:], offset + written
    finally:
        os.close(descriptor)
