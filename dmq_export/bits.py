"""Bit widths as users write them: ``w4a8`` is 4-bit weights and 8-bit activations."""

import re
from dataclasses import dataclass

from dmq_export.errors import DmqError

SUPPORTED = range(3, 9)


@dataclass(frozen=True)
class Bits:
    """Bit widths of weights and activations, each 3..8."""

    weight: int
    activation: int

    def __post_init__(self) -> None:
        for what, bits in (("weight", self.weight), ("activation", self.activation)):
            if bits not in SUPPORTED:
                raise DmqError(f"{bits} {what} bits are not supported: 3 to 8 are")

    def __str__(self) -> str:
        return f"w{self.weight}a{self.activation}"

    @classmethod
    def parse(cls, text: str) -> "Bits":
        """``"w4a6"`` to ``Bits(4, 6)``.

        Raises:
            DmqError: ``text`` is not of that form, or a width is not in 3..8.
        """
        match = re.fullmatch(r"w(\d+)a(\d+)", text.lower())
        if match is None:
            raise DmqError(f"{text!r} names no bit widths: write w4a8, w4a6 or another w3a3 .. w8a8")
        return cls(int(match[1]), int(match[2]))
