"""``dmq-export trt-build``: from an ONNX file to a TensorRT plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmq_export.errors import DmqError
from dmq_export.files import require_file
from dmq_export.lint import lint_model, require_buildable
from dmq_export.lint.view import QdqGraph
from dmq_export.memory import in_words
from dmq_export.onnx_file import external_files, facts_of, input_sizes, load_onnx

if TYPE_CHECKING:
    import onnx_ir as ir

    from engines.tensorrt.build import BuildSettings, Source
    from engines.tensorrt.inspector import EngineLayers
    from engines.tensorrt.plan_file import PlanFacts
    from engines.tensorrt.profile import ShapeRange


@dataclass(frozen=True)
class Build:
    """A written plan."""

    path: Path
    facts_path: Path
    plan_bytes: int
    facts: PlanFacts
    layers: EngineLayers

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {
            "plan": str(self.path),
            "bytes": self.plan_bytes,
            "layers": dict(self.layers.counts),
            "not_integer": list(self.layers.not_integer),
            "unseen": list(self.layers.unseen),
        }

    def text(self) -> str:
        """What the engine is made of, then where it is."""
        machine = self.facts.machine
        return (
            f"{self.layers.text()}\n\n{self.path}  {in_words(self.plan_bytes)}  for {machine.gpu}, "
            f"{machine.title}\n{self.facts_path} says what it is and must stay beside it"
        )


def build_engine(
    onnx: Path, output: Path, shapes: dict[str, ShapeRange], settings: BuildSettings, note: Callable[[str], None]
) -> Build:
    """Lint ``onnx``, then build it; the plan and its ``engine.json`` are written together or not at all.

    Args:
        shapes: of the inputs whose size is open.
        note: receives the linter's warnings, and what is about to happen.

    Raises:
        CheckFailedError: the linter finds errors.
        DmqError: bad input, TensorRT or a GPU is missing, or TensorRT refuses.
    """
    from engines.tensorrt.build import build_plan
    from engines.tensorrt.environment import require_tensorrt
    from engines.tensorrt.plan_file import facts_path, save_plan

    if output.suffix != ".plan":
        raise DmqError(f"{output} must end in .plan, as sample expects")
    require_file(output)
    source = read_source(onnx, shapes, note)
    machine = require_tensorrt()
    note(f"building for {machine.gpu} with {machine.title}; this takes minutes")
    plan = build_plan(source, settings, machine)
    save_plan(plan.content, output, plan.facts)
    return Build(output, facts_path(output), len(plan.content), plan.facts, plan.layers)


def read_source(onnx: Path, shapes: dict[str, ShapeRange], note: Callable[[str], None]) -> Source:
    """What is built from the file ``onnx``, once it has passed the linter.

    Raises:
        CheckFailedError: the linter finds errors.
        DmqError: the file is no ONNX file, or an input's size stays open.
    """
    from engines.tensorrt.build import Source
    from engines.tensorrt.profile import resolve_shapes

    model = load_onnx(onnx)
    findings = lint_model(model)
    require_buildable(findings, str(onnx))
    note(f"{onnx} keeps TensorRT's rules, {len(findings)} warnings (dmq-export lint shows them)")
    nodes = integer_nodes(model)
    return Source(
        path=onnx,
        shapes=resolve_shapes(input_sizes(model), shapes),
        integer_nodes=nodes,
        layers=tuple(dict.fromkeys(name.rpartition("/")[0] or name for name in nodes)),
        external=tuple(external_files(model, onnx.parent)),
        facts=facts_of(model),
    )


def integer_nodes(model: ir.Model) -> tuple[str, ...]:
    """Names of the convolutions and matrix products whose data and weights are both quantized to 8 bits."""
    return tuple(node.name for node in QdqGraph(model).integer_operators() if node.name)
