"""All rules, and the function that applies them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmq_export.errors import CheckFailedError
from dmq_export.lint import placement, quantizers, structure, weights
from dmq_export.lint.finding import Finding, Rule, errors
from dmq_export.lint.view import QdqGraph, with_types

if TYPE_CHECKING:
    import onnx_ir as ir

RULES: tuple[Rule, ...] = (*quantizers.RULES, *weights.RULES, *placement.RULES, *structure.RULES)


def lint_model(model: ir.Model) -> tuple[Finding, ...]:
    """Everything in ``model`` that TensorRT refuses or runs other than meant; the model stays as it is.

    A graph without a single quantizer gets no findings.
    """
    graph = QdqGraph(with_types(model))
    return tuple(
        Finding(rule.name, rule.severity, _name(node), found, rule.allowed, rule.remedy)
        for rule in RULES
        for node, found in rule.check(graph)
    )


def require_buildable(findings: tuple[Finding, ...], name: str) -> None:
    """Refuse a graph with errors.

    Raises:
        CheckFailedError: naming the first error, and how many there are.
    """
    found = errors(findings)
    if found:
        first = found[0]
        others = f" ({len(found) - 1} more: run dmq-export lint)" if len(found) > 1 else ""
        raise CheckFailedError(
            f"{name} cannot become a TensorRT engine: {first.node}: {first.found} ({first.rule}); allowed is "
            f"{first.allowed}; {first.remedy}{others}"
        )


def _name(node: ir.Node | None) -> str:
    """The node's name, or that of its output where it has none."""
    return "" if node is None else node.name or node.outputs[0].name or node.op_type
