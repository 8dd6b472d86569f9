"""Kill calibrations at random moments, start them again, and compare the results with one that was left alone.

    python bench/kills.py                 # 20 kills of a small model's calibration, about 15 minutes

Every kill is SIGKILL to the process and its workers, uniformly at random over the time an undisturbed calibration
takes; the same command is then given again. Exits with 1 if any byte of any checkpoint differs.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_unet import save_unet

from dmq_export.checkpoint import MANIFEST, TENSORS

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = ["--samples=20", "--steps=3", "--les-iters=10", "--rounding=adaround", "--round-iters=5", "--workers=2"]


def save_model(folder: Path) -> None:
    """A UNet with attention and random weights, 40 quantized layers."""
    save_unet(
        folder,
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
    )


def start(model: Path, output: Path) -> subprocess.Popen[bytes]:
    """The command, in a process group of its own."""
    command = [sys.executable, "-m", "dmq_export", "calibrate", str(model), "-o", str(output), *SETTINGS]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, env=environment, start_new_session=True, stdout=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> None:
    if process.wait():
        raise SystemExit(f"the calibration failed with exit status {process.returncode}")


def contents(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / name).read_bytes() for name in (MANIFEST, TENSORS))


def killed_at(model: Path, output: Path, moment: float) -> str:
    """Kill a calibration after ``moment`` seconds; what it had finished by then."""
    process = start(model, output)
    try:
        process.wait(moment)
        return "done before the kill"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    work = output.with_name(f"{output.name}.work")
    return f"{len(list(work.rglob('*.safetensors')))} items finished" if work.is_dir() else "nothing begun"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    chance = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(model)
        began = time.perf_counter()
        finish(start(model, Path(folder) / "alone"))
        took = time.perf_counter() - began
        expected = contents(Path(folder) / "alone")
        print(f"left alone: {took:.0f} s", flush=True)
        same = 0
        for kill in range(options.kills):
            output, moment = Path(folder) / str(kill), chance.uniform(0, took)
            state = killed_at(model, output, moment)
            if not output.is_dir():
                finish(start(model, output))
            equal = contents(output) == expected
            same += equal
            print(f"kill {kill + 1} after {moment:.1f} s, {state}: {'same' if equal else 'OTHER'} bytes", flush=True)
    print(f"{same} of {options.kills} results are bit-identical")
    sys.exit(same != options.kills)


if __name__ == "__main__":
    main()
