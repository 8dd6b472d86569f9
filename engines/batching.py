"""A batch of any size, in pieces of the sizes that a network takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def run_batched(
    run: Callable[[Mapping[str, Array]], NDArray[np.float32]],
    arrays: Mapping[str, Array],
    sizes: tuple[int, int | None],
) -> NDArray[np.float32]:
    """What ``run`` makes of ``arrays``, given to it in batches of ``sizes``: the prediction ``[N, ...]``.

    Args:
        run: arrays by name to a prediction, an array of its own.
        arrays: ``sample [N, ...]`` and the rest; what is as long as the sample is cut and padded with it.
        sizes: the smallest and the largest batch; None for no limit.
    """
    predictions = [run(piece)[:count] for piece, count in batches(arrays, *sizes)]
    return predictions[0] if len(predictions) == 1 else np.concatenate(predictions)


def batches(
    arrays: Mapping[str, Array], smallest: int, largest: int | None
) -> Iterator[tuple[Mapping[str, Array], int]]:
    """Pieces of at least ``smallest`` and at most ``largest`` rows, each with how many of its rows count.

    The others repeat the last one, which no kernel can trip over as it might over zeros.
    """
    count = len(arrays["sample"])
    size = max(count, smallest) if largest is None else min(max(count, smallest), largest)
    if size == count:
        yield arrays, count
        return
    for start in range(0, count, size):
        rows = min(size, count - start)
        index = np.minimum(np.arange(start, start + max(rows, smallest)), start + rows - 1)
        yield {name: value[index] if _is_batched(value, count) else value for name, value in arrays.items()}, rows


def _is_batched(value: Array, count: int) -> bool:
    return np.ndim(value) > 0 and len(value) == count
