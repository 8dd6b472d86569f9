"""Something that does not work on this machine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """What is missing or amiss, and what to do about it; each a piece of one line."""

    what: str
    remedy: str

    def text(self) -> str:
        """Both."""
        return f"{self.what}: {self.remedy}"
