"""Whether lint says what TensorRT-RTX's compiler says; needs tensorrt-rtx, no GPU.

    python bench/lint_agreement.py graphs [FILE...]   # the table of docs/lint.md: tests/graphs, or these files
    python bench/lint_agreement.py rules              # every graph of tests/support/lint_cases.py

Exit status 1 where they disagree.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path

import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmq_export.commands.lint import Lint, lint_file
from dmq_export.common.table import table
from dmq_export.lint import LintTarget, errors

ROOT = Path(__file__).resolve().parents[1]


def compared(path: Path, gpu: int | None = None) -> Lint:
    """The rules' findings and the compiler's for the file."""
    return lint_file(path, LintTarget(gpu=gpu), {})


def verdict(lint: Lint) -> tuple[str, str]:
    """Of the rules and of the compiler, in a word or two."""
    own = [finding for finding in lint.findings if finding.rule not in ("compiler", "disagreement")]
    refused = errors(own)
    rules = (
        f"{refused[0].severity}: {', '.join(dict.fromkeys(each.rule for each in refused))}" if refused else "takes it"
    )
    if lint.compilation is None or lint.compilation.built:
        return rules, "builds it"
    return rules, {"parser": "parser refuses", "builder": "builder refuses", "crash": "crashes"}[
        str(lint.compilation.by)
    ]


def agrees(lint: Lint) -> bool:
    return all(finding.rule != "disagreement" for finding in lint.findings)


def graph_rows(paths: Iterable[Path]) -> Iterator[tuple[tuple[str, ...], bool]]:
    """A row for each file, and whether rules and compiler agree."""
    for path in paths:
        lint = compared(path)
        rules, compiler = verdict(lint)
        said = lint.compilation
        integer = f"{len(said.integer)} of {len(said.meant)}" if said is not None and said.built else "-"
        warnings = dict.fromkeys(
            each.rule for each in lint.findings if each.severity in ("wrong", "float") and each.rule != "disagreement"
        )
        row = (path.name, rules, compiler, integer, ", ".join(warnings), "yes" if agrees(lint) else "NO")
        yield row, agrees(lint)


def rule_rows() -> Iterator[tuple[tuple[str, ...], bool]]:
    """A row for each graph of the tests on which rules and compiler disagree."""
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    cases = import_module("lint_cases")
    with tempfile.TemporaryDirectory() as folder:
        for case in (*cases.BROKEN, *cases.NEAR):
            path = Path(folder) / "case.onnx"
            ir.save(case.build(), path)
            lint = compared(path, case.gpu)
            yield (case.rule, case.found, *verdict(lint), "yes" if agrees(lint) else "NO"), agrees(lint)


def main() -> None:
    command, *files = sys.argv[1:] or ["graphs"]
    header: tuple[str, ...]
    if command == "graphs":
        header = ("graph", "rules", "TensorRT-RTX", "products in Int8", "warnings: wrong or float", "agree")
        rows = list(graph_rows(map(Path, files) if files else sorted((ROOT / "tests/graphs").glob("*.onnx"))))
    elif command == "rules":
        header = ("rule", "found", "rules", "TensorRT-RTX", "agree")
        rows = list(rule_rows())
    else:
        sys.exit(f"unknown command {command}: graphs or rules")
    print(table(header, [row for row, _ in rows]))
    print(f"{sum(good for _, good in rows)} of {len(rows)} agree")
    sys.exit(0 if all(good for _, good in rows) else 1)


if __name__ == "__main__":
    main()
