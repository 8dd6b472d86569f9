"""How long calls take, measured side by side."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Latency:
    """Durations of repeated calls, in seconds, in the order of measurement."""

    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Seconds that ``percent`` of the calls do not exceed; between two calls interpolated."""
        return float(np.percentile(self.seconds, percent))


def measure_interleaved(
    calls: Mapping[str, Callable[[int], object]], repeat: int, advance: Callable[[int], None] = lambda _: None
) -> dict[str, Latency]:
    """Call each of ``calls`` once per round with the round's number, for ``repeat`` rounds.

    Whatever else the machine does meets all of them alike, and the order rotates, so that none always runs in
    the caches its predecessor left.
    """
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_number in range(repeat):
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name](round_number)
            seconds[name].append(time.perf_counter() - start)
            advance(1)
    return {name: Latency(tuple(taken)) for name, taken in seconds.items()}
