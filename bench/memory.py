"""Peak memory of calibrating a large model on the CPU, against its weights and against the plan.

    python bench/memory.py              # a UNet of LDM-4's shape, 274 M parameters: 20 minutes on two busy cores
    python bench/memory.py --small      # 17 M parameters: two minutes
    python bench/memory.py --adaround   # AdaRound after it

The model has random weights. Few samples and steps are drawn, which changes the time and not the peak: that is the
largest layer's fit, the check or, if asked for, AdaRound's largest block, whichever is most. ``--max-memory`` is three
times the float32 weights, or 2 GiB where that is more (a process with PyTorch alone takes half a GiB). Exits with 1
above the limit, or where the plan was more than a quarter off.
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

from random_unet import LDM_4, SMALL_LDM, save_unet

from dmq_export.common.memory import in_words

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["--samples=2", "--steps=2", "--les-iters=10", "--pts-layers=skip", "--json"]


def dmq_export(*arguments: str) -> tuple[dict[str, Any], int]:
    """The command's result, and the most memory its process held."""
    command = [sys.executable, "-m", "dmq_export", *arguments]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"dmq-export {arguments[0]} failed")
    return json.loads(output), usage.ru_maxrss * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--adaround", action="store_true", help="two iterations of each block")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        weights = save_unet(folder / "model", **(SMALL_LDM if options.small else LDM_4))
        limit = max(3 * weights, 2 * 2**30)
        arguments = ["calibrate", str(folder / "model"), "-o", str(folder / "out"), *SETTINGS]
        arguments += ["--workers=1", f"--max-memory={limit}"]
        arguments += ["--rounding=adaround", "--round-iters=2"] if options.adaround else []
        plan, _ = dmq_export(*arguments, "--dry-run")
        print(f"weights {in_words(weights)}, --max-memory {in_words(limit)}", flush=True)
        print(f"plan: {plan['layers']} layers, {in_words(plan['memory_bytes'])}", flush=True)
        start = time.perf_counter()
        result, peak = dmq_export(*arguments)
    error = plan["memory_bytes"] / peak - 1
    print(f"peak: {in_words(peak)}, {peak / weights:.2f} x the weights; the plan was {100 * error:+.0f} % off")
    took = time.perf_counter() - start
    print(f"took {took:.0f} s, planned {sum(plan['seconds'].values()):.0f} s")
    for stage, seconds in result["seconds"].items():
        print(f"  {stage}: {seconds:.0f} s, planned {plan['seconds'].get(stage, 0):.0f} s")
    sys.exit(peak > limit or abs(error) > 0.25)


if __name__ == "__main__":
    main()
