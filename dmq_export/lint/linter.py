"""All rules, and the function that applies them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dmq_export.errors import CheckFailedError
from dmq_export.lint import operators, placement, quantizers, structure, sums, weights
from dmq_export.lint.finding import SEVERITIES, Finding, Rule, errors
from dmq_export.lint.target import LintTarget
from dmq_export.lint.view import DEFAULT, QdqGraph, with_types

if TYPE_CHECKING:
    import onnx_ir as ir

RULES: tuple[Rule, ...] = (
    *quantizers.RULES,
    *weights.RULES,
    *sums.RULES,
    *placement.RULES,
    *operators.RULES,
    *structure.RULES,
)


def lint_model(model: ir.Model, target: LintTarget = DEFAULT) -> tuple[Finding, ...]:
    """Everything in ``model`` that ``target`` refuses or runs other than meant, the worst first.

    The model stays as it is.
    """
    graph = QdqGraph(with_types(model), target)
    found = [
        Finding(rule.name, severity, name_of(node), found, rule.allowed, rule.remedy)
        for rule in RULES
        if (severity := rule.severity(target)) is not None
        for node, found in rule.check(graph)
    ]
    return tuple(sorted(found, key=lambda finding: SEVERITIES.index(finding.severity)))


def require_buildable(findings: tuple[Finding, ...], name: str, target: LintTarget = DEFAULT) -> None:
    """Refuse a graph with errors.

    Raises:
        CheckFailedError: naming the first error, and how many there are.
    """
    found = errors(findings)
    if found:
        first = found[0]
        others = f" ({len(found) - 1} more: run dmq-export lint)" if len(found) > 1 else ""
        raise CheckFailedError(
            f"{name} cannot become an engine of {target.title}: {first.node or 'the graph'}: {first.found} "
            f"({first.rule}); allowed is {first.allowed}; {first.remedy}{others}"
        )


def name_of(node: ir.Node | None) -> str:
    """The node's name, or that of its output where it has none; empty for the graph."""
    return "" if node is None else node.name or node.outputs[0].name or node.op_type
