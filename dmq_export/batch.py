"""Batch sizes as users write them: ``8``, or ``1:4:8`` for any from 1 to 8, tuned for 4."""

import re
from dataclasses import dataclass

from dmq_export.errors import DmqError


@dataclass(frozen=True)
class Batch:
    """The batch sizes an exported graph is for; all equal: the graph takes no other."""

    smallest: int
    usual: int
    largest: int

    @property
    def fixed(self) -> int | None:
        """The one size, or None."""
        return self.usual if self.smallest == self.largest else None

    @classmethod
    def parse(cls, text: str) -> "Batch":
        """``"8"`` or ``"1:4:8"``.

        Raises:
            DmqError: ``text`` is neither, or the sizes do not increase from at least 1.
        """
        match = re.fullmatch(r"(\d+)(?::(\d+):(\d+))?", text)
        if match is None:
            raise DmqError(f"{text!r} is no batch size: write 8, or 1:4:8 for any from 1 to 8, tuned for 4")
        first = int(match[1])
        sizes = (first, int(match[2] or first), int(match[3] or first))
        if not 1 <= sizes[0] <= sizes[1] <= sizes[2]:
            raise DmqError(f"batch sizes {text!r} must increase from at least 1: write 1:4:8")
        return cls(*sizes)
