"""``dmq-export onnx``: from a checkpoint to a verified ONNX file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dmq_export.batch import Batch
from dmq_export.checkpoint import Checkpoint, load_checkpoint
from dmq_export.commands.verify import Verification
from dmq_export.commands.verify import verify as verify_graph
from dmq_export.common.extras import install
from dmq_export.common.files import require_file
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.layer import QuantizedLayer
from dmq_export.lint import Finding, findings_table, lint_model, require_buildable
from dmq_export.target import FloatType, Target, usual_type

if TYPE_CHECKING:
    from dmq_export.graph.export import ExportedGraph


@dataclass(frozen=True)
class Export:
    """What was written and how it compares.

    Attributes:
        quantized_bytes: of everything that belongs to quantized layers.
        float32_bytes: of the same layers' weights and biases in float32.
        scaled: why the LES and PTS factors stay a Mul before the quantizer, by layer.
        findings: of TensorRT's rules; None for other targets.
        verification: None where it was not asked for.
    """

    path: Path
    file_bytes: int
    quantized_bytes: int
    float32_bytes: int
    scaled: dict[str, str]
    findings: tuple[Finding, ...] | None
    verification: Verification | None

    @property
    def notes(self) -> list[str]:
        """What the user should know of the verification."""
        missing = () if self.verification is None else self.verification.missing
        return [f"not executed by {runtime}, which is not installed: {install(runtime.lower())}" for runtime in missing]

    def text(self) -> str:
        """Sizes, then what the verification found."""
        ratio = self.quantized_bytes / self.float32_bytes
        lines = [
            f"{self.path}  {self.file_bytes / 1024:.0f} KiB",
            f"quantized layers take {self.quantized_bytes / 1024:.0f} KiB, {ratio:.3f} of their float32 size",
            *_scaled_lines(self.scaled),
            *([] if self.findings is None else [findings_table(self.findings), ""]),
            *(_verification_lines(self.verification) if self.verification else ["not verified"]),
        ]
        return "\n".join(lines)


def export_onnx(
    checkpoint_folder: str | Path,
    output: str | Path,
    progress: Progress | None = None,
    *,
    target: Target = "portable",
    dtype: FloatType | None = None,
    batch: Batch | None = None,
    verify: bool = True,
) -> Export:
    """Export the checkpoint and prove the graph equal to the PyTorch reference.

    Args:
        target: the runtime whose kernels the graph is for.
        dtype: of all that is not integer; None for float16 where TensorRT is to run it, else float32.
        batch: the sizes that the graph takes; None for any.
        verify: False writes the graph without the proof.

    Raises:
        DmqError: the checkpoint or the output path is bad.
        CheckFailedError: TensorRT would refuse the graph, or it differs from the reference; nothing is written then.
    """
    from dmq_export.graph.export import data_path, layer_bytes, save_onnx

    output, progress = Path(output), progress or Progress()
    require_file(output)
    checkpoint = load_checkpoint(Path(checkpoint_folder))
    with progress.stage("ONNX", 1, "graph") as advance:
        graph = export_graph(checkpoint, target, dtype or usual_type(target), batch)
        advance(1)
    findings = lint_model(graph.model) if graph.target == "tensorrt" else None
    require_buildable(findings or (), str(output))
    verification = verify_graph(graph, checkpoint, progress) if verify else None
    save_onnx(graph.model, output)
    return Export(
        path=output,
        file_bytes=sum(path.stat().st_size for path in (output, data_path(output)) if path.is_file()),
        quantized_bytes=layer_bytes(graph.model, checkpoint.layers),
        float32_bytes=sum(_float32_bytes(layer) for layer in checkpoint.layers),
        scaled=graph.scaled,
        findings=findings,
        verification=verification,
    )


def export_graph(
    checkpoint: Checkpoint, target: Target = "portable", dtype: FloatType = "float32", batch: Batch | None = None
) -> ExportedGraph:
    """The graph of ``checkpoint`` for ``target``, in memory; any batch size where ``batch`` does not fix one.

    Raises:
        ExportError: the model cannot be traced, or a layer cannot be lowered.
    """
    from calib.model.trace import trace_network
    from dmq_export.graph.export import lower_graph, require_type

    require_type(target, dtype)  # before the tracing, which takes its time
    return lower_graph(trace_network(checkpoint), checkpoint, target, dtype, batch)


def _float32_bytes(layer: QuantizedLayer) -> int:
    return 4 * (layer.codes.size + (0 if layer.bias is None else layer.bias.size))


def _scaled_lines(scaled: dict[str, str]) -> list[str]:
    """Where factors stay a Mul, and why."""
    if not scaled:
        return []
    rows = list(scaled.items())
    return [f"{len(rows)} layers keep a Mul by their LES and PTS factors:", "", table(("layer", "because"), rows), ""]


def _verification_lines(verification: Verification) -> list[str]:
    rows = [
        (f"{step.timestep:g}", step.runtime, f"{step.graph:.1e}", f"{step.perturbed:.1e}", f"{step.quantization:.1e}")
        for step in verification.drift
    ]
    header = ("timestep", "executed by", "graph to reference", "reference, perturbed", "reference to float")
    return [
        f"verified: {len(verification.checks)} comparisons with the reference on identical inputs, all codes equal "
        f"but for {verification.ties} at ties, largest relative error {verification.largest_error:.1e}",
        "",
        table(header, rows, right=(0, 2, 3, 4)),
    ]
