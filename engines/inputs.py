"""Checks what a network is given against what it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import DmqError


@dataclass(frozen=True)
class Input:
    """One input of a network; ``dtype`` None takes arrays as they are, a ``shape`` entry that is no number is free."""

    dtype: Any
    shape: Sequence[Any]


def batch_sizes(inputs: Mapping[str, Input]) -> tuple[int, int | None]:
    """The smallest and the largest batch that a network with these inputs takes; None for no limit."""
    size = inputs["sample"].shape[0] if "sample" in inputs else None
    return (size, size) if isinstance(size, int) else (1, None)


def checked_inputs(expected: Mapping[str, Input], given: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """``given`` as contiguous arrays of the types a network takes, by name.

    Raises:
        DmqError: an input is missing, unknown, or of another shape.
    """
    unknown = sorted(set(given) - set(expected))
    if unknown:
        raise DmqError(f"the model has no input {unknown[0]!r}: it takes {', '.join(expected)}")
    missing = [name for name in expected if name not in given]
    if missing:
        raise DmqError(f"input {missing[0]} is missing: the model takes {', '.join(expected)}")
    return {name: _checked(name, one, given[name]) for name, one in expected.items()}


def _checked(name: str, expected: Input, given: Any) -> NDArray[Any]:
    value = np.asarray(given, expected.dtype, order="C")
    fits = value.ndim == len(expected.shape) and all(
        not isinstance(size, int) or size == actual for size, actual in zip(expected.shape, value.shape, strict=True)
    )
    if not fits:
        raise DmqError(f"input {name} has shape {list(value.shape)}, the model takes {list(expected.shape)}")
    return value


def first_line(error: Exception) -> str:
    """What a runtime's exception says, on one line."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
