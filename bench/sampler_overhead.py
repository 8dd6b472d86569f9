"""What sampling costs beside the engine: the share of its time that sampling one batch spends outside `denoise`.

    python bench/sampler_overhead.py model.onnx              # about a minute
    python bench/sampler_overhead.py model.onnx --batch 32 --scheduler euler

All times come from the same calls: every call of the engine, and of the scheduler's own code (`step` and
`scale_model_input`, ours for DDIM and diffusers' for the others), is timed inside the sampler's own. Printed is the
median over the repetitions, by the wall clock and by the CPU time of the one thread that runs it all, which other
processes on the machine disturb less. The goal is below 3 % at 20 steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import diffusers

from dmq_export.commands.engine import Engine, Execution, open_engine
from dmq_export.commands.sampler import Conditioning, SampleSettings, draw_samples
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.denoiser.conditioning import dummy_conditioning
from dmq_export.sampling.ddim import Ddim
from dmq_export.sampling.names import SCHEDULERS

CLOCKS = (time.perf_counter, time.thread_time)
COLUMNS = ("us per step", "scheduler's", "overhead")
Clock = Callable[[], float]


class Meter:
    """Adds up the seconds that calls take."""

    def __init__(self, clock: Clock) -> None:
        self.seconds = 0.0
        self._clock = clock

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*arguments: Any, **named: Any) -> Any:
            start = self._clock()
            result = function(*arguments, **named)
            self.seconds += self._clock() - start
            return result

        return call


def seconds_of(engine: Engine, settings: SampleSettings, clock: Clock) -> tuple[float, float, float]:
    """Of one batch: in the engine, outside it, and of that in the scheduler's own code."""
    whole, inside, scheduler = Meter(clock), Meter(clock), Meter(clock)
    config, name = engine.metadata.config, settings.scheduler
    conditioning = Conditioning(
        dummy_conditioning(str(config.get("_class_name")), config, engine.inputs, settings.count)
    )
    own = Ddim if name == "ddim" else getattr(diffusers, SCHEDULERS[str(name)])
    metered: dict[str, Any] = {
        method: scheduler.timed(getattr(own, method)) for method in ("step", "scale_model_input")
    }
    with patch.multiple(own, **metered):
        timed = replace(engine, denoise=inside.timed(engine.denoise))
        whole.timed(draw_samples)(timed, settings, Progress(show=False), conditioning)
    return inside.seconds, whole.seconds - inside.seconds, scheduler.seconds


def measured(engine: Engine, settings: SampleSettings, clock: Clock, repeat: int) -> tuple[str, str, str]:
    """Microseconds per step outside the engine, of them in the scheduler, and the share of those in the engine."""
    seconds_of(engine, settings, clock)  # imports and first allocations
    runs = [seconds_of(engine, settings, clock) for _ in range(repeat)]
    share = statistics.median(outside / inside for inside, outside, _ in runs)
    outside, own = (statistics.median(run[which] for run in runs) / (settings.steps or 1) for which in (1, 2))
    return f"{1e6 * outside:.0f}", f"{1e6 * own:.0f}", f"{100 * share:.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, action="append")
    parser.add_argument("--scheduler", choices=SCHEDULERS, action="append")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repeat", type=int, default=10)
    arguments = parser.parse_args()
    engine = open_engine(arguments.engine, Execution(arguments.backend, threads=1))
    rows = []
    for scheduler in arguments.scheduler or ["ddim", "euler"]:
        for batch in arguments.batch or [1, 32]:
            settings = SampleSettings(count=batch, batch=batch, steps=arguments.steps, scheduler=scheduler)
            cells = [cell for clock in CLOCKS for cell in measured(engine, settings, clock, arguments.repeat)]
            rows.append((scheduler, str(batch), *cells))
    header = ("scheduler", "batch", *(f"{clock}{column}" for clock in ("", "CPU ") for column in COLUMNS))
    print(table(header, rows, right=range(1, len(header))))


if __name__ == "__main__":
    main()
