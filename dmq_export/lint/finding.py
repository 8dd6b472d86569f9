"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from dmq_export.common.table import table

if TYPE_CHECKING:
    import onnx_ir as ir

    from dmq_export.lint.view import QdqGraph

Severity = Literal["error", "warning"]
NODES_SHOWN = 3  # of those that break one rule in one way


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: what it is called in findings and in ``docs/tensorrt.md``.
        severity: TensorRT refuses an ``error``; it builds a ``warning``, slower or elsewhere than meant.
        allowed: what TensorRT takes.
        remedy: what to do next.
        check: yields the node (None: the whole graph) and what was found there.
    """

    name: str
    severity: Severity
    allowed: str
    remedy: str
    check: Callable[[QdqGraph], Iterable[tuple[ir.Node | None, str]]]


@dataclass(frozen=True)
class Finding:
    """One node that breaks one rule; ``node`` is empty where the whole graph does."""

    rule: str
    severity: Severity
    node: str
    found: str
    allowed: str
    remedy: str

    @property
    def layer(self) -> str:
        """The node's module: its name up to the last slash."""
        return self.node.rpartition("/")[0] or self.node


def errors(findings: Sequence[Finding]) -> list[Finding]:
    """Those that TensorRT refuses."""
    return [finding for finding in findings if finding.severity == "error"]


def findings_table(findings: Sequence[Finding]) -> str:
    """One row for each rule and what was found, errors first, then what is allowed and what to do, rule by rule."""
    if not findings:
        return "no findings"
    groups: dict[tuple[str, str, str], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: finding.severity):
        groups.setdefault((finding.severity, finding.rule, finding.found), []).append(finding.node or "(graph)")
    rows = [(*key, str(len(nodes)), _some(nodes)) for key, nodes in groups.items()]
    found = table(("severity", "rule", "found", "nodes", "where"), rows, right=(3,))
    advice = {finding.rule: (finding.allowed, finding.remedy) for finding in findings}
    rules = dict.fromkeys(rule for _, rule, _ in groups)
    return "\n\n".join([found, table(("rule", "allowed", "remedy"), [(rule, *advice[rule]) for rule in rules])])


def _some(names: list[str]) -> str:
    more = f", and {len(names) - NODES_SHOWN} more" if len(names) > NODES_SHOWN else ""
    return ", ".join(names[:NODES_SHOWN]) + more
