"""How long calibrating models of real sizes takes on a GPU, and how much of its memory, against the plan.

    python bench/gpu.py                                   # LDM-4's and Stable Diffusion 1's shape, balanced
    python bench/gpu.py --preset paper --extrapolate      # the paper's settings, from short runs
    python bench/gpu.py --models LDM-4 --samples 16       # a quick look

The models have random weights; as many samples and steps are drawn as the preset says, 128 prompts with guidance (two
evaluations a step) for Stable Diffusion. Prints seconds and gigabytes, planned and taken. ``--extrapolate`` runs twice
with few iterations, and extends the line through both to the preset's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_unet import LDM_4, SD_1, save_prompts, save_text_unet, save_unet

from dmq_export.common.table import table
from dmq_export.recipe import PRESETS, Preset

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, GUIDANCE = 128, 7.5
FEW = (20, 100)  # iterations of the short runs
GIB = 2**30


def save_ldm(folder: Path) -> list[str]:
    """Write the model; the options that it needs."""
    save_unet(folder, **LDM_4)
    return []


def save_sd(folder: Path) -> list[str]:
    """Write the model and prompts; the options that it needs."""
    save_text_unet(folder, **SD_1)
    save_prompts(folder / "prompts.npz", 2 * PROMPTS)
    return [f"--prompt-embeds={folder}/prompts.npz", f"--guidance-scale={GUIDANCE}", f"--samples={PROMPTS}"]


MODELS = {"LDM-4": save_ldm, "SD-1": save_sd}


def dmq_export(*arguments: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "dmq_export", *arguments, "--json"]
    done = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}, stdout=subprocess.PIPE
    )
    if done.returncode:
        raise SystemExit(f"dmq-export {arguments[0]} failed")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def calibrated(arguments: list[str], output: Path) -> dict[str, Any]:
    """The result of calibrating, with the seconds that all of it took."""
    start = time.perf_counter()
    result = dmq_export(*arguments, f"--output={output}", "--fresh")
    return result | {"took": time.perf_counter() - start}


def extrapolated(runs: list[dict[str, float]], preset: Preset) -> dict[str, float]:
    """Seconds by stage at the preset's iterations, from runs of both :data:`FEW`."""
    whole = PRESETS[preset]
    iterations = {"layer fits": whole.les_iterations, "AdaRound": whole.round_iterations}

    def at(stage: str, wanted: int) -> float:
        return runs[0][stage] + (runs[1][stage] - runs[0][stage]) * (wanted - FEW[0]) / (FEW[1] - FEW[0])

    return runs[1] | {stage: at(stage, wanted) for stage, wanted in iterations.items() if stage in runs[0]}


def measure(name: str, options: argparse.Namespace, folder: Path) -> None:
    model, output = folder / name, folder / "out"
    arguments = ["calibrate", str(model), f"--preset={options.preset}", f"--device={options.device}"]
    arguments += [*MODELS[name](model), f"--bits={options.bits}"]
    arguments += [f"--samples={options.samples}"] if options.samples else []
    plan = dmq_export(*arguments, f"--output={output}", "--dry-run")
    learned = ["--les-iters", *(["--round-iters"] if PRESETS[options.preset].rounding == "adaround" else [])]
    short = [[f"{option}={few}" for option in learned] for few in FEW] if options.extrapolate else [[]]
    runs = [calibrated([*arguments, *iterations], output) for iterations in short]
    result = runs[-1]
    taken = extrapolated([run["seconds"] for run in runs], options.preset) if options.extrapolate else result["seconds"]
    rows = [(stage, f"{plan['seconds'].get(stage, 0):.1f}", f"{seconds:.1f}") for stage, seconds in taken.items()]
    rows.append(("total", f"{sum(plan['seconds'].values()):.1f}", f"{sum(taken.values()):.1f}"))
    how = "extrapolated s" if options.extrapolate else "taken s"
    print(table((f"{name}, {options.preset}, {options.bits}", "planned s", how), rows, right=(1, 2)))
    if peak := result.get("peak_gpu_memory_bytes"):
        error = plan["memory_bytes"] / peak - 1
        print(f"peak memory {peak / GIB:.1f} GiB of the GPU, the plan was {100 * error:+.0f} % off")
    print(f"{result['peak_memory_bytes'] / GIB:.1f} GiB of the main memory")
    print(f"{result['took']:.0f} s in all, with loading and writing\n", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--preset", choices=list(PRESETS), default="balanced")
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--samples", type=int, help="instead of the preset's")
    parser.add_argument("--extrapolate", action="store_true", help=f"from {FEW[0]} and {FEW[1]} iterations")
    parser.add_argument("--device", default="cuda", help="cpu shows that the script runs")
    options = parser.parse_args()
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            measure(name, options, Path(folder))


if __name__ == "__main__":
    main()
