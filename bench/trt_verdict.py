"""What scripts/verify_tensorrt.sh needs besides the command line.

    python bench/trt_verdict.py shapes int8.onnx 2                 # the --shapes of trt-build for a batch of 2
    python bench/trt_verdict.py unquantize int8.onnx float16.onnx  # the float16 graph before it was quantized
    python bench/trt_verdict.py verdict CHECKPOINT FOLDER          # numbers and speed of the engines in FOLDER

Shapes and graphs need no GPU; the verdict needs TensorRT and has not been run by us.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmq_export.float_twin import float_twin
from dmq_export.onnx_file import input_sizes, load_onnx
from dmq_export.table import table
from dmq_export.verify import rms_ratio

ROUNDS = 50  # timed evaluations of each engine, in turn


def shape_option(model: ir.Model, batch: int) -> str:
    """``sample:2x4x64x64`` for the only size that our exports leave open."""
    sizes = input_sizes(model)["sample"]
    return "sample:" + "x".join(str(size if isinstance(size, int) else batch) for size in sizes)


def verdict(checkpoint_folder: Path, folder: Path) -> bool:
    """Compare and time; prints tables, returns whether the numbers are right and integer layers integer."""
    from dmq_export.checkpoint import load_checkpoint
    from engines.ort import OnnxRuntimeDenoiser
    from engines.tensorrt.engine import TensorRtDenoiser
    from engines.tensorrt.plan_file import read_facts

    probe = load_checkpoint(checkpoint_folder).probe
    portable = OnnxRuntimeDenoiser(folder / "portable.onnx")
    engines = {name: TensorRtDenoiser(folder / f"{name}.plan") for name in ("int8", "float16")}
    rows, good = [], True
    for step, timestep in enumerate(probe.timesteps):
        x, t = probe.sample[step], float(timestep)
        expected = portable(x, t, **probe.conditioning)
        found = engines["int8"](x, t, **probe.conditioning)
        drift = rms_ratio(found - expected, expected)
        error = rms_ratio(expected - probe.prediction[step], probe.prediction[step])
        good &= drift <= error
        rows.append((f"{timestep:g}", f"{drift:.1e}", f"{error:.1e}", "yes" if drift <= error else "NO"))
    print(table(("timestep", "TensorRT to portable", "portable to float", "below it"), rows, right=(0, 1, 2)))
    x, t = probe.sample[0], float(probe.timesteps[0])
    medians = _medians({name: partial(engine, x, t, **probe.conditioning) for name, engine in engines.items()})
    speed = [(name, f"{1e3 * seconds:.2f} ms") for name, seconds in medians.items()]
    print(table(("engine", f"median of {ROUNDS}, batch {len(x)}"), speed, right=(1,)))
    print(f"int8 is {medians['float16'] / medians['int8']:.2f} times as fast as float16 of the same graph")
    counts = read_facts(folder / "int8.plan").layers
    print(f"int8 engine: {', '.join(f'{count} {kind}' for kind, count in counts.items())} layers")
    return good and counts.get("int8", 0) > 0


def _medians(calls: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each call, taken in turn so that all meet the same clock rates."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 5):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            if turn >= 5:  # warm-up
                seconds[name].append(time.perf_counter() - start)
    return {name: float(np.median(taken)) for name, taken in seconds.items()}


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "shapes":
        print(shape_option(load_onnx(Path(arguments[0])), int(arguments[1])))
    elif command == "unquantize":
        from dmq_export.export import save_onnx

        save_onnx(float_twin(load_onnx(Path(arguments[0]))), Path(arguments[1]))
    elif command == "verdict":
        good = verdict(Path(arguments[0]), Path(arguments[1]))
        print("VERDICT:", "TensorRT runs the exported integers" if good else "TensorRT does NOT run what was exported")
        sys.exit(0 if good else 1)
    else:
        sys.exit(f"unknown command {command}")


if __name__ == "__main__":
    main()
