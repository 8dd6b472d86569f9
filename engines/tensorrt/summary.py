"""What an engine is made of, in the few figures that are worth keeping of the compiler's table of kernels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KernelSummary:
    """An engine in figures.

    Attributes:
        integer: nodes meant to run in 8-bit integers that do.
        not_integer: nodes meant to run in 8-bit integers that run in a float type.
        float_products: the other convolutions and matrix products, by the names of their nodes.
        kinds: kernels by kind: ``convolution``, ``matrix product``, ``fused attention``, ``pointwise``, ``other``.
        activation_bytes: that all kernels read and write; None where a size is open.
        constant_bytes: of weights and other constants, as stored.
        engine_bytes: of the engine itself.
    """

    integer: tuple[str, ...]
    not_integer: tuple[str, ...]
    float_products: tuple[str, ...]
    kinds: Mapping[str, int]
    activation_bytes: int | None
    constant_bytes: int
    engine_bytes: int

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> KernelSummary:
        """What :func:`dataclasses.asdict` made of one.

        Raises:
            KeyError, TypeError: it is none.
        """
        lists = {name: tuple(content[name]) for name in ("integer", "not_integer", "float_products")}
        return cls(**{**content, **lists})
