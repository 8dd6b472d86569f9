"""The rules of TensorRT-RTX and TensorRT for quantized ONNX graphs, checked without either.

Works on any graph with QuantizeLinear/DequantizeLinear, whoever made it.
"""

from dmq_export.lint.finding import Finding, Severity, errors, findings_table
from dmq_export.lint.linter import RULES, lint_model, require_buildable
from dmq_export.lint.target import LintTarget, lint_target

__all__ = [
    "RULES",
    "Finding",
    "LintTarget",
    "Severity",
    "errors",
    "findings_table",
    "lint_model",
    "lint_target",
    "require_buildable",
]
