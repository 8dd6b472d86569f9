"""``dmq-export lint``: what TensorRT-RTX or TensorRT would say of an ONNX file, by rules or by the compiler itself."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmq_export.graph.onnx_file import load_onnx
from dmq_export.lint import Finding, LintTarget, errors, findings_table, lint_model
from dmq_export.lint.finding import SEVERITIES

if TYPE_CHECKING:
    from dmq_export.commands.compilation import Compilation
    from engines.tensorrt.profile import ShapeRange


@dataclass(frozen=True)
class Lint:
    """The findings of one file.

    Attributes:
        findings: of the rules; with a compilation also what the compiler refuses, and where the two disagree.
        compilation: what the compiler made of the file; None where it was not asked.
    """

    path: Path
    target: LintTarget
    findings: tuple[Finding, ...]
    compilation: Compilation | None = None

    @property
    def ok(self) -> bool:
        """Whether the runtime takes the file; the compiler's word counts where it was asked."""
        return not errors(self.findings) if self.compilation is None else self.compilation.built

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        found = [asdict(finding) | {"layer": finding.layer} for finding in self.findings]
        compiled = None if self.compilation is None else self.compilation.to_json()
        return {
            "file": str(self.path),
            "target": asdict(self.target),
            "ok": self.ok,
            "findings": found,
            "compiler": compiled,
        }

    def text(self) -> str:
        """The findings as tables, then the verdict."""
        counts = [sum(finding.severity == severity for finding in self.findings) for severity in SEVERITIES]
        parts = [f"{count} {severity}" for count, severity in zip(counts, SEVERITIES, strict=True) if count]
        refused = len(errors(self.findings))
        what = f" ({', '.join(parts)})" if parts else ""
        verdict = f"{self.path}: {refused} errors, {len(self.findings) - refused} warnings{what}"
        lines = [findings_table(self.findings), ""] if self.findings else []
        said = [] if self.compilation is None else [self.compilation.text()]
        return "\n".join([*lines, verdict, *said])


def lint_file(
    path: str | Path, target: LintTarget | None = None, shapes: Mapping[str, ShapeRange] | None = None
) -> Lint:
    """Check the ONNX file ``path`` by the rules, and with ``shapes`` by the compiler too.

    Args:
        target: whose rules; None for those of TensorRT-RTX.
        shapes: of inputs of open size, for the compiler; if empty, open sizes count as 1. None: do not compile.

    Raises:
        DmqError: it is no ONNX file, or the compiler is not installed or not that of ``target``.
    """
    path, target = Path(path), target or LintTarget()
    model = load_onnx(path)
    findings = lint_model(model, target)
    if shapes is None:
        return Lint(path, target, findings)
    from dmq_export.commands.compilation import compile_file, compiler_findings

    compilation = compile_file(path, model, target, shapes)
    merged = (*findings, *compiler_findings(compilation, findings))
    return Lint(path, target, tuple(sorted(merged, key=lambda each: SEVERITIES.index(each.severity))), compilation)
