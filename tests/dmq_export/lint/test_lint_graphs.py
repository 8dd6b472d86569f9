"""Graphs that other tools made: lint's verdict is that of TensorRT-RTX's compiler on every one."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from dmq_export.commands.lint import lint_file
from dmq_export.lint import LintTarget

FOLDER = Path(__file__).resolve().parents[2] / "graphs"
GRAPHS = sorted(FOLDER.glob("*.onnx"))
TOOLS = {"brevitas", "modelopt", "nncf", "ort", "torch"}


def test_every_tool_has_graphs_that_are_taken_and_the_readme_lists_all() -> None:
    assert {path.name.partition("-")[0] for path in GRAPHS} == TOOLS
    readme = (FOLDER / "README.md").read_text()
    assert [path.name for path in GRAPHS if f"| `{path.name}` |" not in readme] == []
    taken = {path.name.partition("-")[0] for path in GRAPHS if lint_file(path, LintTarget()).ok}
    assert taken == TOOLS


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_the_verdict_is_the_compilers(path: Path) -> None:
    """And each node that the parser refuses is one a rule names, each product in Int8 one that no rule calls float."""
    compiled = lint_file(path, LintTarget(), {})
    assert compiled.compilation is not None
    assert [finding for finding in compiled.findings if finding.rule == "disagreement"] == []
    assert lint_file(path, LintTarget()).ok == compiled.compilation.built == compiled.ok
