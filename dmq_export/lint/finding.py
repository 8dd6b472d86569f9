"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from dmq_export.common.table import table

if TYPE_CHECKING:
    import onnx_ir as ir

    from dmq_export.lint.target import LintTarget, Version
    from dmq_export.lint.view import QdqGraph

Severity = Literal["refused", "crashes", "wrong", "float", "slower"]  # worst first
SEVERITIES: tuple[Severity, ...] = get_args(Severity)
MEANINGS: dict[Severity, str] = {
    "refused": "the parser or the builder refuses the graph",
    "crashes": "the builder's process dies",
    "wrong": "it is built, and can compute other numbers than the graph says",
    "float": "it is built, and the product runs in float",
    "slower": "it is built, and something costs more than it need",
}
ERRORS: tuple[Severity, ...] = ("refused", "crashes")
NODES_SHOWN = 3  # of those that break one rule in one way
Check = Callable[["QdqGraph"], "Iterable[tuple[ir.Node | None, str]]"]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: what it is called in findings and in ``docs/lint.md``.
        rtx: what TensorRT-RTX does with a graph that breaks it, as its compiler said; None where it does not mind.
        tensorrt: what TensorRT does, as read in its parser, headers and documentation; None where it does not mind.
        allowed: what the runtime takes.
        remedy: what to do next.
        check: yields the node (None: the whole graph) and what was found there.
        until: the TensorRT release that no longer minds, where one is known.
        tried: whether TensorRT-RTX's compiler can say so; False for what only a run on a GPU could tell.
    """

    name: str
    rtx: Severity | None
    tensorrt: Severity | None
    allowed: str
    remedy: str
    check: Check
    until: Version | None = None
    tried: bool = True

    def severity(self, target: LintTarget) -> Severity | None:
        """What ``target`` does with a graph that breaks the rule; None where it does not mind."""
        if target.runtime == "tensorrt-rtx":
            return self.rtx
        return None if self.until is not None and target.version >= self.until else self.tensorrt


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
    """Those for which there is no engine: refused, or the builder crashes."""
    return [finding for finding in findings if finding.severity in ERRORS]


def findings_table(findings: Sequence[Finding]) -> str:
    """One row for each rule and what was found, the worst first, then what is allowed and what to do, rule by rule."""
    if not findings:
        return "no findings"
    groups: dict[tuple[str, str, str], list[str]] = {}
    for finding in sorted(findings, key=lambda finding: SEVERITIES.index(finding.severity)):
        groups.setdefault((finding.severity, finding.rule, finding.found), []).append(finding.node or "(graph)")
    rows = [(*key, str(len(nodes)), _some(nodes)) for key, nodes in groups.items()]
    found = table(("severity", "rule", "found", "nodes", "where"), rows, right=(3,))
    advice = {finding.rule: (finding.allowed, finding.remedy) for finding in findings}
    rules = dict.fromkeys(rule for _, rule, _ in groups)
    return "\n\n".join([found, table(("rule", "allowed", "remedy"), [(rule, *advice[rule]) for rule in rules])])


def _some(names: list[str]) -> str:
    more = f", and {len(names) - NODES_SHOWN} more" if len(names) > NODES_SHOWN else ""
    return ", ".join(names[:NODES_SHOWN]) + more
