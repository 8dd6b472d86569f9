"""What sampling costs beside the engine: the share of its time that `draw_batch` spends outside `denoise`.

    python bench/sampler_overhead.py model.onnx              # about a minute
    python bench/sampler_overhead.py model.onnx --batch 32 --scheduler euler

Both times come from the same calls: every call of the engine is timed inside the sampler's own. Printed is the median
over the repetitions, by the wall clock and by the CPU time of the one thread that runs both, which other processes on
the machine disturb less. The goal is below 3 % at 20 steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from dmq_export.commands.drawing import Conditioning, SampleSettings, draw_batch
from dmq_export.commands.engine import Engine, Execution, open_engine
from dmq_export.conditioning import made_up
from dmq_export.schedulers import SCHEDULERS
from dmq_export.table import table

CLOCKS = (time.perf_counter, time.thread_time)


def overhead(engine: Engine, settings: SampleSettings, clock: Callable[[], float]) -> tuple[float, float]:
    """Seconds of one batch in the engine, and outside it."""
    inside = 0.0

    def timed(*arguments: Any, **conditioning: Any) -> Any:
        nonlocal inside
        start = clock()
        prediction = engine.denoise(*arguments, **conditioning)
        inside += clock() - start
        return prediction

    start = clock()
    indices = range(settings.count)
    config = engine.facts.config
    conditioning = Conditioning(made_up(str(config.get("_class_name")), config, engine.inputs, settings.count))
    draw_batch(replace(engine, denoise=timed), settings, conditioning, indices)
    total = clock() - start
    return inside, total - inside


def measured(engine: Engine, settings: SampleSettings, clock: Callable[[], float], repeat: int) -> tuple[str, str]:
    """Microseconds per step outside the engine, and their share of those in it."""
    overhead(engine, settings, clock)  # imports and first allocations
    runs = [overhead(engine, settings, clock) for _ in range(repeat)]
    share = statistics.median(outside / inside for inside, outside in runs)
    step = statistics.median(outside for _, outside in runs) / (settings.steps or 1)
    return f"{1e6 * step:.0f}", f"{100 * share:.2f} %"


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
    header = ("scheduler", "batch", "us per step", "overhead", "CPU us per step", "CPU overhead")
    print(table(header, rows, right=range(1, len(header))))


if __name__ == "__main__":
    main()
