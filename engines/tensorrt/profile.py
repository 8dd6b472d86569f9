"""The range of sizes that each input of an engine takes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass

from dmq_export.batch import Batch
from dmq_export.errors import DmqError

Shape = tuple[int, ...]
Sizes = Sequence[int | str]  # of an input; a name stands for a size that varies


@dataclass(frozen=True)
class ShapeRange:
    """The smallest, the most frequent and the largest shape of one input."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    @property
    def fixed(self) -> bool:
        return self.minimum == self.maximum


def parse_shapes(texts: Sequence[str]) -> dict[str, ShapeRange]:
    """``sample:1x4x64x64,2x4x64x64,8x4x64x64`` (smallest, most frequent, largest) or ``sample:2x4x64x64``, by name.

    Raises:
        DmqError: a text is not of that form, names an input twice, or its sizes do not grow.
    """
    ranges: dict[str, ShapeRange] = {}
    for text in texts:
        name, colon, rest = text.rpartition(":")
        shapes = [_shape(piece) for piece in rest.split(",")]
        if not colon or not name or len(shapes) not in (1, 3) or None in shapes:
            raise DmqError(f"{text!r} is no shape: write NAME:1x4x64x64, or NAME:MIN,OPT,MAX")
        if name in ranges:
            raise DmqError(f"--shapes names {name} twice")
        known = [shape for shape in shapes if shape is not None]
        ranges[name] = ShapeRange(known[0], known[len(known) // 2], known[-1])
        _require_growing(name, ranges[name])
    return ranges


def resolve_shapes(
    inputs: Mapping[str, Sizes], given: Mapping[str, ShapeRange], batch: Batch | None = None
) -> dict[str, ShapeRange]:
    """A range for every input: as given, or by the names of sizes that a given input has in common with it.

    Args:
        batch: for what stays open of the sizes that :func:`free_batches` finds.

    Raises:
        DmqError: a given shape does not suit its input, or the size of another input stays unknown.
    """
    for name, chosen in given.items():
        if name not in inputs:
            raise DmqError(f"the model has no input {name!r}: it takes {', '.join(inputs)}")
        _require_fit(name, inputs[name], chosen)
    sizes = _named_sizes(inputs, given)
    if batch is not None:
        sizes = dict.fromkeys(free_batches(inputs), astuple(batch)) | sizes
    return {name: given.get(name) or _derived(name, shape, sizes) for name, shape in inputs.items()}


def free_batches(inputs: Mapping[str, Sizes]) -> list[str]:
    """The open sizes that are the first of every input that has them."""
    first = dict.fromkeys(sizes[0] for sizes in inputs.values() if sizes and isinstance(sizes[0], str))
    others = {size for sizes in inputs.values() for size in sizes[1:]}
    return [str(size) for size in first if size not in others]


def _shape(text: str) -> Shape | None:
    return tuple(map(int, text.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text) else None


def _require_growing(name: str, chosen: ShapeRange) -> None:
    shapes = (chosen.minimum, chosen.optimum, chosen.maximum)
    ranks = {len(shape) for shape in shapes}
    if len(ranks) > 1 or any(sizes != tuple(sorted(sizes)) for sizes in zip(*shapes, strict=True)):
        raise DmqError(f"--shapes {name}: MIN, OPT and MAX must have one rank, and no size may shrink")


def _require_fit(name: str, sizes: Sizes, chosen: ShapeRange) -> None:
    stated = f"[{', '.join(map(str, sizes))}]"
    for shape in (chosen.minimum, chosen.maximum):
        fits = len(shape) == len(sizes) and all(
            isinstance(size, str) or size == wanted for size, wanted in zip(sizes, shape, strict=True)
        )
        if not fits:
            raise DmqError(f"--shapes {name}: {'x'.join(map(str, shape))} does not fit the model's {stated}")


def _named_sizes(inputs: Mapping[str, Sizes], given: Mapping[str, ShapeRange]) -> dict[str, Shape]:
    """Minimum, optimum and maximum of every named size of a given input.

    Raises:
        DmqError: two inputs give one name different sizes.
    """
    sizes: dict[str, Shape] = {}
    for name, chosen in given.items():
        for axis, size in enumerate(inputs[name]):
            if isinstance(size, str):
                wanted = (chosen.minimum[axis], chosen.optimum[axis], chosen.maximum[axis])
                if sizes.setdefault(size, wanted) != wanted:
                    raise DmqError(f"--shapes {name}: another input gives the size {size!r} as {sizes[size]}")
    return sizes


def _derived(name: str, shape: Sizes, sizes: Mapping[str, Shape]) -> ShapeRange:
    unknown = [size for size in shape if isinstance(size, str) and size not in sizes]
    if unknown:
        stated = f"[{', '.join(map(str, shape))}]"
        raise DmqError(f"input {name} {stated} has the open size {unknown[0]!r}: give --shapes {name}:MIN,OPT,MAX")
    chosen = [tuple(size if isinstance(size, int) else sizes[size][which] for size in shape) for which in range(3)]
    return ShapeRange(*chosen)
