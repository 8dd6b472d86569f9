"""OpenVINO's int8 kernels on the exported graph against float engines of the same model, side by side in one run.

    python bench/openvino_int8.py                                # about 20 minutes on two cores
    python bench/openvino_int8.py --sizes 32 --batches 1 --seconds 2
    python bench/openvino_int8.py --sizes 32 --batches 1 --seconds 20 --threads 1 --int8-only    # what steps cost

The model is a UNet2DModel of random weights, 128, 256 and 256 channels wide; speed does not depend on the weights. The
engines take turns, one evaluation each, so that another load on the machine meets all of them; the figures are
medians over the turns: of the times, and of each turn's ratio to the first engine and to ONNX Runtime.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import torch
from numpy.typing import NDArray
from random_unet import save_unet

from calib.calibrate import calibrated
from calib.model.layers import select_layers
from calib.model.load import load_model
from calib.model.trace import trace_network
from calib.run.plan import Resources
from dmq_export.bits import Bits
from dmq_export.checkpoint import Checkpoint
from dmq_export.commands.export import export_graph
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.graph.export import serialized
from dmq_export.layer import QuantizedLayer
from dmq_export.recipe import Recipe
from engines.onnxruntime import OnnxSession

CHANNELS = (128, 256, 256)
Run = Callable[[], object]
Inputs = dict[str, NDArray[Any]]


def save_model(folder: Path) -> None:
    """A pipeline folder of random weights at 32x32."""
    save_unet(
        folder,
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )


def checkpoint_of(folder: Path) -> Checkpoint:
    """A static, symmetric checkpoint by the quickest recipe: two steps, one sample, rounded to nearest."""
    source = load_model(folder, torch.device("cpu"))
    recipe = Recipe(
        bits=Bits(4, 8),
        samples=1,
        steps=2,
        check_samples=1,
        les_iterations=0,
        clip=False,
        rounding="nearest",
        scheme="symmetric",
        scales="static",
    )
    selection = select_layers(source, recipe.bits, recipe.scheme, recipe.float_layers)
    return calibrated(source, selection, recipe, Resources(torch.device("cpu")), Progress(show=False))


def varied(checkpoint: Checkpoint, *, steps: bool, asymmetric: bool = False) -> Checkpoint:
    """The same with LES factors, and with ranges that differ from step to step; the numbers do not matter here."""
    rng = np.random.default_rng(0)
    rows = 20 if steps else 1

    def vary(layer: QuantizedLayer) -> QuantizedLayer:
        tau = np.exp(rng.uniform(-0.5, 0.5, layer.tau.shape)).astype(np.float32)
        scale = (layer.scale * np.exp(rng.uniform(-0.3, 0.3, (rows, layer.scale.shape[1])))).astype(np.float32)
        zero_point = np.full(scale.shape, 128, np.uint8)
        spec = layer.spec
        if asymmetric:
            spec = replace(spec, scheme="asymmetric")
            zero_point = zero_point + rng.integers(0, 3, scale.shape, np.uint8)
        return replace(layer, spec=spec, tau=tau, scale=scale, zero_point=zero_point)

    timesteps = np.linspace(950, 0, 20, dtype=np.float32)
    return replace(checkpoint, timesteps=timesteps, layers=tuple(vary(layer) for layer in checkpoint.layers))


def float_onnx(folder: Path, checkpoint: Checkpoint) -> bytes:
    """The float model in ONNX: the same trace with nothing quantized."""
    network = load_model(folder, torch.device("cpu")).network
    names = {layer.spec.name for layer in checkpoint.layers}
    originals = {name: network.get_submodule(name) for name in names}
    state = {f"{name}.{leaf}": value.numpy() for name, m in originals.items() for leaf, value in m.named_parameters()}
    return serialized(trace_network(replace(checkpoint, layers=(), float_tensors=checkpoint.float_tensors | state)))


def openvino_engine(model: bytes, precision: str, inputs: Inputs, threads: int) -> Run:
    """One evaluation in OpenVINO, the shapes fixed; 0 threads are as many as there are cores."""
    core = openvino.Core()
    network = core.read_model(io.BytesIO(model))
    network.reshape({"sample": list(inputs["sample"].shape)})
    config = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
    request = core.compile_model(network, "CPU", config).create_infer_request()
    return lambda: request.infer(inputs)


def onnxruntime_engine(model: bytes, inputs: Inputs, threads: int) -> Run:
    """One evaluation in ONNX Runtime."""
    session = OnnxSession(model, threads=threads or None)
    return lambda: session.run(inputs)


def turns(engines: dict[str, Run], seconds: float) -> dict[str, NDArray[np.float64]]:
    """Seconds that each engine took in each turn, taking turns for ``seconds`` after a warm-up.

    In another order every turn: ONNX Runtime's threads spin on for a while and disturb whoever comes next.
    """
    taken: dict[str, list[float]] = {name: [] for name in engines}
    names, order = list(engines), np.random.default_rng(0)
    for run in engines.values():
        run()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(next(iter(taken.values()))) < 3:
        for name in order.permutation(names):
            start = time.perf_counter()
            engines[name]()
            taken[name].append(time.perf_counter() - start)
    return {name: np.array(times) for name, times in taken.items()}


def models_at(folder: Path, checkpoint: Checkpoint, size: int, *, int8_only: bool) -> dict[str, bytes]:
    """The graphs of all engines for ``size x size`` latents."""
    config = dict(checkpoint.model.config) | {"sample_size": size}
    probe = checkpoint.probe
    sample = np.zeros((*probe.sample.shape[:3], size, size), np.float32)
    sized = replace(
        checkpoint,
        model=replace(checkpoint.model, config=config),
        probe=replace(probe, sample=sample, prediction=sample),
    )
    kinds = {
        "int8": varied(sized, steps=False),
        "int8, scales by step": varied(sized, steps=True),
        "int8, scales and zero points by step": varied(sized, steps=True, asymmetric=True),
    }
    graphs = {name: serialized(export_graph(kind, "openvino").model) for name, kind in kinds.items()}
    return graphs if int8_only else graphs | {"float": float_onnx(folder, sized)}


def measure(models: dict[str, bytes], size: int, batch: int, seconds: float, threads: int) -> list[tuple[str, ...]]:
    """One row per engine: milliseconds, and how many times faster than ONNX Runtime's float32."""
    sample = np.random.default_rng(0).standard_normal((batch, 4, size, size), np.float32)
    inputs: Inputs = {"sample": sample, "timestep": np.array(500, np.float32)}
    int8 = [name for name in models if name != "float"]
    engines = {f"OpenVINO {name}": openvino_engine(models[name], "f32", inputs, threads) for name in int8}
    base = "ONNX Runtime float32"
    if "float" in models:
        engines["OpenVINO float32"] = openvino_engine(models["float"], "f32", inputs, threads)
        engines["OpenVINO bfloat16"] = openvino_engine(models["float"], "bf16", inputs, threads)
        engines[base] = onnxruntime_engine(models["float"], inputs, threads)
    times = turns(engines, seconds)
    rows: list[tuple[str, ...]] = []
    for name, each in times.items():
        faster = f"{np.median(times[base] / each):.2f}" if base in times else ""
        share = f"{np.median(each / times['OpenVINO int8']):.3f}"
        rows.append((f"{size}x{size}", str(batch), name, f"{1e3 * np.median(each):.1f}", faster, share))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[32, 64])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=60, help="per size and batch")
    parser.add_argument("--threads", type=int, default=0, help="0: as many as there are cores")
    parser.add_argument("--int8-only", action="store_true", help="leave the float engines out")
    arguments = parser.parse_args()
    header = ("latents", "batch", "engine", "ms", "times ONNX Runtime", "share of int8")
    with tempfile.TemporaryDirectory() as name:
        save_model(Path(name))
        checkpoint = checkpoint_of(Path(name))
        for size in arguments.sizes:
            models = models_at(Path(name), checkpoint, size, int8_only=arguments.int8_only)
            for batch in arguments.batches:
                rows = measure(models, size, batch, arguments.seconds, arguments.threads)
                print(table(header, rows, right=(1, 3, 4, 5)), "", sep="\n", flush=True)


if __name__ == "__main__":
    main()
