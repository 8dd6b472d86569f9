"""Puts rows of numbers where they belong in files that several processes fill."""

import os
from pathlib import Path

from torch import Tensor

from dmq_export.errors import DmqError

MOST_WAITING = 2**28  # bytes on a GPU that are not yet written


class RowWriter:
    """Writes rows into files; those that lie on a GPU together, since fetching each would stop it each time.

    Raises:
        DmqError: the disk takes no more.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, int, Tensor]] = []
        self._bytes = 0

    def write(self, file: Path, first: int, rows: Tensor) -> None:
        """Put ``rows`` where row number ``first`` of the file is, now or later."""
        self._waiting.append((file, first, rows))
        self._bytes += rows.nbytes
        if self._bytes > MOST_WAITING or not on_gpu(rows):
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        for file, first, rows in self._waiting:
            content = memoryview(rows.cpu().contiguous().numpy().tobytes())
            _write_at(file, first * rows[0].nbytes, content)
        self._waiting, self._bytes = [], 0


def on_gpu(rows: Tensor) -> bool:
    """Whether fetching ``rows`` interrupts a GPU."""
    return rows.is_cuda


def _write_at(file: Path, offset: int, content: memoryview) -> None:
    descriptor = os.open(file, os.O_WRONLY)
    try:
        while content:
            written = os.pwrite(descriptor, content, offset)
            content, offset = content[written:], offset + written
    except OSError as error:
        raise DmqError(f"{file} cannot be written ({error.strerror}): make room, and repeat the command") from error
    finally:
        os.close(descriptor)
