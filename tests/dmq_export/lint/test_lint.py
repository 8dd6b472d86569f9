"""TensorRT's rules: every rule catches a graph made to break it, and says nothing of one that keeps them all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from qdq import CHANNELS, GraphBuilder, conv_model, wide_model

from dmq_export.cli import main
from dmq_export.errors import CheckFailedError
from dmq_export.lint import RULES, Finding, errors, findings_table, lint_model, require_buildable

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs/tensorrt.md").read_text()


def by_rule(model: ir.Model) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in lint_model(model):
        found.setdefault(finding.rule, []).append(finding)
    return found


def quantized(scale: Any = 0.1, zero: Any = 0, *, dtype: Any = np.int8, x: tuple[Any, ...] = (4, 32), **more: Any):
    """A lone QuantizeLinear/DequantizeLinear pair."""
    b = GraphBuilder(more.pop("opset", 21), more.pop("graph", np.float16))
    scale_type, attributes = more.pop("scale_type", None), more
    scales = b.constant(scale, scale_type)
    zeros = [b.constant(np.broadcast_to(zero, np.shape(scale)), dtype)]
    codes = b.op("QuantizeLinear", b.input("x", *x), scales, *zeros, **attributes)
    return b.model(b.op("DequantizeLinear", codes, scales, *zeros, **attributes))


def matmul(weight: Callable[[GraphBuilder], str], *, quantize: bool = True, op: str = "MatMul", **attributes: Any):
    """A product of ``x [4, 32]`` and ``weight``."""
    b = GraphBuilder()
    x = b.input("x", 4, 32)
    return b.model(b.op(op, b.pair(x) if quantize else x, weight(b), **attributes))


def between(op: str, *more: Any, **attributes: Any) -> ir.Model:
    """An operator between a weight and the product that reads it."""
    b = GraphBuilder()
    weight = b.op(op, b.weight(32, 32), *[b.constant(value, np.int64) for value in more], **attributes)
    return b.model(b.op("MatMul", b.pair(b.input("x", 4, 32)), weight))


def four_bit(rows: int, columns: int, scales: tuple[int, ...], *, op: str = "MatMul", first: bool = False) -> ir.Model:
    b = GraphBuilder()
    weight = b.op("DequantizeLinear", b.int4(rows, columns), b.constant(np.full(scales, 0.1)), axis=0)
    x = b.input("x", 4, rows)
    return b.model(b.op(op, weight, b.op("Transpose", x)) if first else b.op(op, x, weight))


def runtime(which: str) -> ir.Model:
    b = GraphBuilder()
    scale = b.input("scale") if which == "scale" else b.constant(0.1)
    zero = b.input("zero", dtype=np.int8) if which == "zero" else b.constant(0, np.int8)
    return b.model(b.op("QuantizeLinear", b.input("x", 4, 32), scale, zero))


def add_one_sided() -> ir.Model:
    b = GraphBuilder()
    x, y = b.input("x", 4, 32), b.input("y", 4, 32)
    return b.model(b.op("Add", b.pair(x), y))


def concat_two_scales() -> ir.Model:
    b = GraphBuilder()
    x, y = b.input("x", 4, 32), b.input("y", 4, 32)
    return b.model(b.op("Concat", b.pair(x, 0.1), b.pair(y, 0.2), axis=0))


def padded(quantize: bool) -> ir.Model:
    b = GraphBuilder()
    x = b.op("Pad", b.input("x", 1, CHANNELS, 8, 8), b.constant([0, 0, 1, 1, 0, 0, 1, 1], np.int64), b.constant(0.5))
    weight = b.weight(CHANNELS, CHANNELS, 3, 3) if quantize else b.constant(np.ones((CHANNELS, CHANNELS, 3, 3)))
    return b.model(b.op("Conv", b.pair(x) if quantize else x, weight))


def clipped(low: float, high: float, scale: float = 0.1) -> ir.Model:
    b = GraphBuilder()
    return b.model(b.pair(b.op("Clip", b.input("x", 4, 32), b.constant(low), b.constant(high)), scale))


def clipped_codes() -> ir.Model:
    b = GraphBuilder()
    scale, zero = b.constant(0.1), b.constant(0, np.int8)
    codes = b.op("QuantizeLinear", b.input("x", 4, 32), scale, zero)
    codes = b.op("Clip", codes, b.constant(-32, np.int8), b.constant(31, np.int8))
    return b.model(b.op("DequantizeLinear", codes, scale, zero))


def grouped() -> ir.Model:
    b = GraphBuilder()
    data = b.pair(b.input("x", 1, CHANNELS, 8, 8))
    return b.model(b.op("Conv", data, b.weight(CHANNELS, CHANNELS // 2, 3, 3), group=2))


def biased(dtype: Any) -> ir.Model:
    b = GraphBuilder()
    data = b.pair(b.input("x", 4, 32))
    bias = b.op("DequantizeLinear", b.constant(np.zeros(32), dtype), b.constant(0.1))
    return b.model(b.op("Gemm", data, b.weight(32, 32, axis=1), bias))


def pair_after_pair() -> ir.Model:
    b = GraphBuilder()
    return b.model(b.pair(b.pair(b.input("x", 4, 32))))


def three_scales() -> ir.Model:
    b = GraphBuilder()
    x = b.input("x", 4, 32)
    return b.model(*[b.pair(x, scale) for scale in (0.1, 0.2, 0.3)])


def attention() -> ir.Model:
    b = GraphBuilder()
    return b.model(b.op("MatMul", b.pair(b.input("q", 2, 8, 32)), b.pair(b.input("k", 2, 32, 8))))


def integer_op() -> ir.Model:
    b = GraphBuilder()
    return b.model(b.op("MatMulInteger", b.input("x", 4, 32, dtype=np.int8), b.constant(np.ones((32, 32)), np.int8)))


def three_dimensional_gemm() -> ir.Model:
    b = GraphBuilder()
    return b.model(b.op("Gemm", b.input("x", 2, 4, 32), b.constant(np.ones((32, 32)))))


def unlabelled() -> ir.Model:
    b = GraphBuilder()
    return b.model(b.op("QuantizeLinear", b.input("x", 4, 32), b.constant(0.1)))


def declared(op: str, **attributes: Any) -> ir.Model:
    b = GraphBuilder(opset=23)
    x = b.input("x", 4, 32) if op == "QuantizeLinear" else b.input("x", 4, 32, dtype=np.int8)
    return b.model(b.op(op, x, b.constant(0.1), b.constant(0, np.int8), **attributes))


def int4_with_int8() -> ir.Model:
    b = GraphBuilder()
    weight = b.op("DequantizeLinear", b.int4(128, 32), b.constant(np.full((2, 32), 0.1)), axis=0)
    return b.model(b.op("MatMul", b.pair(b.input("x", 4, 128)), weight))


def int4_conv() -> ir.Model:
    b = GraphBuilder()
    weight = b.op("DequantizeLinear", b.int4(64, 64, 1, 1), b.constant(np.full((64, 64, 1, 1), 0.1)), axis=0)
    return b.model(b.op("Conv", b.input("x", 1, 64, 8, 8), weight))


BFLOAT16 = ml_dtypes.bfloat16
VIOLATIONS: list[tuple[str, str, Callable[[], ir.Model]]] = [
    ("zero-point", "a zero point other than 0", lambda: quantized(zero=3)),
    ("zero-point", "computed at run time", lambda: runtime("zero")),
    ("zero-point", "1 zero points for 32 scales", lambda: matmul(lambda b: mismatched_zero(b))),
    ("quantized-type", "UINT8 codes", lambda: quantized(dtype=np.uint8)),
    ("quantized-type", "UINT8 codes", unlabelled),
    ("quantized-type", "UINT4 codes", lambda: quantized(dtype=ml_dtypes.uint4)),
    ("quantized-type", "INT16 codes", lambda: quantized(dtype=np.int16)),
    ("scale-constant", "computed at run time", lambda: runtime("scale")),
    ("scale-value", "a scale of 0", lambda: quantized(1e-8)),  # float16 cannot hold it
    ("scale-value", "a scale of -0.5", lambda: quantized(-0.5)),
    ("scale-value", "a scale of inf", lambda: quantized(np.inf)),
    ("scale-value", "a scale of nan", lambda: quantized([np.nan], x=(1,), axis=0)),
    ("scale-value", "an empty scale", lambda: quantized(np.zeros(0), x=(0,), axis=0)),
    ("scale-value", "a DOUBLE scale", lambda: quantized(0.1, scale_type=np.float64)),
    ("scale-precision", "a FLOAT16 scale below 6.1e-05", lambda: quantized(1e-5)),
    ("scale-type", "a FLOAT scale for FLOAT16 data", lambda: quantized(0.1, scale_type=np.float32)),
    ("output-type", "output_dtype beside a zero point", lambda: declared("DequantizeLinear", output_dtype=10)),
    ("output-type", "precision DOUBLE", lambda: declared("QuantizeLinear", precision=11)),
    ("scalar-data", "a scalar", lambda: quantized(x=())),
    ("weight-scale", "a scale of shape", lambda: matmul(lambda b: b.weight(32, 32, scale=np.full((32, 1), 0.1)))),
    ("weight-scale", "without an axis", lambda: matmul(lambda b: b.weight(32, 32, axis=None, scale=np.full(32, 0.1)))),
    ("weight-scale", "16 scales for 32 channels", lambda: matmul(lambda b: b.weight(32, 32, scale=np.full(16, 0.1)))),
    ("weight-scale", "axis 2 of a weight of rank 2", lambda: matmul(lambda b: bad_axis(b))),
    ("weight-axis", "axis 0 of the weight of a MatMul", lambda: matmul(lambda b: b.weight(32, 32, axis=0))),
    (
        "weight-axis",
        "axis 1 of the weight of a Gemm",
        lambda: matmul(lambda b: b.weight(32, 32, axis=1), op="Gemm", transB=1),
    ),
    ("int4-block", "a scale of shape [32]", lambda: four_bit(128, 32, (32,))),
    ("int4-block", "2 blocked axes", lambda: four_bit(128, 128, (2, 2))),
    ("int4-block", "blocks of 4", lambda: four_bit(128, 32, (32, 32))),
    ("int4-block-size", "blocks of 32", lambda: four_bit(128, 32, (4, 32))),
    ("int4-count", "128 elements in 3 blocks", lambda: four_bit(128, 32, (3, 32))),
    ("int4-count", "33 elements in the last axis", lambda: four_bit(128, 33, (2, 33))),
    ("int4-consumer", "as input 0 of a MatMul", lambda: four_bit(128, 32, (2, 32), first=True)),
    ("int4-conv", "4-bit weights of a Conv", int4_conv),
    ("int4-with-int8", "4-bit weights with 8-bit activations", int4_with_int8),
    ("activation-scale", "a scale per channel", lambda: quantized(np.full(32, 0.1), axis=1)),
    ("dq-placement", "a Transpose between", lambda: between("Transpose")),
    ("dq-placement", "a Reshape between", lambda: between("Reshape", [32, 32])),
    ("dq-placement", "a Cast between", lambda: between("Cast", to=10)),
    (
        "both-inputs",
        "quantized weights with float data",
        lambda: matmul(lambda b: b.weight(32, 32, axis=1), quantize=False),
    ),
    ("both-inputs", "quantized data with float weights", lambda: matmul(lambda b: b.constant(np.ones((32, 32))))),
    ("residual-add", "one quantized and one float branch", add_one_sided),
    ("concat-scales", "branches of different scales", concat_two_scales),
    ("pad-before-op", "a Pad before a Conv", lambda: padded(quantize=True)),
    ("pad-before-op", "a Pad before a Conv", lambda: padded(quantize=False)),
    ("redundant-pair", "QuantizeLinear directly after a DequantizeLinear", pair_after_pair),
    ("shared-tensor", "3 scales for one tensor", three_scales),
    ("clip-type", "a Clip of INT8", clipped_codes),
    ("clip-bounds", "a bound of 31.5", lambda: clipped(-3.2, 3.15)),
    ("attention-product", "a quantized product of two activations", attention),
    ("opset", "a FLOAT16 scale in opset 18", lambda: quantized(opset=18)),
    ("opset", "4-bit codes in opset 19", lambda: quantized(dtype=ml_dtypes.int4, opset=19)),
    ("opset-newest", "opset 23", lambda: quantized(opset=23)),
    ("integer-operator", "MatMulInteger", integer_op),
    ("small-layer", "8 x 32 channels", lambda: matmul(lambda b: b.weight(8, 32, axis=1))),
    ("small-layer", "32 x 20 channels", lambda: matmul(lambda b: b.weight(32, 20, axis=1))),
    ("small-layer", "a Conv of 2 groups", grouped),
    ("quantized-bias", "a quantized bias", lambda: biased(np.int32)),
    ("gemm-factors", "alpha 0.5, beta 1", lambda: matmul(lambda b: b.weight(32, 32, axis=1), op="Gemm", alpha=0.5)),
    ("gemm-rank", "inputs of rank 3 and 2", three_dimensional_gemm),
    ("float32-graph", "all scales FLOAT", lambda: quantized(graph=np.float32)),
]


def mismatched_zero(b: GraphBuilder) -> str:
    codes, scale = b.constant(np.ones((32, 32)), np.int8), b.constant(np.full(32, 0.1))
    return b.op("DequantizeLinear", codes, scale, b.constant([0], np.int8), axis=1)


def bad_axis(b: GraphBuilder) -> str:
    return b.op("DequantizeLinear", b.constant(np.ones((32, 32)), np.int8), b.constant(np.full(32, 0.1)), axis=2)


@pytest.mark.parametrize(
    ("rule", "found", "build"), VIOLATIONS, ids=[f"{rule}: {found}" for rule, found, _ in VIOLATIONS]
)
def test_a_violation_is_found_at_its_node(rule: str, found: str, build: Callable[[], ir.Model]) -> None:
    model = build()
    findings = by_rule(model).get(rule, [])
    assert findings, by_rule(model)
    assert any(found in finding.found for finding in findings), findings
    nodes = {node.name for node in model.graph}
    assert all(finding.node in nodes or not finding.node for finding in findings)


def test_every_rule_has_a_violating_graph() -> None:
    assert {rule for rule, _, _ in VIOLATIONS} == {rule.name for rule in RULES}


@pytest.mark.parametrize("model", [conv_model(), wide_model()], ids=["one convolution", "every construct"])
def test_a_graph_that_keeps_all_rules_has_no_findings(model: ir.Model) -> None:
    assert lint_model(model) == ()


def test_weights_quantized_by_a_pair_of_nodes_are_weights() -> None:
    """Other tools leave the float weight in the file and quantize it in the graph."""
    b = GraphBuilder()
    scale, zero = b.constant(np.full(CHANNELS, 0.1)), b.constant(np.zeros(CHANNELS), np.int8)
    codes = b.op("QuantizeLinear", b.constant(np.ones((CHANNELS, CHANNELS, 3, 3))), scale, zero, axis=0)
    weight = b.op("DequantizeLinear", codes, scale, zero, axis=0)
    assert lint_model(b.model(b.op("Conv", b.pair(b.input("x", 1, CHANNELS, 8, 8)), weight))) == ()


def test_constants_are_seen_through_identity_and_constant_nodes() -> None:
    b = GraphBuilder()
    scale = b.op("Identity", b.op("Constant", value_float=0.1))
    scale = b.op("Cast", scale, to=10)
    model = b.model(b.op("QuantizeLinear", b.input("x", 4, 32), scale, b.constant(0, np.int8)))
    assert lint_model(model) == ()


def test_quantizers_inside_a_branch_are_checked() -> None:
    inner = GraphBuilder()
    scale, zero = inner.constant(0.1), inner.constant(3, np.int8)
    inner.op("QuantizeLinear", "x", scale, zero)
    branch = ir.to_proto(inner.model(inner.nodes[-1].output[0])).graph
    b = GraphBuilder()
    b.input("x", 4, 32)
    b.op("If", b.input("flag", dtype=np.bool_), then_branch=branch, else_branch=branch)
    assert "zero-point" in by_rule(b.model(b.nodes[-1].output[0]))


def test_a_graph_that_lacks_something_is_linted_all_the_same() -> None:
    """Other tools' files may be incomplete; the linter says what it can and does not fail."""
    whole = wide_model()
    for index, node in enumerate(whole.graph):
        for place in range(len(node.inputs)):
            model = wide_model()
            model.graph[index].replace_input_with(place, None)
            lint_model(model)
    for name in whole.graph.initializers:
        model = wide_model()
        value = model.graph.initializers.pop(name)
        value.const_value = None
        model.graph.inputs.append(value)
        lint_model(model)


def test_bfloat16_scales_are_taken() -> None:
    assert lint_model(quantized(graph=BFLOAT16)) == ()


def test_linting_leaves_the_model_alone() -> None:
    model = conv_model(scale=np.full(CHANNELS, 0.1))
    before = ir.to_proto(model).SerializeToString()
    lint_model(model)
    assert ir.to_proto(model).SerializeToString() == before


def test_a_float_graph_has_no_findings() -> None:
    b = GraphBuilder(dtype=np.float32)
    assert lint_model(b.model(b.op("Relu", b.input("x", 4)))) == ()


def test_the_portable_export_is_refused_and_every_layer_named(tiny_onnx: Path, tiny_checkpoint) -> None:
    findings = lint_model(ir.load(tiny_onnx))
    assert {"quantized-type", "activation-scale"} <= {finding.rule for finding in errors(findings)}
    assert {layer.spec.name for layer in tiny_checkpoint.layers} == {
        finding.layer for finding in findings if finding.rule == "activation-scale"
    }


def test_a_refusal_is_one_line_with_the_first_error_and_the_count() -> None:
    findings = lint_model(quantized(zero=3))
    require_buildable(tuple(finding for finding in findings if finding.severity == "warning"), "m.onnx")
    with pytest.raises(CheckFailedError) as caught:
        require_buildable(findings, "m.onnx")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "m.onnx cannot become a TensorRT engine: layer0/QuantizeLinear: a zero point other than 0"
    )
    assert message.endswith("(1 more: run dmq-export lint)")


def test_the_table_counts_like_findings_and_puts_errors_first() -> None:
    lines = findings_table(lint_model(quantized(zero=3, graph=np.float32))).splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["error", "zero-point"], ["warning", "float32-graph"]]
    assert "2  layer0/QuantizeLinear, layer1/DequantizeLinear" in lines[2]
    assert lines[3].endswith("1  (graph)")
    assert findings_table(()) == "no findings"


def test_the_document_lists_every_rule_as_it_is() -> None:
    for rule in RULES:
        assert f"| `{rule.name}` | {rule.severity} | {rule.allowed} |" in DOCUMENT


def test_the_command_prints_the_findings_and_fails_on_errors(tmp_path: Path) -> None:
    def run(model: ir.Model, *options: str) -> Result:
        ir.save(model, tmp_path / "m.onnx")
        return CliRunner().invoke(main, ["lint", str(tmp_path / "m.onnx"), *options])

    good, warned, bad = (run(model) for model in (conv_model(), quantized(graph=np.float32), quantized(zero=3)))
    assert [result.exit_code for result in (good, warned, bad)] == [0, 0, 1]
    assert good.stdout == f"{tmp_path / 'm.onnx'}: 0 errors, 0 warnings\n"
    assert warned.stdout.endswith("0 errors, 1 warnings\n")
    assert "a zero point other than 0" in bad.stdout
    report = json.loads(run(quantized(zero=3), "--json").stdout)
    assert report["ok"] is False
    assert report["findings"][0]["rule"] == "zero-point"
    assert report["findings"][0]["layer"] == "layer0"
