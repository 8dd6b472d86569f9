"""``dmq-export bench``: engines side by side in one run."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from dmq_export.commands.drawing import SampleSettings, labels_conditioning
from dmq_export.commands.engine import Backend, Engine, Execution, float_engine, open_engine
from dmq_export.errors import DmqError
from dmq_export.latency import Latency, measure_interleaved
from dmq_export.memory import current_memory
from dmq_export.noise import initial_noise
from dmq_export.progress import Progress
from dmq_export.signature import sample_shape
from dmq_export.table import table


@dataclass(frozen=True)
class BenchSettings:
    """How to measure.

    Attributes:
        batch: samples per evaluation.
        repeat: evaluations of each engine that are timed.
        warm_up: evaluations of each before, which are not.
        threads: of the CPU; None leaves the number to each backend.
    """

    batch: int = 1
    repeat: int = 50
    warm_up: int = 3
    threads: int | None = None


@dataclass(frozen=True)
class Timing:
    """One engine.

    Attributes:
        engine: as it was named.
        backend: that executed it.
        load_seconds: until it was open.
        warm_up_seconds: of the evaluations that are not timed; the first may compile.
        memory: that the process took for both, in bytes; what is shared with engines opened earlier is not in it.
        p50, p90, p99: milliseconds of one evaluation.
        images_per_second: at the calibrated number of steps, by the median.
        ratio: how many times as fast as the first engine, by the medians.
    """

    engine: str
    backend: str
    load_seconds: float
    warm_up_seconds: float
    memory: int
    p50: float
    p90: float
    p99: float
    images_per_second: float
    ratio: float


@dataclass(frozen=True)
class Bench:
    """The result."""

    settings: BenchSettings
    steps: int
    timings: tuple[Timing, ...]

    def text(self) -> str:
        """One line per engine."""
        header = ("engine", "backend", "p50 ms", "p90 ms", "p99 ms", "images/s", "ratio", "load s", "warm-up s", "MiB")
        rows = [
            (
                one.engine,
                one.backend,
                *(f"{value:.2f}" for value in (one.p50, one.p90, one.p99)),
                f"{one.images_per_second:.2f}",
                f"{one.ratio:.2f}",
                *(f"{value:.2f}" for value in (one.load_seconds, one.warm_up_seconds)),
                f"{one.memory / 2**20:.0f}",
            )
            for one in self.timings
        ]
        how = f"batch {self.settings.batch}, {self.settings.repeat} evaluations of each in turn"
        foot = f"{how}; images of {self.steps} steps; ratio: how many times as fast as the first"
        return f"{table(header, rows, right=range(2, len(header)))}\n{foot}"


@dataclass(frozen=True)
class _Contestant:
    """An open, warm engine and what it took to get there."""

    name: str
    engine: Engine
    evaluate: Callable[[int], Any]
    load_seconds: float
    warm_up_seconds: float
    memory: int


def bench_engines(
    engines: Sequence[str], settings: BenchSettings, progress: Progress, reference: str | None = None
) -> Bench:
    """Measure ``engines`` (``PATH`` or ``BACKEND:PATH``) in turns, the float model ``reference`` first if given.

    Raises:
        DmqError: an engine does not open, or they are of different models.
    """
    contestants: list[_Contestant] = []
    if reference is not None:
        like = _opener(engines[0], settings.threads)()
        contestants.append(_contestant(f"float {reference}", lambda: float_engine(reference, like), settings))
    for name in engines:
        contestants.append(_contestant(name, _opener(name, settings.threads), settings))
    _require_one_model(contestants)
    calls = {f"{index}": one.evaluate for index, one in enumerate(contestants)}
    with progress.stage("bench", len(calls) * settings.repeat, "evaluation") as advance:
        latencies = list(measure_interleaved(calls, settings.repeat, advance).values())
    steps = contestants[0].engine.facts.steps
    baseline = latencies[0].percentile(50)
    timings = (_timing(*pair, baseline, settings, steps) for pair in zip(contestants, latencies, strict=True))
    return Bench(settings, steps, tuple(timings))


def _opener(name: str, threads: int | None) -> Callable[[], Engine]:
    """What opens ``PATH``, ``BACKEND:PATH`` or ``onnxruntime-PROVIDER:PATH``."""
    prefix, separator, rest = name.partition(":")
    backend, _, provider = prefix.partition("-")
    if not separator or backend not in get_args(Backend):
        return lambda: open_engine(Path(name), Execution(threads=threads))
    named: Any = backend
    return lambda: open_engine(Path(rest), Execution(named, provider or None, threads))


def _contestant(name: str, opener: Callable[[], Engine], settings: BenchSettings) -> _Contestant:
    gc.collect()
    memory, start = current_memory(), time.perf_counter()
    engine = opener()
    loaded = time.perf_counter()
    evaluate = _evaluation(engine, settings.batch)
    for round_number in range(settings.warm_up):
        evaluate(round_number)
    warm = time.perf_counter()
    return _Contestant(name, engine, evaluate, loaded - start, warm - loaded, max(0, current_memory() - memory))


def _evaluation(engine: Engine, batch: int) -> Callable[[int], Any]:
    """One evaluation of ``batch`` samples; the timesteps of the calibration take turns."""
    timesteps = engine.facts.timesteps
    sample = initial_noise(sample_shape(engine.facts.config), range(batch), 0)
    conditioning = labels_conditioning(engine.facts.config, SampleSettings(count=batch)).given
    return lambda number: engine.denoise(sample, timesteps[number % len(timesteps)], **conditioning)


def _require_one_model(contestants: Sequence[_Contestant]) -> None:
    first = contestants[0]
    for other in contestants[1:]:
        shapes = [sample_shape(one.engine.facts.config) for one in (first, other)]
        if shapes[0] != shapes[1]:
            raise DmqError(f"{first.name} makes samples of {shapes[0]}, {other.name} of {shapes[1]}: bench one model")


def _timing(one: _Contestant, latency: Latency, baseline: float, settings: BenchSettings, steps: int) -> Timing:
    p50, p90, p99 = (latency.percentile(percent) for percent in (50, 90, 99))
    return Timing(
        engine=one.name,
        backend=one.engine.backend,
        load_seconds=one.load_seconds,
        warm_up_seconds=one.warm_up_seconds,
        memory=one.memory,
        p50=1000 * p50,
        p90=1000 * p90,
        p99=1000 * p99,
        images_per_second=settings.batch / (p50 * steps),
        ratio=baseline / p50,
    )
