"""``dmq-export onnx``: from a checkpoint to a verified ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.checkpoint import Checkpoint, load_checkpoint
from dmq_export.errors import CheckFailedError
from dmq_export.files import require_writable
from dmq_export.progress import Progress
from dmq_export.table import table
from dmq_export.verify import TOLERANCE, LayerCheck, check_layer, relative_error, require_equal, rms_ratio

if TYPE_CHECKING:
    from calib.reference import ReferenceModel
    from engines.ort import OnnxSession

PERTURBATION = 1e-6  # relative change of the input that shows how far two correct executions may drift
DRIFT_FACTOR = 3.0  # how much further than that the graph may be


@dataclass(frozen=True)
class StepDrift:
    """End-to-end differences of one evaluation, as root mean squares relative to the prediction.

    Attributes:
        graph: of the ONNX graph to the reference.
        perturbed: of the reference with its input changed by 1e-6 to itself.
        quantization: of the reference to the float model.
    """

    timestep: float
    graph: float
    perturbed: float
    quantization: float


@dataclass(frozen=True)
class Export:
    """What was written and how it compares.

    Attributes:
        quantized_bytes: of everything that belongs to quantized layers.
        float32_bytes: of the same layers' weights and biases in float32.
        checks: layer by layer over all probes; empty without verification.
        drift: end to end, one per probed step; empty without verification.
    """

    path: Path
    file_bytes: int
    quantized_bytes: int
    float32_bytes: int
    checks: tuple[LayerCheck, ...]
    drift: tuple[StepDrift, ...]

    def text(self) -> str:
        """Sizes, then what the verification found."""
        ratio = self.quantized_bytes / self.float32_bytes
        lines = [
            f"{self.path}  {self.file_bytes / 1024:.0f} KiB",
            f"quantized layers take {self.quantized_bytes / 1024:.0f} KiB, {ratio:.3f} of their float32 size",
        ]
        if not self.checks:
            return "\n".join([*lines, "not verified"])
        worst = max(max(check.input_error, check.output_error) for check in self.checks)
        ties = sum(check.ties for check in self.checks)
        lines.append(
            f"verified: {len(self.checks)} comparisons with the reference on identical inputs, all codes equal "
            f"({ties} at ties), largest relative error {worst:.1e}"
        )
        rows = [
            (f"{step.timestep:g}", f"{step.graph:.1e}", f"{step.perturbed:.1e}", f"{step.quantization:.1e}")
            for step in self.drift
        ]
        header = ("timestep", "graph to reference", "reference, input changed by 1e-6", "reference to float")
        return "\n".join([*lines, "", table(header, rows, right=(0, 1, 2, 3))])


def export_onnx(checkpoint_folder: Path, output: Path, progress: Progress, *, verify: bool = True) -> Export:
    """Export the checkpoint to the portable graph and prove it equal to the PyTorch reference.

    Raises:
        DmqError: the checkpoint or the output path is bad.
        CheckFailedError: the graph differs from the reference; nothing is written then.
    """
    from dmq_export.export import layer_bytes, onnx_model, save_onnx

    require_writable(output)
    checkpoint = load_checkpoint(checkpoint_folder)
    with progress.stage("ONNX", 1, "graph") as advance:
        model = onnx_model(checkpoint)
        advance(1)
    checks, drift = _verify(model, checkpoint, progress) if verify else ((), ())
    save_onnx(model, output)
    float32_elements = sum(
        layer.codes.size + (0 if layer.bias is None else layer.bias.size) for layer in checkpoint.layers
    )
    return Export(
        path=output,
        file_bytes=output.stat().st_size,
        quantized_bytes=layer_bytes(model, checkpoint.layers),
        float32_bytes=4 * float32_elements,
        checks=checks,
        drift=drift,
    )


def _verify(
    model: Any, checkpoint: Checkpoint, progress: Progress
) -> tuple[tuple[LayerCheck, ...], tuple[StepDrift, ...]]:
    import torch

    from calib.reference import load_reference
    from dmq_export.cut import cut_graph
    from dmq_export.export import serialized
    from engines.ort import OnnxSession

    reference = load_reference(checkpoint, torch.device("cpu"))
    whole = OnnxSession(serialized(model))
    cut = model.clone()
    cut_graph(cut, [layer.spec.name for layer in checkpoint.layers])
    pieces = OnnxSession(serialized(cut))
    checks: list[LayerCheck] = []
    drift: list[StepDrift] = []
    with progress.stage("verification", len(checkpoint.probe.timesteps), "step") as advance:
        for step in range(len(checkpoint.probe.timesteps)):
            checks += _check_layers(checkpoint, step, reference, pieces)
            require_equal(checks)
            drift.append(_drift(checkpoint, step, reference, whole))
            advance(1)
    _require_no_drift(drift)
    return tuple(checks), tuple(drift)


def _check_layers(
    checkpoint: Checkpoint, step: int, reference: ReferenceModel, pieces: OnnxSession
) -> list[LayerCheck]:
    """Every layer of the cut graph at one probed step, and the network's output as the last "layer"."""
    import torch

    from calib.reference import record_layers
    from dmq_export.cut import cut_inputs, cut_outputs
    from dmq_export.trace import OUTPUT

    probe = checkpoint.probe
    conditioning = {name: torch.from_numpy(value) for name, value in probe.conditioning.items()}
    sample, timestep = torch.from_numpy(probe.sample[step]), float(probe.timesteps[step])
    values, prediction = record_layers(reference, sample, timestep, conditioning)
    outputs = pieces.run({**_inputs(checkpoint, step), **cut_inputs(values)})
    graph = cut_outputs(outputs, list(values))
    checks = [
        check_layer(layer, reference.index.row, values[layer.spec.name], graph[layer.spec.name])
        for layer in checkpoint.layers
    ]
    last = relative_error(prediction.numpy(), outputs[OUTPUT])
    return [*checks, LayerCheck("(network output)", 0, 0, last, 0.0)]


def _drift(checkpoint: Checkpoint, step: int, reference: ReferenceModel, whole: OnnxSession) -> StepDrift:
    import torch

    probe = checkpoint.probe
    conditioning = {name: torch.from_numpy(value) for name, value in probe.conditioning.items()}
    timestep = float(probe.timesteps[step])

    def predict(sample: NDArray[np.float32]) -> NDArray[np.float32]:
        prediction: NDArray[np.float32] = reference(torch.from_numpy(sample), timestep, **conditioning).numpy()
        return prediction

    sample = probe.sample[step]
    signs = np.random.Generator(np.random.Philox(step)).choice([-1, 1], sample.shape)
    expected = predict(sample)
    (prediction,) = whole.run(_inputs(checkpoint, step)).values()
    perturbed = predict((sample * (1 + PERTURBATION * signs)).astype(np.float32))
    return StepDrift(
        timestep=timestep,
        graph=rms_ratio(prediction - expected, expected),
        perturbed=rms_ratio(perturbed - expected, expected),
        quantization=rms_ratio(expected - probe.prediction[step], expected),
    )


def _require_no_drift(drift: list[StepDrift]) -> None:
    """The graph may drift as far as rounding alone takes the reference, and never as far as quantization did.

    Raises:
        CheckFailedError: naming the step.
    """
    for step in drift:
        allowed = DRIFT_FACTOR * step.perturbed + TOLERANCE
        if step.graph > allowed or step.graph > step.quantization:
            raise CheckFailedError(
                f"timestep {step.timestep:g}: the graph's prediction differs by {step.graph:.1e} from the "
                f"reference; rounding explains {step.perturbed:.1e}, quantization itself costs {step.quantization:.1e}"
            )


def _inputs(checkpoint: Checkpoint, step: int) -> dict[str, NDArray[Any]]:
    probe = checkpoint.probe
    return {"sample": probe.sample[step], "timestep": probe.timesteps[step], **probe.conditioning}
