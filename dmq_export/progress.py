"""Progress bars with an ETA on stderr, and the time each stage took."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


class Progress:
    """Shows one stage at a time and remembers how long each took.

    Args:
        show: False hides the bars; by default they are hidden where stderr is no terminal.
    """

    def __init__(self, *, show: bool | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._show = show

    def restarted(self) -> "Progress":
        """Another one that shows as this does and has counted nothing."""
        return Progress(show=self._show)

    @contextmanager
    def stage(self, name: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """The block receives ``advance(n)``; seconds of stages with one name add up."""
        start = time.perf_counter()
        disable = None if self._show is None else not self._show
        # disable=None: tqdm hides the bar where the stream is no terminal
        with tqdm(total=total, desc=name, unit=unit, disable=disable, leave=False) as bar:

            def advance(count: int) -> None:
                bar.update(count)

            yield advance
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
