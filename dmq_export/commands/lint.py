"""``dmq-export lint``: TensorRT's rules for an ONNX file, without TensorRT."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dmq_export.graph.onnx_file import load_onnx
from dmq_export.lint import Finding, errors, findings_table, lint_model


@dataclass(frozen=True)
class Lint:
    """The findings of one file."""

    path: Path
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        """Whether TensorRT would take the file."""
        return not errors(self.findings)

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        found = [asdict(finding) | {"layer": finding.layer} for finding in self.findings]
        return {"file": str(self.path), "ok": self.ok, "findings": found}

    def text(self) -> str:
        """The findings as tables, then the verdict."""
        refused = len(errors(self.findings))
        verdict = f"{self.path}: {refused} errors, {len(self.findings) - refused} warnings"
        return f"{findings_table(self.findings)}\n\n{verdict}" if self.findings else verdict


def lint_file(path: Path) -> Lint:
    """Check the ONNX file ``path``.

    Raises:
        DmqError: it is no ONNX file.
    """
    return Lint(path, lint_model(load_onnx(path)))
