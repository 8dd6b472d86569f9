"""Progress bars with an ETA on stderr, a log for programs, and the time each stage took."""

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from dmq_export.common.memory import peaks


class Advance(Protocol):
    """Called with how many units are done more, and what was done, if that has a name."""

    def __call__(self, count: int, what: str = "", /) -> None: ...


LINE_SECONDS = 30.0
SHORT = 10.0  # seconds of a stage that nobody needs to hear of


class _Lines:
    """A stage in a log file: a line now and then and at its end instead of a bar."""

    def __init__(self, name: str, total: int | None, unit: str) -> None:
        self._name, self._total = name, total
        counted = f"{{n_fmt}} of {{total_fmt}} {unit}s, {{elapsed}} gone, {{remaining}} to go"
        self._format = f"{{desc}}: {'{elapsed} gone' if total is None else counted}"
        self._start = self._last = time.perf_counter()

    def update(self, done: int, what: str) -> None:
        """Write a line if the last one is :data:`LINE_SECONDS` old."""
        now = time.perf_counter()
        if now - self._last < LINE_SECONDS:
            return
        self._last = now
        counted = f"{self._format} {what}"
        line = tqdm.format_meter(done, self._total or 0, now - self._start, prefix=self._name, bar_format=counted)
        tqdm.write(line.rstrip(), file=sys.stderr)

    def end(self) -> None:
        """Write the last line, unless the stage was short."""
        taken = time.perf_counter() - self._start
        if taken > SHORT:
            tqdm.write(f"{self._name}: done in {taken:.0f} s", file=sys.stderr)


class Progress:
    """Shows one stage at a time and remembers how long each took.

    Args:
        show: False hides the bars; by default a line every half a minute stands for them where stderr is no terminal.
        log: a file that receives one JSON object per line for everything that happens.

    Raises:
        OSError: the log cannot be written.
    """

    def __init__(self, *, show: bool | None = None, log: Path | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._show = show
        self._log = log
        self._start = time.perf_counter()
        if log is not None:
            log.open("a").close()  # or it would fail once there is something to say

    def restarted(self) -> "Progress":
        """Another one that shows and logs as this does and has counted nothing."""
        return Progress(show=self._show, log=self._log)

    def note(self, event: str, **facts: Any) -> None:
        """Log an event; without a log, nothing."""
        if self._log is None:
            return
        at = {"event": event, "at": round(time.perf_counter() - self._start, 3)}
        with self._log.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(at | facts) + "\n")

    def tell(self, text: str) -> None:
        """One line on stderr that nothing hides, and in the log: the user should know it."""
        self.note("told", text=text)
        tqdm.write(f"Note: {text}", file=sys.stderr)

    @contextmanager
    def stage(self, name: str, total: int | None, unit: str) -> Iterator[Advance]:
        """The block receives ``advance(n)``; seconds of stages with one name add up.

        ``total`` is None where nobody knows how far the end is: then the time that is gone is all that is shown.
        """
        start = time.perf_counter()
        self.note("stage", stage=name, total=total, unit=unit)
        disable = None if self._show is None else not self._show
        done, lines = 0, _Lines(name, total, unit)
        # disable=None: tqdm hides the bar where the stream is no terminal
        form = "{desc}: {elapsed}{postfix}" if total is None else None
        with tqdm(total=total, desc=name, unit=unit, disable=disable, leave=False, bar_format=form) as bar:

            def advance(count: int, what: str = "") -> None:
                nonlocal done
                done += count
                if what:
                    bar.set_postfix_str(what, refresh=False)
                bar.update(count)
                if bar.disable and self._show is None:
                    lines.update(done, what)
                self.note("progress", stage=name, done=done, total=total, **({"what": what} if what else {}))

            yield advance
            if bar.disable and self._show is None:
                lines.end()
        taken = time.perf_counter() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + taken
        self.note("stage done", stage=name, seconds=round(taken, 3), **peaks())
