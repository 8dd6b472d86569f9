"""How far each backend's samples are from the PyTorch reference's, against what quantization costs.

    python bench/backends.py checkpoint model.onnx...          # about two minutes for the bundled model

All start from the same noise. "One evaluation" is the prediction at each calibrated timestep on the float model's own
trajectory, the mean over the steps; "samples" are what 20 steps of it end in. Both are root mean squares of the
difference from the reference, as a share of the reference's own difference from the float model, and in decibels. The
yardstick is the reference itself with every layer's input changed by a relative 1e-6, what another order of summation
does to it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from calib.model.denoiser import TorchDenoiser
from calib.model.fake_quantized import load_fake_quantized, perturbed
from dmq_export.checkpoint import load_checkpoint
from dmq_export.commands.engine import Backend, Engine, Execution, float_engine, open_engine
from dmq_export.commands.sampler import Arrays, SampleSettings, conditioning_for, draw_samples
from dmq_export.common.progress import Progress
from dmq_export.common.table import table

Array = NDArray[np.float32]
CPU = torch.device("cpu")
BACKENDS: tuple[Backend, ...] = ("onnxruntime", "openvino")


def float_trajectory(engine: Engine, settings: SampleSettings) -> tuple[list[tuple[Array, float, Arrays]], Array]:
    """What the float model was asked at every step, and the samples it ended in."""
    asked: list[tuple[Array, float, Arrays]] = []

    def noted(sample: Array, timestep: float, **conditioning: Array) -> Array:
        asked.append((sample, timestep, conditioning))
        return engine.denoise(sample, timestep, **conditioning)

    return asked, drawn(replace(engine, denoise=noted), settings)


def drawn(engine: Engine, settings: SampleSettings) -> Array:
    """All samples in one batch."""
    conditioning = conditioning_for(engine.metadata, settings)
    return draw_samples(engine, settings, Progress(show=False), conditioning)


def rms(values: Array) -> float:
    return float(np.sqrt(np.square(values.astype(np.float64)).mean()))


def rows(checkpoint: Path, graphs: list[Path], model: str, settings: SampleSettings) -> Iterator[tuple[str, ...]]:
    """The yardstick's, then one per graph and backend."""
    model_reference = load_fake_quantized(load_checkpoint(checkpoint), CPU)
    metadata = open_engine(checkpoint).metadata
    reference = Engine("reference", "torch", TorchDenoiser(model_reference, CPU), metadata)
    asked, float_samples = float_trajectory(float_engine(model, reference), settings)
    float_said = [float_engine(model, reference).denoise(x, t, **given) for x, t, given in asked]
    said = [reference.denoise(x, t, **given) for x, t, given in asked]
    samples = drawn(reference, settings)
    costs = [rms(one - other) for one, other in zip(said, float_said, strict=True)]

    def compared(engine: Engine) -> Iterator[str]:
        drifts = [rms(engine.denoise(x, t, **given) - one) for (x, t, given), one in zip(asked, said, strict=True)]
        yield from _share(float(np.mean([drift / cost for drift, cost in zip(drifts, costs, strict=True)])))
        yield from _share(rms(drawn(engine, settings) - samples) / rms(samples - float_samples))

    with perturbed(model_reference, 1e-6, seed=0):
        yield (str(checkpoint), "torch, perturbed", *compared(reference))
    for graph in graphs:
        for backend in BACKENDS:
            yield (str(graph), backend, *compared(open_engine(graph, Execution(backend))))


def _share(share: float) -> tuple[str, str]:
    return f"{share:.2f}", f"{20 * np.log10(share):.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("graph", type=Path, nargs="+")
    parser.add_argument("--reference", default="digits", help="the float model")
    parser.add_argument("--num", type=int, default=30)
    parser.add_argument("--null-label", type=int, default=10)
    arguments = parser.parse_args()
    settings = SampleSettings(count=arguments.num, batch=arguments.num, null_label=arguments.null_label)
    header = ("graph", "backend", "one evaluation", "", "samples", "")
    result = list(rows(arguments.checkpoint, arguments.graph, arguments.reference, settings))
    print(table(header, result, right=range(2, len(header))))


if __name__ == "__main__":
    main()
