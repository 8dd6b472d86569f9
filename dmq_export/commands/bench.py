"""``dmq-export bench``: engines side by side in one run."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from dmq_export.commands.engine import Backend, Engine, Execution, float_engine, open_engine
from dmq_export.common.memory import current_memory
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.denoiser.arguments import LABELS, arguments
from dmq_export.denoiser.conditioning import dummy_conditioning
from dmq_export.denoiser.config import sample_shape
from dmq_export.errors import DmqError
from dmq_export.sampling.noise import initial_noise


@dataclass(frozen=True)
class BenchSettings:
    """How to measure.

    Attributes:
        batch: samples per evaluation; None for the size that the first graph is made for, or else 1.
        repeat: evaluations of each engine that are timed.
        warm_up: evaluations of each before, which are not.
        threads: of the CPU; None leaves the number to each backend.
    """

    batch: int | None = None
    repeat: int = 50
    warm_up: int = 3
    threads: int | None = None


@dataclass(frozen=True)
class Latency:
    """Durations of repeated calls, in seconds, in the order of measurement."""

    seconds: tuple[float, ...]

    def percentile(self, percent: float) -> float:
        """Seconds that ``percent`` of the calls do not exceed; between two calls interpolated."""
        return float(np.percentile(self.seconds, percent))


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
    """The result; ``notes`` say how to read it."""

    settings: BenchSettings
    steps: int
    timings: tuple[Timing, ...]
    notes: tuple[str, ...] = ()

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
        return "\n".join([table(header, rows, right=range(2, len(header))), foot, *self.notes])


@dataclass(frozen=True)
class _Contestant:
    """An open, warm engine and what it took to get there."""

    name: str
    engine: Engine
    batch: int
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
    openers = [(name, _opener(name, settings.threads, progress.tell)) for name in engines]
    if reference is not None:
        like = openers[0][1]()
        openers.insert(0, (f"float {reference}", lambda: float_engine(reference, like)))
    for name, opener in openers:
        contestants.append(_contestant(name, opener, settings))
        settings = replace(settings, batch=contestants[0].batch)
    _require_one_model(contestants)
    calls = {f"{index}": one.evaluate for index, one in enumerate(contestants)}
    with progress.stage("bench", len(calls) * settings.repeat, "evaluation") as advance:
        latencies = list(measure_interleaved(calls, settings.repeat, advance).values())
    steps = contestants[0].engine.metadata.steps
    baseline = latencies[0].percentile(50)
    timings = (_timing(*pair, baseline, steps) for pair in zip(contestants, latencies, strict=True))
    return Bench(settings, steps, tuple(timings), tuple(_notes(contestants)))


def _notes(contestants: Sequence[_Contestant]) -> Iterator[str]:
    """What is timed other than samples of the user's would be."""
    metadata = contestants[0].engine.metadata
    told = [argument.name for argument in arguments(str(metadata.config.get("_class_name")), metadata.config)]
    text = [name for name in told if name != LABELS]
    if text:
        yield f"told random numbers as {', '.join(text)}: the time does not depend on the prompt"
    for one in contestants:
        made_for = None if one.engine.backend == "torch" else one.engine.metadata.batch
        fixed = made_for.fixed if made_for else None
        if fixed and one.batch % fixed:
            padded = fixed * math.ceil(one.batch / fixed)
            yield f"{one.name} takes {fixed} at a time: a batch of {one.batch} is padded to {padded}"


def _opener(name: str, threads: int | None, note: Callable[[str], None]) -> Callable[[], Engine]:
    """What opens ``PATH``, ``BACKEND:PATH`` or ``onnxruntime-PROVIDER:PATH``."""
    prefix, separator, rest = name.partition(":")
    backend, _, provider = (prefix, "", "") if prefix in get_args(Backend) else prefix.partition("-")
    if not separator or backend not in get_args(Backend):
        return lambda: open_engine(Path(name), Execution(threads=threads), note)
    named: Any = backend
    return lambda: open_engine(Path(rest), Execution(named, provider or None, threads), note)


def _contestant(name: str, opener: Callable[[], Engine], settings: BenchSettings) -> _Contestant:
    gc.collect()
    memory, start = current_memory(), time.perf_counter()
    engine = opener()
    loaded = time.perf_counter()
    made_for = engine.metadata.batch
    batch = settings.batch or (1 if made_for is None else made_for.usual)
    evaluate = _evaluation(engine, batch)
    for round_number in range(settings.warm_up):
        evaluate(round_number)
    warm = time.perf_counter()
    return _Contestant(name, engine, batch, evaluate, loaded - start, warm - loaded, max(0, current_memory() - memory))


def _evaluation(engine: Engine, batch: int) -> Callable[[int], Any]:
    """One evaluation of ``batch`` samples; the timesteps of the calibration take turns."""
    timesteps = engine.metadata.timesteps
    sample = initial_noise(sample_shape(engine.metadata.config), range(batch), 0)
    config = engine.metadata.config
    conditioning = dummy_conditioning(str(config.get("_class_name")), config, engine.inputs, batch)
    return lambda number: engine.denoise(sample, timesteps[number % len(timesteps)], **conditioning)


def _require_one_model(contestants: Sequence[_Contestant]) -> None:
    first = contestants[0]
    for other in contestants[1:]:
        shapes = [sample_shape(one.engine.metadata.config) for one in (first, other)]
        if shapes[0] != shapes[1]:
            raise DmqError(f"{first.name} makes samples of {shapes[0]}, {other.name} of {shapes[1]}: bench one model")


def _timing(one: _Contestant, latency: Latency, baseline: float, steps: int) -> Timing:
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
        images_per_second=one.batch / (p50 * steps),
        ratio=baseline / p50,
    )


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
