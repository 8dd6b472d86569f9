"""What TensorRT-RTX's own compiler makes of a graph, and how that compares with the rules."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import onnx_ir as ir

from dmq_export.errors import DmqError
from dmq_export.graph.onnx_file import input_sizes
from dmq_export.lint import Finding, LintTarget, errors
from dmq_export.lint.cut import cut_constant, cut_node, name_nodes
from dmq_export.lint.linter import name_of
from dmq_export.lint.products import products
from dmq_export.lint.view import QdqGraph, with_types

if TYPE_CHECKING:
    from engines.tensorrt.compiler import NodeError
    from engines.tensorrt.parsing import Parser
    from engines.tensorrt.profile import ShapeRange

MOST_ERRORS = 1000  # refused nodes that are looked for
PREFIX = re.compile(r"^.*?Error Code \d+: [\w ]+\((?:\S+: )?|^Assertion failed: ")
WHERE = re.compile(r"\.? In \w+ at /_src/.*$")
INTEGERS = (ir.DataType.INT8, ir.DataType.INT4)


@dataclass(frozen=True)
class Compilation:
    """What the compiler said.

    Attributes:
        by: who refused; None where an engine was built.
        refused: node, operator and text of everything the parser refuses.
        log: the builder's errors.
        complete: whether ``refused`` is all that the parser refuses; it is not where something could not be cut out.
        meant: names of the products of quantized data and weights.
        integer: those of them that run in Int8.
    """

    version: str
    by: Literal["parser", "builder", "crash"] | None
    refused: tuple[NodeError, ...]
    log: tuple[str, ...]
    meant: tuple[str, ...]
    integer: tuple[str, ...]
    complete: bool = True

    @property
    def built(self) -> bool:
        return self.by is None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return asdict(self) | {"built": self.built}

    def text(self) -> str:
        """One line."""
        name = f"TensorRT-RTX {self.version}".strip()
        if self.by is None:
            return f"{name} builds it: {len(self.integer)} of {len(self.meant)} quantized products run in Int8"
        if self.by == "parser":
            count = f"{'' if self.complete else 'at least '}{len(self.refused)} times"
            return f"{name} refuses it: the parser {count}; the builder has not seen it"
        return f"{name} {'refuses it' if self.by == 'builder' else 'crashes on it'}: {_line(self.log)}"


def compile_file(path: Path, model: ir.Model, target: LintTarget, shapes: Mapping[str, ShapeRange]) -> Compilation:
    """Compile the file ``path``, which holds ``model``, for the GPU of ``target``; seconds to minutes.

    Args:
        shapes: of inputs of open size; where it is empty, open sizes count as 1.

    Raises:
        DmqError: TensorRT-RTX is not installed, ``target`` is another runtime, or a shape does not fit.
    """
    from engines.tensorrt.compiler import Refusal, Request, compile_onnx

    if target.runtime != "tensorrt-rtx":
        raise DmqError(f"--compile needs a GPU for {target.title}: lint for --runtime tensorrt-rtx, or use trt-build")
    capabilities = () if target.gpu is None else (divmod(target.gpu, 10),)
    outcome = compile_onnx(Request(path, _ranges(model, shapes), capabilities))
    if not isinstance(outcome, Refusal):
        meant = meant_for_int8(model)
        return Compilation(outcome.version, None, (), (), meant, outcome.table.integer_nodes(meant))
    refused, complete = refused_nodes(model) if outcome.by == "parser" else ((), True)
    return Compilation(outcome.version, outcome.by, refused or outcome.errors, outcome.log, (), (), complete)


def meant_for_int8(model: ir.Model) -> tuple[str, ...]:
    """Names of the convolutions and matrix products of INT8 data with quantized weights."""
    found = [
        each for each in products(QdqGraph(with_types(model))) if each.data is not None and each.weight is not None
    ]
    return tuple(name_of(each.node) for each in found if each.both and all(side.type in INTEGERS for side in each.both))


def refused_nodes(model: ir.Model) -> tuple[tuple[NodeError, ...], bool]:
    """Every node that the parser refuses, and whether these are all.

    It stops at the first one, so that is cut out of a copy and what remains is parsed again, until all is read or
    something that cannot be cut is refused.
    """
    from engines.tensorrt.parsing import Parser

    rest = with_types(model)
    name_nodes(rest)
    found: list[NodeError] = []
    with tempfile.TemporaryDirectory(prefix="dmq-lint-") as folder, Parser() as parser:
        file = Path(folder) / "model.onnx"
        ir.save(rest, file, external_data="model.onnx.data")  # so that the weights are written once
        rest = ir.load(file)
        for error in _refused(parser, rest, file):
            found.append(error)
            if not cut_node(rest, error.node, error.operator) and not cut_constant(rest, error.text):
                return tuple(found), False
    return tuple(found), len(found) < MOST_ERRORS


def _refused(parser: Parser, model: ir.Model, file: Path) -> Iterator[NodeError]:
    """The first refused node of ``model``, again and again, as long as it changes between."""
    for _ in range(MOST_ERRORS):
        said = parser.errors(ir.to_proto(model).SerializeToString(), file)
        if not said:
            return
        yield said[0]


def compiler_findings(compilation: Compilation, found: Sequence[Finding]) -> tuple[Finding, ...]:
    """What the compiler refuses, and where it and the rules that ``found`` something disagree."""
    return (*_refusals(compilation), *_disagreements(compilation, found))


def _refusals(compilation: Compilation) -> Iterator[Finding]:
    advice = ("what the compiler takes", "see what the rules say of the node")
    for error in compilation.refused:
        yield Finding("compiler", "refused", error.node, f"{error.operator}: {_line([error.text])}", *advice)
    if compilation.by == "builder":
        yield Finding("compiler", "refused", "", _line(compilation.log), *advice)
    if compilation.by == "crash":
        yield Finding("compiler", "crashes", "", _line(compilation.log), *advice)


def _disagreements(compilation: Compilation, found: Sequence[Finding]) -> Iterator[Finding]:
    advice = ("rules that say what the compiler says", "report the graph: a rule is wrong or missing")
    expected = errors(found)
    if compilation.built and expected:
        first = expected[0]
        text = f"the compiler builds what {first.rule} calls {first.severity}"
        yield Finding("disagreement", first.severity, first.node, text, *advice)
    if not compilation.built and not expected:
        severity: Literal["crashes", "refused"] = "crashes" if compilation.by == "crash" else "refused"
        yield Finding("disagreement", severity, "", "no rule says why the compiler does not take it", *advice)
    known = {finding.node for finding in expected}
    for error in compilation.refused if expected else ():
        if error.node and error.node not in known:
            yield Finding("disagreement", "refused", error.node, "no rule says why the parser refuses it", *advice)
    floats = {finding.node for finding in found if finding.severity == "float"}
    for name in compilation.meant:
        if name in compilation.integer and name in floats:
            yield Finding("disagreement", "float", name, "it runs in Int8, and a rule says float", *advice)
        if name not in compilation.integer and name not in floats:
            yield Finding("disagreement", "float", name, "it runs in float, and no rule says why", *advice)


def _ranges(model: ir.Model, shapes: Mapping[str, ShapeRange]) -> dict[str, ShapeRange]:
    """Ranges of the inputs; none where all sizes are fixed."""
    from engines.tensorrt.profile import ShapeRange, resolve_shapes

    sizes = input_sizes(model)
    if not any(isinstance(size, str) for shape in sizes.values() for size in shape):
        return {}
    given = dict(shapes)
    if not given:
        for name, shape in sizes.items():
            fixed = tuple(size if isinstance(size, int) else 1 for size in shape)
            given[name] = ShapeRange(fixed, fixed, fixed)
    return resolve_shapes(sizes, given)


def _line(log: Sequence[str]) -> str:
    """The first line that says why, without names and places of NVIDIA's sources, short enough for a table."""
    lines = [line.strip() for entry in log for line in entry.splitlines() if line.strip()]
    text = next((line for line in lines if not line.startswith("Invalid Node")), "it says nothing")
    text = WHERE.sub("", PREFIX.sub("", text))
    return text if len(text) <= 120 else text[:117] + "..."
