"""Compares an exported graph with the PyTorch reference: layer by layer, then end to end.

See :mod:`dmq_export.graph.compare` for why the proof is layer by layer. End to end the graph may drift from the
reference about as far as the reference drifts from itself when every layer's input changes by what another order of
summation would change it, or, where that happens to flip no code at all, as far as quantization itself went.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from dmq_export.checkpoint import Checkpoint
from dmq_export.common.progress import Progress
from dmq_export.errors import CheckFailedError
from dmq_export.graph.compare import (
    FLOAT16,
    FLOAT32,
    TOLERANCE,
    LayerComparison,
    compare_layer,
    relative_error,
    require_equal,
    rms_ratio,
)

if TYPE_CHECKING:
    from calib.model.fake_quantized import FakeQuantizedModel
    from dmq_export.graph.export import ExportedGraph

PRECISIONS = {"float32": FLOAT32, "float16": FLOAT16}
PERTURBATION = {"float32": 1e-6, "float16": 1e-3}  # relative, of every layer's input
PERTURBED_RUNS = 4
DRIFT_FACTOR = 3.0  # how much further than the furthest of these runs the graph may be
ONNX_RUNTIME, OPENVINO = "ONNX Runtime", "OpenVINO"


class Session(Protocol):
    """A loaded graph."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name."""


@dataclass(frozen=True)
class Executor:
    """A graph in one runtime: as it is, and cut at every layer."""

    runtime: str
    whole: Session
    pieces: Session


@dataclass(frozen=True)
class StepDrift:
    """End-to-end differences of one evaluation, as root mean squares relative to the prediction.

    Attributes:
        graph: of the ONNX graph to the reference, executed by ``runtime``.
        perturbed: of the reference to itself with every layer's input changed by 1e-6 (float16: 1e-3); the largest of
            several runs.
        quantization: of the reference to the float model.
    """

    timestep: float
    graph: float
    perturbed: float
    quantization: float
    runtime: str = ONNX_RUNTIME


@dataclass(frozen=True)
class Verification:
    """What was compared, and how it came out.

    Attributes:
        checks: layer by layer, over all probed steps, in all runtimes.
        missing: runtimes that the graph is for and that are not installed.
    """

    checks: tuple[LayerComparison, ...]
    drift: tuple[StepDrift, ...]
    missing: tuple[str, ...] = ()

    @property
    def ties(self) -> int:
        return sum(check.ties for check in self.checks)

    @property
    def largest_error(self) -> float:
        return max(max(check.input_error, check.output_error) for check in self.checks)


def verify(graph: ExportedGraph, checkpoint: Checkpoint, progress: Progress) -> Verification:
    """Prove ``graph`` equal to the reference on the checkpoint's probe, executed by ONNX Runtime.

    A graph for OpenVINO is executed by OpenVINO too, where that is installed.

    Raises:
        CheckFailedError: it is not; the message names the first layer that differs.
    """
    import torch

    from calib.model.fake_quantized import load_fake_quantized

    if graph.batch is not None and graph.batch.fixed is not None:
        checkpoint = replace(checkpoint, probe=checkpoint.probe.resized(graph.batch.fixed))
    reference = load_fake_quantized(checkpoint, torch.device("cpu"))
    wanted = (ONNX_RUNTIME, OPENVINO) if graph.target == "openvino" else (ONNX_RUNTIME,)
    missing = tuple(runtime for runtime in wanted if runtime == OPENVINO and find_spec("openvino") is None)
    executors = _executors(graph, [runtime for runtime in wanted if runtime not in missing])
    checks: list[LayerComparison] = []
    drift: list[StepDrift] = []
    with progress.stage("verification", len(checkpoint.probe.timesteps), "step") as advance:
        for step in range(len(checkpoint.probe.timesteps)):
            for executor in executors:
                layers = _check_layers(checkpoint, step, reference, executor, graph)
                require_equal(layers, executor.runtime)
                checks += layers
            drift += _drift(checkpoint, step, reference, executors, PERTURBATION[graph.dtype])
            advance(1)
    _require_no_drift(drift)
    return Verification(tuple(checks), tuple(drift), missing)


def _executors(graph: ExportedGraph, runtimes: list[str]) -> list[Executor]:
    from dmq_export.graph.export import loadable
    from dmq_export.graph.float16_sums import keep_float16_sums
    from dmq_export.graph.isolate import isolate_layers

    cut = graph.model.clone()
    isolate_layers(cut, graph.lowered_layers)
    if graph.dtype == "float16":
        keep_float16_sums(cut)
    with loadable(graph.model) as whole, loadable(cut) as pieces:
        return [Executor(runtime, _session(runtime)(whole), _session(runtime)(pieces)) for runtime in runtimes]


def _session(runtime: str) -> Callable[[Path | bytes], Session]:
    if runtime == OPENVINO:
        from engines.openvino import OpenVinoSession

        return OpenVinoSession
    from engines.onnxruntime import OnnxSession

    return OnnxSession


def _check_layers(
    checkpoint: Checkpoint, step: int, reference: FakeQuantizedModel, executor: Executor, graph: ExportedGraph
) -> list[LayerComparison]:
    """Every layer of the cut graph at one probed step, and the network's output as the last "layer"."""
    from calib.model.fake_quantized import record_layers
    from dmq_export.graph.isolate import isolated_inputs, isolated_outputs
    from dmq_export.graph.marker import OUTPUT

    values, prediction = record_layers(reference, *_tensors(checkpoint, step))
    row, lowered_layers = reference.row_of(float(checkpoint.probe.timesteps[step])), graph.lowered_layers
    precision = PRECISIONS[graph.dtype]
    outputs = executor.pieces.run({**_arrays(checkpoint, step), **isolated_inputs(lowered_layers, values, row)})
    said = isolated_outputs(lowered_layers, outputs, row)
    if executor.runtime == OPENVINO:
        lowered_layers = {name: lowered.zero_point_added() for name, lowered in lowered_layers.items()}
    names = [(layer, layer.spec.name) for layer in checkpoint.layers]
    checks = [
        compare_layer(layer, lowered_layers[name], row, values[name], said[name], precision) for layer, name in names
    ]
    last = relative_error(prediction.numpy(), outputs[OUTPUT])
    return [*checks, LayerComparison("(network output)", 0, 0, last, 0.0, precision.tolerance)]


def _drift(
    checkpoint: Checkpoint, step: int, reference: FakeQuantizedModel, executors: list[Executor], relative: float
) -> list[StepDrift]:
    """One probed step, in each runtime."""
    from calib.model.fake_quantized import perturbed

    sample, timestep, conditioning = _tensors(checkpoint, step)
    expected = reference(sample, timestep, **conditioning).numpy()
    others = []
    for run in range(PERTURBED_RUNS):
        with perturbed(reference, relative, seed=run):
            others.append(reference(sample, timestep, **conditioning).numpy())
    perturbed_ratio = max(rms_ratio(other - expected, expected) for other in others)
    quantization = rms_ratio(expected - checkpoint.probe.prediction[step], expected)
    drift = []
    for executor in executors:
        (prediction,) = executor.whole.run(_arrays(checkpoint, step)).values()
        ratio = rms_ratio(prediction - expected, expected)
        drift.append(StepDrift(timestep, ratio, perturbed_ratio, quantization, executor.runtime))
    return drift


def _require_no_drift(drift: list[StepDrift]) -> None:
    """Raise where the graph drifts further than rounding explains and further than quantization went.

    Raises:
        CheckFailedError: naming the step.
    """
    for step in drift:
        allowed = max(DRIFT_FACTOR * step.perturbed, step.quantization) + TOLERANCE
        if not step.graph <= allowed:  # NaN is not
            raise CheckFailedError(
                f"timestep {step.timestep:g}: the graph's prediction differs by {step.graph:.1e} from the reference, "
                f"executed by {step.runtime}; rounding explains {step.perturbed:.1e}, quantization itself costs "
                f"{step.quantization:.1e}"
            )


def _tensors(checkpoint: Checkpoint, step: int) -> tuple[Any, float, dict[str, Any]]:
    """Sample, timestep and conditioning of a probed step for the reference."""
    import torch

    probe = checkpoint.probe
    conditioning = {name: torch.from_numpy(value) for name, value in probe.conditioning.items()}
    return torch.from_numpy(probe.sample[step]), float(probe.timesteps[step]), conditioning


def _arrays(checkpoint: Checkpoint, step: int) -> dict[str, NDArray[Any]]:
    """The same for ONNX Runtime."""
    probe = checkpoint.probe
    return {"sample": probe.sample[step], "timestep": np.asarray(probe.timesteps[step]), **probe.conditioning}
