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
import copy
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from random_unet import UNet2DModel, save_unet
from torch import Tensor, nn

from calib.calibrate import calibrated
from calib.conditioning import conditioning_for
from calib.metrics import prediction_sqnr
from calib.model import SourceModel, load_model, predict
from calib.plan import Limits
from calib.recipe import Recipe, recipe_from
from calib.reference import load_reference
from calib.survey import survey
from calib.trajectories import SamplerSettings, Trajectories, record_trajectories
from dmq_export.bits import Bits
from dmq_export.bundled import BUNDLED
from dmq_export.noise import initial_noise
from dmq_export.progress import Progress
from dmq_export.sampling import sample
from dmq_export.schedulers import build_scheduler
from dmq_export.seeds import stream_seed
from dmq_export.table import table
from engines.images import psnr

NULL_LABEL = 10
PICTURES = 32
PUBLISHED_LES, PUBLISHED_ROUND = 6000, 20000
SAME_MAPPING = 1e-4  # of the prediction: the two networks add in another order

Denoise = Callable[..., Tensor]


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
    surveyed = survey(source, recipe.bits, recipe.scheme, recipe.float_layers)
    checkpoint = calibrated(source, surveyed, unchecked, Limits(torch.device("cpu"), workers=1), Progress(show=False))
    taken = stopwatch.read()
    return _outcome(source, recipe, load_reference(checkpoint, torch.device("cpu")), taken, 0.0)


def published(run: Run) -> Outcome:
    """Calibrate with the published code."""
    source, recipe = load_model(Path(run.model), torch.device("cpu")), _recipe(run)
    calibration = _trajectories(source, recipe, "trajectories", recipe.samples)
    _let_import(Path(run.published))
    network = _published_unet(source)
    clock = _Clock()
    stopwatch = _Stopwatch()
    with tempfile.TemporaryDirectory() as scratch, contextlib.redirect_stdout(sys.stderr):
        denoise = _calibrate_published(network, calibration, run, clock, Path(scratch) / "published.pth")
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
    told = conditioning_for(source, recipe, count)
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


# ---- the published code ----


class _Clock:
    """Processor seconds the published code spends fitting, by stage, without caching layer inputs."""

    def __init__(self) -> None:
        self.fitting = {"les": 0.0, "round": 0.0}
        self._caching = 0.0

    def caching(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            result = function(*args, **options)
            self._caching += time.process_time() - start
            return result

        return timed

    def reconstruction(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start, self._caching = time.process_time(), 0.0
            result = function(*args, **options)
            stage = "les" if options["use_aq"] else "round"
            self.fitting[stage] += time.process_time() - start - self._caching
            return result

        return timed


def _let_import(folder: Path) -> None:
    sys.path[:0] = [str(folder), str(folder / "stable-diffusion")]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.cuda.max_memory_reserved = lambda *_: 0


class _Multiplier(float):
    """Widths that are no integer multiples of the first stay integers."""

    def __mul__(self, width: float) -> int:
        return round(float(self) * width)

    __rmul__ = __mul__


def _published_unet(source: SourceModel) -> nn.Module:
    """The published code's UNet with our weights.

    Raises:
        SystemExit: it does not predict what ours does.
    """
    import ldm.modules.diffusionmodules.util as blocks

    config: Any = source.network.config
    blocks.normalization = lambda channels: blocks.GroupNorm32(config.norm_num_groups, channels)
    import ldm.modules.diffusionmodules.openaimodel as unet

    unet.normalization = blocks.normalization
    widths = config.block_out_channels
    network: nn.Module = unet.UNetModel(
        image_size=config.sample_size,
        in_channels=config.in_channels,
        model_channels=widths[0],
        out_channels=config.out_channels,
        num_res_blocks=config.layers_per_block,
        attention_resolutions=[2**i for i, block in enumerate(config.down_block_types) if "Attn" in block],
        channel_mult=tuple(_Multiplier(width / widths[0]) for width in widths),
        num_head_channels=config.attention_head_dim,
    ).eval()
    with torch.no_grad():
        _map_unet(network, source.network)
        x, t = torch.randn(2, *source.sample_shape), torch.tensor([501, 501])
        difference = (network(x, t) - source.network(x, t).sample).abs().max().item()
    print(f"mapped to the published UNet: largest difference {difference:.1e}", file=sys.stderr, flush=True)
    if difference > SAME_MAPPING:
        raise SystemExit("the mapping is wrong")
    return network


def _map_unet(to: Any, source: Any) -> None:
    _put(to.time_embed[0], source.time_embedding.linear_1)
    _put(to.time_embed[2], source.time_embedding.linear_2)
    _put(to.input_blocks[0][0], source.conv_in)
    blocks = iter(to.input_blocks[1:])
    for down in source.down_blocks:
        for index, resnet in enumerate(down.resnets):
            _map_stage(next(blocks), resnet, down, index)
        if down.downsamplers:
            _put(next(blocks)[0].op, down.downsamplers[0].conv)
    first, second = source.mid_block.resnets
    _map_resnet(to.middle_block[0], first)
    _map_attention(to.middle_block[1], source.mid_block.attentions[0])
    _map_resnet(to.middle_block[2], second)
    blocks = iter(to.output_blocks)
    for up in source.up_blocks:
        for index, resnet in enumerate(up.resnets):
            block = next(blocks)
            _map_stage(block, resnet, up, index)
        if up.upsamplers:
            _put(block[-1].conv, up.upsamplers[0].conv)
    _put(to.out[0], source.conv_norm_out)
    _put(to.out[2], source.conv_out)


def _map_stage(to: Any, resnet: Any, block: Any, index: int) -> None:
    _map_resnet(to[0], resnet)
    if getattr(block, "attentions", None):
        _map_attention(to[1], block.attentions[index])


def _map_resnet(to: Any, source: Any) -> None:
    _put(to.in_layers[0], source.norm1)
    _put(to.in_layers[2], source.conv1)
    _put(to.emb_layers[1], source.time_emb_proj)
    _put(to.out_layers[0], source.norm2)
    _put(to.out_layers[3], source.conv2)
    if source.conv_shortcut is not None:
        _put(to.skip_connection, source.conv_shortcut)


def _map_attention(to: Any, source: Any) -> None:
    """Queries, keys and values of one head lie together in the published code."""
    _put(to.norm, source.group_norm)
    heads = to.num_heads
    for name in ("weight", "bias"):
        split = [getattr(getattr(source, part), name).chunk(heads) for part in ("to_q", "to_k", "to_v")]
        joined = torch.cat([part[head] for head in range(heads) for part in split])
        getattr(to.qkv, name).copy_(joined[..., None] if name == "weight" else joined)
    to.proj_out.weight.copy_(source.to_out[0].weight[..., None])
    to.proj_out.bias.copy_(source.to_out[0].bias)


def _put(to: Any, source: Any) -> None:
    to.weight.copy_(source.weight)
    to.bias.copy_(source.bias)


def _calibrate_published(
    network: nn.Module, calibration: Trajectories, run: Run, clock: _Clock, scratch: Path
) -> Denoise:
    """Run the published calibration as its own scripts do; the calibrated network as a function."""
    import quant.calibration as stages
    import quant.reconstruction as fits
    from quant.quant_layer import QMODE
    from quant.quant_model import QuantModel
    from quant.quant_utils import Scaler
    from quant.reconstruction_util import RLOSS

    fits.save_inout = clock.caching(fits.save_inout)
    for name in ("layer_reconstruction", "block_reconstruction"):
        setattr(stages, name, clock.reconstruction(getattr(stages, name)))
    bits = Bits.parse(run.bits)
    weights: dict[str, Any] = {"bits": bits.weight, "channel_wise": True, "scaler": Scaler.MSE, "init": True}
    steps = len(calibration.timesteps)
    activations: dict[str, Any] = {"bits": bits.activation, "channel_wise": False, "use_aq": True, "dynamic": True}
    activations |= {"total_steps": steps, "symmetric": False, "ratio_threshold": 0.85}
    torch.manual_seed(123 + run.seed)
    np.random.seed(123 + run.seed)
    model = QuantModel(
        model=copy.deepcopy(network),
        wq_params=weights,
        aq_params=activations,
        aq_mode=[QMODE.NORMAL.value],
        use_scale=True,
        use_split=True,
    ).eval()
    inputs = calibration.inputs.flatten(0, 1)
    timesteps = calibration.timesteps.long().repeat_interleave(run.samples)
    model, found = stages.cali_model(
        qnn=model,
        use_aq=True,
        path=str(scratch),
        running_stat=True,
        interval=run.samples,
        lr=1e-3,
        lr_les=1e-3,
        cali_data=(inputs, timesteps),
        iters=run.rounding,
        iters_scale=run.les,
        batch_size=32,
        w=0.01,
        asym=True,
        warmup=0.2,
        opt_mode=RLOSS.MSE,
        multi_gpu=False,
        load_quant=None,
        amp_enabled=False,
        layerwise_recon=True,
        ptf_layers="skip_connection",
        r=20.0,
        momentum=0.95,
        task="ldm",
    )
    return _published_denoiser(model, found, calibration.timesteps)


def _published_denoiser(model: Any, found: dict[str, Any], timesteps: Tensor) -> Denoise:
    from quant.quantizer import ActivationQuantizer

    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.dynamic = module.init = module.running_stat = False
    model.set_quant_state(True, True)

    def denoise(x: Tensor, timestep: Any, **_: Tensor) -> Tensor:
        row = int((timesteps - float(timestep)).abs().argmin())
        for name, value in found[f"act_{row}"].items():
            _set(model, name, value)
        with torch.no_grad():
            prediction: Tensor = model(x, torch.full((len(x),), int(timestep)))
        return prediction

    return denoise


def _set(model: Any, name: str, value: Any) -> None:
    """Activation parameters are plain attributes or parameters, whichever they were saved as."""
    *path, last = name.split(".")
    module = model
    for part in path:
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    module._parameters.pop(last, None)
    module.__dict__[last] = value


# ---- the comparison ----


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
