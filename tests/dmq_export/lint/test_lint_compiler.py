"""What the rules say is what TensorRT-RTX's own compiler says; it needs no GPU."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from lint_cases import BROKEN, FP8, NEAR, Case, attention, conv, graph, padded, quantized, sums, w4a8
from qdq import CHANNELS, GraphBuilder, conv_model, wide_model

from dmq_export.cli import main
from dmq_export.commands import compilation as module
from dmq_export.commands.compilation import Compilation, compile_file, compiler_findings, meant_for_int8, refused_nodes
from dmq_export.errors import DmqError
from dmq_export.lint import Finding, LintTarget, errors, lint_model
from dmq_export.lint.cut import cut_constant, cut_node
from dmq_export.lint.operators import OPERATORS
from dmq_export.lint.view import with_types
from engines.tensorrt.compiler import Compiled, NodeError, Refusal, Request, compile_onnx

needs_compiler = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


def one_per_rule(cases: list[Case]) -> list[Case]:
    """The first of each rule; ``bench/lint_agreement.py`` compiles all."""
    return list({case.rule: case for case in reversed(cases)}.values())[::-1]


def compiled(model: ir.Model, folder: Path, gpu: int | None = None) -> Compiled | Refusal:
    ir.save(model, folder / "m.onnx")
    return compile_onnx(Request(folder / "m.onnx", {}, () if gpu is None else (divmod(gpu, 10),)))


def kernels(model: ir.Model, folder: Path) -> int:
    outcome = compiled(model, folder)
    assert isinstance(outcome, Compiled)
    return len(outcome.table.kernels)


@needs_compiler
@pytest.mark.parametrize("case", [*one_per_rule(BROKEN), *one_per_rule(NEAR)], ids=str)
def test_the_verdict_is_the_compilers(case: Case, tmp_path: Path) -> None:
    model = case.build()
    findings = lint_model(model, LintTarget(gpu=case.gpu))
    outcome = compiled(model, tmp_path, case.gpu)
    assert isinstance(outcome, Refusal) == bool(errors(findings)), (outcome, findings)
    if isinstance(outcome, Refusal):
        severities = {finding.severity for finding in errors(findings)}
        assert ("crashes" if outcome.by == "crash" else "refused") in severities
        return
    meant = meant_for_int8(model)
    floats = {finding.node for finding in findings if finding.severity == "float"}
    assert set(outcome.table.integer_nodes(meant)) == set(meant) - floats


@needs_compiler
@pytest.mark.parametrize("model", [conv_model(), wide_model()], ids=["one convolution", "every construct"])
def test_what_keeps_all_rules_is_built_and_runs_in_int8(model: ir.Model, tmp_path: Path) -> None:
    outcome = compiled(model, tmp_path)
    assert isinstance(outcome, Compiled)
    meant = meant_for_int8(model)
    assert meant
    assert outcome.table.integer_nodes(meant) == meant


@needs_compiler
def test_what_is_called_slower_is_not_fused(tmp_path: Path) -> None:
    assert kernels(padded("reflect"), tmp_path) == kernels(padded(), tmp_path)  # which is no rule for that reason
    graphs = [attention(512), attention(1024), attention(1024, dtype=FP8)]
    floats = [attention(64, quantize=False, graph_type=kind) for kind in (np.float16, np.float32)]
    outcomes = [compiled(model, tmp_path) for model in (*graphs, *floats)]
    tables = [outcome.table for outcome in outcomes if isinstance(outcome, Compiled)]
    assert [sum(kernel.is_product for kernel in each.kernels) for each in tables] == [0, 2, 0, 0, 2]  # 0: one kernel


@needs_compiler
def test_raw_sums_are_written_in_half_where_the_rule_says_so(tmp_path: Path) -> None:
    """By the table of kernels: what an int8 product writes, and that a kernel with the channels' scales follows."""

    def product(model: ir.Model) -> tuple[str, bool]:
        outcome = compiled(model, tmp_path)
        assert isinstance(outcome, Compiled)
        (kernel,) = [each for each in outcome.table.kernels if each.integer]
        (out,) = kernel.outputs
        readers = [each for each in outcome.table.kernels if out.name in {tensor.name for tensor in each.inputs}]
        scaled = any(CHANNELS in constant.shape for reader in readers for constant in reader.constants)
        return out.type, scaled

    assert product(sums(64, -128)) == ("Half", True)
    assert product(sums(64, -128, dtype=np.float32)) == ("Float", True)
    assert product(sums(64, -128, axis=None)) == ("Half", False)  # one scale: applied within the product
    assert product(conv()) == ("Float", True)


@needs_compiler
def test_scales_per_block_are_applied_behind_one_product(tmp_path: Path) -> None:
    """Which cannot give what the graph says: the blocks are summed by then."""
    outcome = compiled(w4a8(128, (2, CHANNELS), dtype=np.int8), tmp_path)
    assert isinstance(outcome, Compiled)
    (kernel,) = [each for each in outcome.table.kernels if each.integer]
    assert kernel.inputs[0].shape == (4, 128)
    assert kernel.outputs[0].shape == (4, CHANNELS)
    assert not any(2 * CHANNELS in tensor.shape for tensor in kernel.constants)


def three_errors() -> ir.Model:
    """A reduction of a scalar, a zero point and an operator that the parser does not have."""
    b = GraphBuilder()
    x = b.input("x", 4, CHANNELS)
    scale, zero = b.constant(0.1), b.constant(3, np.int8)
    data = b.op("DequantizeLinear", b.op("QuantizeLinear", x, scale, zero), scale, b.constant(0, np.int8))
    matrix = b.op(
        "Reshape", b.op("MatMul", data, b.weight(CHANNELS, CHANNELS, axis=1)), b.constant([-1, 2, 2], np.int64)
    )
    first = b.op("ReduceMax", b.op("ReduceMin", x, keepdims=0), keepdims=0)
    return b.model(first, b.op("Det", matrix))


ASK = """
import sys, tensorrt_rtx as trt
logger = trt.Logger(trt.Logger.ERROR)
network = (builder := trt.Builder(logger)).create_network(0)
parser = trt.OnnxParser(network, logger)
print(*[name for name in sys.argv[1:] if parser.supports_operator(name)])
"""


@needs_compiler
def test_the_list_of_operators_is_the_parsers() -> None:
    names = {schema.name for schema in onnx.defs.get_all_schemas()} | OPERATORS
    said = subprocess.run([sys.executable, "-c", ASK, *names], capture_output=True, text=True, check=True)
    assert set(said.stdout.split()) == OPERATORS


@needs_compiler
def test_every_node_that_the_parser_refuses_is_found(tmp_path: Path) -> None:
    model = three_errors()
    assert {error.operator for error in refused_nodes(model)[0]} == {"ReduceMax", "QuantizeLinear", "Det"}
    ir.save(model, tmp_path / "m.onnx")
    said = compile_file(tmp_path / "m.onnx", model, LintTarget(), {})
    found = compiler_findings(said, lint_model(model))
    assert {finding.rule for finding in found} == {"compiler"}  # and no disagreement
    assert {finding.node for finding in found} == {finding.node for finding in errors(lint_model(model))}


@needs_compiler
def test_a_constant_of_an_unknown_type_does_not_hide_what_follows() -> None:
    b = GraphBuilder()
    b.constant(np.ones(2), np.int16)
    errors_found, complete = refused_nodes(b.model(b.op("Det", b.input("x", 8, 8))))
    assert complete
    assert ["initializer" in errors_found[0].text, errors_found[1].operator] == [True, "Det"]


@needs_compiler
@pytest.mark.parametrize(("options", "status"), [((), 1), (("--gpu", "sm89"), 1)])
def test_the_command_asks_the_compiler(tmp_path: Path, options: tuple[str, ...], status: int) -> None:
    ir.save(three_errors(), tmp_path / "m.onnx")
    result = CliRunner().invoke(main, ["lint", str(tmp_path / "m.onnx"), "--compile", *options])
    assert result.exit_code == status
    assert "TensorRT-RTX 1.7.1.116 refuses it: the parser 3 times" in result.stdout
    assert "disagreement" not in result.stdout


@needs_compiler
def test_open_sizes_are_compiled_too(tmp_path: Path) -> None:
    ir.save(graph(lambda b: b.pair(b.input("x", "batch", CHANNELS))), tmp_path / "m.onnx")
    run = CliRunner().invoke
    for shapes in ([], ["--shapes", "x:1x32,2x32,4x32"]):
        result = run(main, ["lint", str(tmp_path / "m.onnx"), "--compile", *shapes])
        assert (result.exit_code, "builds it" in result.stdout) == (0, True), result.output


def test_without_the_compiler_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmq_export.common.extras.find_spec", lambda name: None)
    ir.save(quantized(), tmp_path / "m.onnx")
    result = CliRunner().invoke(main, ["lint", str(tmp_path / "m.onnx"), "--compile"])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1
    assert "pip install 'dmq-export[tensorrt-rtx]'" in result.stderr


def test_tensorrt_for_data_centers_is_not_compiled_for(tmp_path: Path) -> None:
    with pytest.raises(DmqError, match=r"--compile needs a GPU for TensorRT 10\.10"):
        compile_file(tmp_path / "m.onnx", quantized(), LintTarget("tensorrt", (10, 10)), {})


REFUSED = Finding("zero-point", "refused", "q", "", "", "")
FLOAT = Finding("weight-axis", "float", "p", "", "", "")
BUILT = Compilation("1.7.1", None, (), (), ("p", "o"), ("o",))


@pytest.mark.parametrize(
    ("said", "found", "disagreements"),
    [
        (BUILT, [FLOAT], []),
        (BUILT, [], [("p", "it runs in float, and no rule says why")]),
        (
            BUILT,
            [FLOAT, Finding("weight-axis", "float", "o", "", "", "")],
            [("o", "it runs in Int8, and a rule says float")],
        ),
        (BUILT, [FLOAT, REFUSED], [("q", "the compiler builds what zero-point calls refused")]),
        (
            Compilation("1.7.1", "builder", (), ("why",), (), ()),
            [FLOAT],
            [("", "no rule says why the compiler does not")],
        ),
        (Compilation("1.7.1", "crash", (), ("why",), (), ()), [REFUSED], []),
        (
            Compilation("1.7.1", "parser", (NodeError("d", "Det", "why", ""),), (), (), ()),
            [REFUSED],
            [("d", "no rule says")],
        ),
    ],
)
def test_where_rules_and_compiler_differ_is_a_finding(
    said: Compilation, found: list[Finding], disagreements: list[tuple[str, str]]
) -> None:
    seen = [each for each in compiler_findings(said, found) if each.rule == "disagreement"]
    assert [each.node for each in seen] == [node for node, _ in disagreements]
    assert all(text in each.found for each, (_, text) in zip(seen, disagreements, strict=True))


def test_a_node_that_is_an_output_is_cut_out_too() -> None:
    model = with_types(graph(lambda b: b.op("Det", b.input("x", 8, 8))))
    assert cut_node(model, "layer0/Det", "Det")
    assert [len(model.graph), model.graph.outputs[0].name] == [0, "layer0/Det_out/cut"]
    assert not cut_node(model, "layer0/Det", "Det")
    assert not cut_constant(model, "Failed to import initializer: nothing")


def test_what_has_no_shape_is_not_cut_out() -> None:
    """What stands behind it would be refused for a reason that the graph does not give."""
    model = graph(lambda b: b.op("Mystery", b.input("x", 8, 8), domain="com.example"))
    assert not cut_node(model, "layer0/Mystery", "Mystery")
    if find_spec("tensorrt_rtx") is not None:
        found, complete = refused_nodes(model)
        assert [[error.operator for error in found], complete] == [["Mystery"], False]


def test_a_refused_quantizer_is_made_harmless_once() -> None:
    model = with_types(quantized(zero=3))
    assert cut_node(model, "layer0/QuantizeLinear", "QuantizeLinear")
    first = model.graph[0]
    assert [len(first.inputs), first.inputs[1].const_value.numpy().item()] == [2, 1]
    assert [len(model.graph), len(model.graph.inputs)] == [2, 1]


def test_looking_for_errors_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even if the parser were to refuse the same constant for ever."""
    monkeypatch.setattr(module, "MOST_ERRORS", 3)

    class Stubborn:
        def errors(self, content: bytes, file: Path) -> tuple[NodeError, ...]:
            del content, file
            return (NodeError("n", "Det", "why", ""),)

    assert len(list(module._refused(Stubborn(), quantized(), Path("m.onnx")))) == 3  # type: ignore[arg-type]
