"""This calibrator beside the method's published code: same model, calibration set, test noise and machine.

    git clone https://github.com/LeeDongYeun/dmq published
    pip install einops omegaconf pytorch-lightning pandas
    python bench/published.py --published published                       # three seeds, both bit widths
    python bench/published.py --published published --seeds 1 --bits w4a8
    python bench/published.py --published published --model stress --samples 16 --les 10 --round 20

``stress`` is a UNet of random weights, 18 million parameters, whose layers are as wide as those of real models.

The published code knows unconditional UNets on CUDA only, so the bundled model's null label is folded into its
time embedding, the weights are mapped to the published code's own UNet (the largest difference of the two is
printed), and ``.cuda()`` is made an identity. Runs are one after the other, each in a process of its own on one thread.

Prints, per bit width, mean +- standard deviation over the seeds of: SQNR of the noise prediction on held-out
trajectories (mean over steps, worst step), PSNR of final samples against float from the same noise, and seconds: those
of the clock, and those of the processor, which other processes on the machine disturb less. Processor seconds of the
published settings (6000 and 20000 iterations) are extrapolated from the measured time per iteration.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from published_code import Denoise, FittingClock, calibrated_as_published, let_import, published_unet
from random_unet import UNet2DModel, save_unet

from calib.calibrate import calibrated
from calib.model.fake_quantized import load_fake_quantized
from calib.model.layers import select_layers
from calib.model.load import SourceModel, load_model
from calib.model.network import predict
from calib.model.schedulers import build_scheduler
from calib.record.conditioning import recipe_conditioning
from calib.record.trajectories import SamplerSettings, Trajectories, record_trajectories
from calib.run.evaluate import prediction_sqnr
from calib.run.plan import Resources
from dmq_export.bits import Bits
from dmq_export.common.bundled import BUNDLED
from dmq_export.common.progress import Progress
from dmq_export.common.seeds import stream_seed
from dmq_export.common.table import table
from dmq_export.recipe import Recipe, recipe_from
from dmq_export.sampling.images import psnr
from dmq_export.sampling.loop import sample
from dmq_export.sampling.noise import initial_noise

NULL_LABEL = 10
PICTURES = 32
PUBLISHED_LES, PUBLISHED_ROUND = 6000, 20000


@dataclass(frozen=True)
class Run:
    """One calibration: by whom, of what, how long.

    Attributes:
        les: iterations of equivalent scaling.
        rounding: iterations of AdaRound per block.
    """

    who: str
    bits: str
    seed: int
    samples: int
    les: int
    rounding: int
    published: str
    model: str


@dataclass(frozen=True)
class Outcome:
    """Quality in dB and seconds; the processor's at the published iterations too, where they are known."""

    sqnr_mean: float
    sqnr_worst: float
    psnr: float
    seconds: float
    cpu_seconds: float
    extrapolated: float


class _Stopwatch:
    """Seconds of the clock and of the processor since it was made."""

    def __init__(self) -> None:
        self._start = time.perf_counter(), time.process_time()

    def read(self) -> tuple[float, float]:
        return time.perf_counter() - self._start[0], time.process_time() - self._start[1]


def unconditional_model(folder: Path) -> None:
    """The bundled model told "no label" for good, as an unconditional diffusers model in ``folder``."""
    labelled: Any = load_model(BUNDLED / "digits", torch.device("cpu")).network
    config = {key: value for key, value in labelled.config.items() if not key.startswith("_")}
    free = UNet2DModel(**(config | {"num_class_embeds": None})).eval()
    tensors = labelled.state_dict()
    null = tensors.pop("class_embedding.weight")[NULL_LABEL]
    tensors["time_embedding.linear_2.bias"] = tensors["time_embedding.linear_2.bias"] + null
    free.load_state_dict(tensors)
    free.save_pretrained(folder / "unet")
    (folder / "scheduler").mkdir()
    scheduler = (BUNDLED / "digits" / "scheduler" / "scheduler_config.json").read_text()
    (folder / "scheduler" / "scheduler_config.json").write_text(scheduler)


def stress_model(folder: Path) -> None:
    """A UNet of random weights whose layers are as wide as those of real models."""
    save_unet(
        folder,
        steps_offset=1,  # the published code knows timesteps 1 to 1000
        sample_size=32,
        block_out_channels=(128, 256, 256),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=32,
    )


MODELS = {"bundled": unconditional_model, "stress": stress_model}


def ours(run: Run) -> Outcome:
    """Calibrate with this project."""
    source, recipe = load_model(Path(run.model), torch.device("cpu")), _recipe(run)
    unchecked = replace(recipe, check_samples=1)  # the published code's time has no check in it either
    stopwatch = _Stopwatch()
    selection = select_layers(source, recipe.bits, recipe.scheme, recipe.float_layers)
    checkpoint = calibrated(
        source, selection, unchecked, Resources(torch.device("cpu"), workers=1), Progress(show=False)
    )
    taken = stopwatch.read()
    return _outcome(source, recipe, load_fake_quantized(checkpoint, torch.device("cpu")), taken, 0.0)


def published(run: Run) -> Outcome:
    """Calibrate with the published code."""
    source, recipe = load_model(Path(run.model), torch.device("cpu")), _recipe(run)
    calibration = _trajectories(source, recipe, "trajectories", recipe.samples)
    let_import(Path(run.published))
    network = published_unet(source)
    clock = FittingClock()
    stopwatch = _Stopwatch()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        denoise = calibrated_as_published(network, calibration, recipe, clock, Path(scratch) / "published.pth")
    taken = stopwatch.read()
    les, rounding = clock.fitting["les"], clock.fitting["round"]
    more = les * (PUBLISHED_LES / run.les - 1) + rounding * (PUBLISHED_ROUND / run.rounding - 1)
    return _outcome(source, recipe, denoise, taken, more)


def _recipe(run: Run) -> Recipe:
    """What is calibrated on, and how this project does it."""
    base = recipe_from("balanced", bits=Bits.parse(run.bits), seed=run.seed, samples=run.samples, check_samples=32)
    if run.who == "balanced":
        return base
    same = recipe_from("paper", les_iterations=run.les, round_iterations=run.rounding, eta=0.0)
    return replace(same, bits=base.bits, seed=run.seed, samples=run.samples, check_samples=32)


def _trajectories(source: SourceModel, recipe: Recipe, name: str, count: int) -> Trajectories:
    """What :func:`calibrated` records under that name."""
    settings = SamplerSettings(recipe.scheduler, recipe.steps, recipe.eta)
    told = recipe_conditioning(source, recipe, count)
    return record_trajectories(source, settings, told, range(count), seed=stream_seed(recipe.seed, name))


def _outcome(source: SourceModel, recipe: Recipe, denoise: Denoise, taken: tuple[float, float], more: float) -> Outcome:
    """Measure on trajectories and noise that no calibration saw; ``more`` seconds it would take as published."""
    held_out = _trajectories(source, recipe, "held-out trajectories", recipe.check_samples)
    sqnr = prediction_sqnr(denoise, held_out)
    noise = torch.from_numpy(initial_noise(source.sample_shape, range(PICTURES), 1000 + recipe.seed))

    def pictures(network: Denoise) -> Any:
        with torch.no_grad():
            return sample(network, noise, build_scheduler(source.scheduler, None, recipe.steps), {}).numpy()

    expected = pictures(lambda x, t, **_: predict(source.network, x, torch.as_tensor(t), {}))
    quality = psnr(expected, pictures(denoise))
    return Outcome(float(np.mean(sqnr)), min(sqnr), quality, *taken, taken[1] + more)


def runs(options: argparse.Namespace, model: Path, bits: str, seed: int) -> Iterator[Run]:
    common = {"bits": bits, "seed": seed, "samples": options.samples, "published": str(options.published)}
    for who in options.who:
        yield Run(who=who, les=options.les, rounding=options.round, model=str(model), **common)


def execute(run: Run) -> Outcome:
    torch.set_num_threads(1)
    return published(run) if run.who == "published" else ours(run)


def name_of(run: Run) -> str:
    """Says everything an outcome depends on."""
    iterations = "" if run.who == "balanced" else f", {run.les} and {run.rounding} iterations"
    return f"{run.bits} seed {run.seed} {run.who}, {run.samples} samples{iterations}"


def read_known(path: Path | None) -> dict[str, Outcome]:
    """Outcomes of an earlier run."""
    if path is None or not path.is_file():
        return {}
    return {name: Outcome(**outcome) for name, outcome in json.loads(path.read_text()).items()}


def show(bits: str, found: dict[str, list[Outcome]]) -> None:
    def spread(who: str, column: str, digits: int) -> str:
        values = [getattr(outcome, column) for outcome in found[who]]
        around = f" +- {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
        return f"{np.mean(values):.{digits}f}{around}"

    columns = {"sqnr_mean": 2, "sqnr_worst": 2, "psnr": 2, "seconds": 0, "cpu_seconds": 0, "extrapolated": 0}
    rows = [(who, *(spread(who, column, digits) for column, digits in columns.items())) for who in found]
    heads = (bits, "SQNR mean", "worst step", "PSNR", "seconds", "CPU s", "at 6000/20000")
    print("\n" + table(heads, rows, right=range(1, len(heads))), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--published", type=Path, required=True, help="checkout of the published code")
    parser.add_argument("--model", choices=list(MODELS), default="bundled")
    parser.add_argument("--bits", nargs="+", default=["w4a8", "w4a6"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=64, help="at least 16, which the published code draws from")
    parser.add_argument("--les", type=int, default=300, help="iterations per layer")
    parser.add_argument("--round", type=int, default=500, help="iterations per block")
    parser.add_argument("--who", nargs="+", default=["published", "same", "balanced"])
    parser.add_argument("--json", type=Path, help="keep every outcome there; what is there is not run again")
    options = parser.parse_args()
    known = read_known(options.json)
    with tempfile.TemporaryDirectory() as scratch:
        MODELS[options.model](Path(scratch))
        for bits in options.bits:
            found: dict[str, list[Outcome]] = {who: [] for who in options.who}
            for seed in range(options.seeds):
                for run in runs(options, Path(scratch), bits, seed):
                    name = f"{options.model}, {name_of(run)}"
                    if name not in known:
                        with multiprocessing.get_context("spawn").Pool(1) as alone:
                            known[name] = alone.apply(execute, (run,))
                        print(f"{name}: {known[name]}", file=sys.stderr, flush=True)
                    found[run.who].append(known[name])
                    if options.json:
                        content = {key: asdict(outcome) for key, outcome in known.items()}
                        options.json.write_text(json.dumps(content, indent=1))
            show(bits, found)


if __name__ == "__main__":
    main()
