"""Compares an exported graph with the PyTorch reference: layer by layer, then end to end.

See :mod:`dmq_export.verify` for why the proof is layer by layer. End to end the graph may drift from the reference
about as far as the reference drifts from itself when every layer's input changes by what another order of summation
would change it, or, where that happens to flip no code at all, as far as quantization itself went.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.checkpoint import Checkpoint
from dmq_export.errors import CheckFailedError
from dmq_export.progress import Progress
from dmq_export.verify import (
    FLOAT16,
    FLOAT32,
    TOLERANCE,
    LayerCheck,
    check_layer,
    relative_error,
    require_equal,
    rms_ratio,
)

if TYPE_CHECKING:
    from calib.reference import ReferenceModel
    from dmq_export.export import ExportedGraph
    from engines.ort import OnnxSession

PRECISIONS = {"float32": FLOAT32, "float16": FLOAT16}
PERTURBATION = {"float32": 1e-6, "float16": 1e-3}  # relative, of every layer's input
PERTURBED_RUNS = 4
DRIFT_FACTOR = 3.0  # how much further than the furthest of these runs the graph may be


@dataclass(frozen=True)
class StepDrift:
    """End-to-end differences of one evaluation, as root mean squares relative to the prediction.

    Attributes:
        graph: of the ONNX graph to the reference.
        perturbed: of the reference to itself with every layer's input changed by 1e-6 (float16: 1e-3); the largest of
            several runs.
        quantization: of the reference to the float model.
    """

    timestep: float
    graph: float
    perturbed: float
    quantization: float


@dataclass(frozen=True)
class Verification:
    """What was compared, and how it came out; ``checks`` are layer by layer over all probed steps."""

    checks: tuple[LayerCheck, ...]
    drift: tuple[StepDrift, ...]

    @property
    def ties(self) -> int:
        return sum(check.ties for check in self.checks)

    @property
    def largest_error(self) -> float:
        return max(max(check.input_error, check.output_error) for check in self.checks)


def verify(graph: ExportedGraph, checkpoint: Checkpoint, progress: Progress) -> Verification:
    """Prove ``graph`` equal to the reference on the checkpoint's probe.

    Raises:
        CheckFailedError: it is not; the message names the first layer that differs.
    """
    import torch

    from calib.reference import load_reference
    from dmq_export.cut import cut_graph
    from dmq_export.export import loadable
    from engines.ort import OnnxSession

    if graph.batch is not None and graph.batch.fixed is not None:
        checkpoint = replace(checkpoint, probe=checkpoint.probe.resized(graph.batch.fixed))
    reference = load_reference(checkpoint, torch.device("cpu"))
    with loadable(graph.model) as loaded:
        whole = OnnxSession(loaded)
    cut = graph.model.clone()
    cut_graph(cut, graph.forms)
    with loadable(cut) as loaded:
        pieces = OnnxSession(loaded)
    checks: list[LayerCheck] = []
    drift: list[StepDrift] = []
    with progress.stage("verification", len(checkpoint.probe.timesteps), "step") as advance:
        for step in range(len(checkpoint.probe.timesteps)):
            checks += _check_layers(checkpoint, step, reference, pieces, graph)
            require_equal(checks)
            drift.append(_drift(checkpoint, step, reference, whole, PERTURBATION[graph.dtype]))
            advance(1)
    _require_no_drift(drift)
    return Verification(tuple(checks), tuple(drift))


def _check_layers(
    checkpoint: Checkpoint, step: int, reference: ReferenceModel, pieces: OnnxSession, graph: ExportedGraph
) -> list[LayerCheck]:
    """Every layer of the cut graph at one probed step, and the network's output as the last "layer"."""
    from calib.reference import record_layers
    from dmq_export.cut import cut_inputs, cut_outputs
    from dmq_export.trace import OUTPUT

    values, prediction = record_layers(reference, *_tensors(checkpoint, step))
    row, forms = reference.index.row, graph.forms
    precision = PRECISIONS[graph.dtype]
    outputs = pieces.run({**_arrays(checkpoint, step), **cut_inputs(forms, values, row)})
    said = cut_outputs(forms, outputs, row)
    names = [(layer, layer.spec.name) for layer in checkpoint.layers]
    checks = [check_layer(layer, forms[name], row, values[name], said[name], precision) for layer, name in names]
    last = relative_error(prediction.numpy(), outputs[OUTPUT])
    return [*checks, LayerCheck("(network output)", 0, 0, last, 0.0, precision.tolerance)]


def _drift(
    checkpoint: Checkpoint, step: int, reference: ReferenceModel, whole: OnnxSession, relative: float
) -> StepDrift:
    from calib.reference import perturbed

    sample, timestep, conditioning = _tensors(checkpoint, step)
    expected = reference(sample, timestep, **conditioning).numpy()
    (prediction,) = whole.run(_arrays(checkpoint, step)).values()
    others = []
    for run in range(PERTURBED_RUNS):
        with perturbed(reference, relative, seed=run):
            others.append(reference(sample, timestep, **conditioning).numpy())
    return StepDrift(
        timestep=timestep,
        graph=rms_ratio(prediction - expected, expected),
        perturbed=max(rms_ratio(other - expected, expected) for other in others),
        quantization=rms_ratio(expected - checkpoint.probe.prediction[step], expected),
    )


def _require_no_drift(drift: list[StepDrift]) -> None:
    """Raise where the graph drifts further than rounding explains and further than quantization went.

    Raises:
        CheckFailedError: naming the step.
    """
    for step in drift:
        allowed = max(DRIFT_FACTOR * step.perturbed, step.quantization) + TOLERANCE
        if not step.graph <= allowed:  # NaN is not
            raise CheckFailedError(
                f"timestep {step.timestep:g}: the graph's prediction differs by {step.graph:.1e} from the "
                f"reference; rounding explains {step.perturbed:.1e}, quantization itself costs {step.quantization:.1e}"
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
