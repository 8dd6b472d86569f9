"""TensorRT's rules for quantized ONNX graphs, checked without TensorRT.

Works on any graph with QuantizeLinear/DequantizeLinear, whoever made it.
"""

from dmq_export.lint.finding import Finding, Severity, errors, findings_table
from dmq_export.lint.linter import RULES, lint_model, require_buildable

__all__ = ["RULES", "Finding", "Severity", "errors", "findings_table", "lint_model", "require_buildable"]
