"""``dmq-export inspect``: what a checkpoint, an ONNX file or a plan is."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmq_export.common.memory import in_words
from dmq_export.common.table import table
from dmq_export.errors import DmqError
from dmq_export.summary import CheckpointSummary, OnnxSummary, inspect_checkpoint, inspect_onnx

if TYPE_CHECKING:
    from engines.tensorrt.plan_file import PlanMetadata


@dataclass(frozen=True)
class PlanSummary:
    """A plan, as the file beside it describes it; ``intact``: whether its hash is the recorded one."""

    path: Path
    file_bytes: int
    intact: bool
    metadata: PlanMetadata

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"kind": "plan", **asdict(self), "path": str(self.path)}

    def text(self) -> str:
        """Where it runs, what it takes, what it is made of."""
        metadata = self.metadata
        shapes = [
            (name, *("x".join(map(str, shape)) or "scalar" for shape in (each.minimum, each.optimum, each.maximum)))
            for name, each in metadata.shapes.items()
        ]
        known = metadata.metadata
        model = "a model of another tool" if known is None else f"{known.get('bits')} {known.get('model')}"
        state = "as built" if self.intact else "CHANGED since it was built: it will be refused"
        return "\n\n".join(
            [
                f"plan {self.path} of {model}, {in_words(self.file_bytes)}, {state}\n{_where(metadata)}",
                table(("input", "smallest", "most frequent", "largest"), shapes),
                _made_of(metadata),
                "from " + ", ".join(f"{name} ({digest[:12]})" for name, digest in metadata.onnx_sha256.items()),
            ]
        )


def _where(metadata: PlanMetadata) -> str:
    """What built it, and where it runs."""
    machine = metadata.machine
    built = f"built with {machine.title} on {machine.platform}"
    if metadata.runtime == "tensorrt-rtx":
        return f"{built} for GPUs of compute capability {', '.join(metadata.capabilities)}"
    return (
        f"{built} for {machine.gpu} (compute capability {machine.compute_capability})\n"
        f"version compatible: {_yes(metadata.version_compatible)}, hardware compatible: "
        f"{metadata.hardware_compatible}, weights inside: {_yes(not metadata.stripped)}"
    )


def _made_of(metadata: PlanMetadata) -> str:
    from engines.tensorrt.summary import summary_text

    if metadata.kernels is not None:
        return summary_text(metadata.kernels, metadata.float16)
    return table(
        ("engine layers", "count"), [(name, str(count)) for name, count in metadata.layers.items()], right=(1,)
    )


def inspect(path: str | Path) -> CheckpointSummary | OnnxSummary | PlanSummary:
    """Summarize a checkpoint folder, an ``.onnx`` file or a ``.plan``; nothing of a plan is executed.

    Raises:
        DmqError: it is none of these, or is damaged.
    """
    path = Path(path)
    if path.is_dir():
        return inspect_checkpoint(path)
    if path.suffix == ".plan":
        return _inspect_plan(path)
    if path.suffix == ".onnx":
        return inspect_onnx(path)
    raise DmqError(f"{path} is nothing to inspect: give a checkpoint folder, an .onnx file or a .plan")


def _inspect_plan(path: Path) -> PlanSummary:
    from engines.tensorrt.plan_file import read_plan_metadata

    metadata = read_plan_metadata(path)
    content = path.read_bytes()
    return PlanSummary(path, len(content), hashlib.sha256(content).hexdigest() == metadata.sha256, metadata)


def _yes(value: bool) -> str:
    return "yes" if value else "no"
