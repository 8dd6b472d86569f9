"""The rules: each catches a graph made to break it, and says nothing of one that nearly does."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from lint_cases import BFLOAT16, BROKEN, NEAR, Case, matmul, quantized, sums
from qdq import CHANNELS, GraphBuilder, conv_model, wide_model

from dmq_export.cli import main
from dmq_export.errors import CheckFailedError, DmqError
from dmq_export.lint import (
    RULES,
    Finding,
    LintTarget,
    errors,
    findings_table,
    lint_model,
    lint_target,
    require_buildable,
)
from dmq_export.lint.finding import MEANINGS, SEVERITIES, Rule

DOCUMENT = (Path(__file__).resolve().parents[3] / "docs/lint.md").read_text()
RULE = {rule.name: rule for rule in RULES}
TENSORRT = LintTarget("tensorrt", (10, 10))


def target_of(case: Case) -> LintTarget:
    """A target that minds the case's rule."""
    return LintTarget(gpu=case.gpu) if RULE[case.rule].rtx is not None else TENSORRT


def by_rule(model: ir.Model, target: LintTarget | None = None) -> dict[str, list[Finding]]:
    found: dict[str, list[Finding]] = {}
    for finding in lint_model(model, target or LintTarget()):
        found.setdefault(finding.rule, []).append(finding)
    return found


@pytest.mark.parametrize("case", BROKEN, ids=str)
def test_a_broken_rule_is_found_at_its_node(case: Case) -> None:
    model = case.build()
    findings = by_rule(model, target_of(case)).get(case.rule, [])
    assert any(case.found in finding.found for finding in findings), by_rule(model, target_of(case))
    nodes = {node.name for node in model.graph}
    assert all(finding.node in nodes or not finding.node for finding in findings)


@pytest.mark.parametrize("case", NEAR, ids=str)
def test_a_rule_says_nothing_of_what_nearly_breaks_it(case: Case) -> None:
    assert case.rule not in by_rule(case.build(), target_of(case))


def test_every_rule_is_broken_by_a_graph_and_kept_by_another() -> None:
    assert {case.rule for case in BROKEN} == set(RULE)
    kept = {case.rule for case in NEAR} | {name for name in RULE if name not in by_rule(wide_model(), TENSORRT)}
    assert kept == set(RULE)


def test_rules_have_names_of_their_own() -> None:
    assert len(RULE) == len(RULES)


@pytest.mark.parametrize("model", [conv_model(), wide_model()], ids=["one convolution", "every construct"])
@pytest.mark.parametrize("target", [LintTarget(), TENSORRT], ids=["TensorRT-RTX", "TensorRT"])
def test_a_graph_that_keeps_all_rules_has_no_findings(model: ir.Model, target: LintTarget) -> None:
    assert lint_model(model, target) == ()


@pytest.mark.parametrize(("version", "minds"), [((10, 12), True), ((10, 13), False), ((11, 0), False)])
def test_a_rule_ends_with_the_release_that_no_longer_minds(version: tuple[int, ...], minds: bool) -> None:
    found = by_rule(quantized(0.1, scale_type=np.float32), LintTarget("tensorrt", version))
    assert ("scale-type" in found) == minds


@pytest.mark.parametrize(("gpu", "minds"), [(90, True), (100, False)])
def test_data_centers_have_four_bit_floats_earlier(gpu: int, minds: bool) -> None:
    model = next(case.build() for case in BROKEN if "FLOAT4E2M1" in case.found)
    assert ("gpu-type" in by_rule(model, LintTarget("tensorrt", (10, 10), gpu))) == minds


def test_the_bound_of_a_sum_is_that_of_its_worst_codes() -> None:
    """-128 times -128 is the largest product; a Clip in front narrows what the data can be."""
    (finding,) = by_rule(sums(5, -128))["half-sum"]
    assert "81920" in finding.found
    assert finding.severity == "wrong"
    (finding,) = by_rule(sums(5, 127))["half-sum"]
    assert "81280" in finding.found  # 5 * 127 * 128
    assert "half-sum" not in by_rule(sums(4, 127))  # 65024


def test_the_bound_of_a_sum_is_taken_channel_by_channel() -> None:
    codes = np.ones((CHANNELS, CHANNELS))
    codes[:, 3] = 127

    def weight(b: GraphBuilder) -> str:
        return b.op("DequantizeLinear", b.constant(codes, np.int8), b.constant(np.arange(1, 33)), axis=1)

    (finding,) = by_rule(matmul(weight))["half-sum"]
    assert finding.found == f"sums of codes of up to {CHANNELS * 127 * 128}, 1 of 32 channels above"


def test_quantizers_of_tensorrts_own_domain_are_read() -> None:
    """As Model Optimizer exports them from PyTorch."""
    b = GraphBuilder(20, np.float32)
    scale = b.constant(0.1)

    def pair(x: str) -> str:
        codes = b.op("TRT_FP8QuantizeLinear", x, scale, domain="trt")
        return b.op("TRT_FP8DequantizeLinear", codes, scale, domain="trt")

    data, weight = pair(b.input("x", 4, CHANNELS)), pair(b.constant(np.ones((CHANNELS, CHANNELS))))
    model = b.model(b.op("MatMul", data, weight))
    assert set(by_rule(model)) == {"float32-graph"}
    assert "gpu-type" in by_rule(model, LintTarget(gpu=86))


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
    findings = lint_model(ir.load(tiny_onnx), TENSORRT)
    assert {"constant-type", "activation-scale-read"} <= {finding.rule for finding in errors(findings)}
    assert {layer.spec.name for layer in tiny_checkpoint.layers} == {
        finding.layer for finding in findings if finding.rule == "activation-scale-read"
    }
    assert {"constant-type", "zero-point"} <= {finding.rule for finding in errors(lint_model(ir.load(tiny_onnx)))}


def test_a_refusal_is_one_line_with_the_first_error_and_the_count() -> None:
    findings = lint_model(quantized(zero=3))
    require_buildable(tuple(finding for finding in findings if finding not in errors(findings)), "m.onnx")
    with pytest.raises(CheckFailedError) as caught:
        require_buildable(findings, "m.onnx")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(
        "m.onnx cannot become an engine of TensorRT-RTX 1.7.1: layer0/QuantizeLinear: a zero point other than 0"
    )
    assert message.endswith("(1 more: run dmq-export lint)")


def test_the_table_counts_like_findings_and_puts_the_worst_first() -> None:
    lines = findings_table(lint_model(quantized(zero=3, graph=np.float32))).splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["refused", "zero-point"], ["slower", "float32-graph"]]
    assert "2  layer0/QuantizeLinear, layer1/DequantizeLinear" in lines[2]
    assert lines[3].endswith("1  (graph)")
    assert findings_table(()) == "no findings"


def test_numbers_that_are_wrong_come_before_what_is_float() -> None:
    found = [finding.severity for finding in lint_model(sums(5, -128, dtype=np.float16))]
    assert found == sorted(found, key=SEVERITIES.index)
    assert found[0] == "wrong"


def row(rule: Rule) -> str:
    tried = "TensorRT-RTX 1.7.1.116" if rule.tried and rule.rtx else "takes it" if rule.tried else "not run"
    until = f" before {'.'.join(map(str, rule.until))}" if rule.until else ""
    severities = f"{rule.rtx or '-'} | {rule.tensorrt or '-'}{until if rule.tensorrt else ''}"
    return f"| `{rule.name}` | {severities} | {rule.allowed} | {tried} |"


def test_the_document_lists_every_rule_as_it_is() -> None:
    lines = DOCUMENT.splitlines()
    assert [line for line in map(row, RULES) if line not in lines] == []
    for severity, meaning in MEANINGS.items():
        assert f"| `{severity}` | {meaning} |" in lines


@pytest.mark.parametrize(
    ("words", "target"),
    [
        (("tensorrt-rtx", None, None), LintTarget("tensorrt-rtx", (1, 7, 1))),
        (("tensorrt-rtx", "1.7.1.116", "sm89"), LintTarget("tensorrt-rtx", (1, 7, 1, 116), 89)),
        (("tensorrt", "10.13", "sm90"), LintTarget("tensorrt", (10, 13), 90)),
    ],
)
def test_a_target_is_read_as_users_write_it(words: tuple[str, str | None, str | None], target: LintTarget) -> None:
    assert lint_target(*words) == target  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("tensorrt-rtx", "new", None), "--runtime-version new is no version such as 1.7.1"),
        (("tensorrt-rtx", None, "8.9"), "--gpu 8.9 is no compute capability such as sm89"),
        (
            ("tensorrt-rtx", None, "sm90"),
            "TensorRT-RTX compiles for sm75, sm80, sm86, sm89, sm120, sm121, not for sm90",
        ),
    ],
)
def test_a_target_that_is_none_is_refused(words: tuple[str, str | None, str | None], message: str) -> None:
    with pytest.raises(DmqError, match=message):
        lint_target(*words)  # type: ignore[arg-type]


def test_a_user_is_told_where_the_rules_come_from() -> None:
    assert LintTarget().note is None
    assert lint_target("tensorrt-rtx", "1.7.1.116").note is None
    assert "nothing is known" in str(lint_target("tensorrt-rtx", "1.8").note)
    assert "were read" in str(lint_target("tensorrt").note)


def lint(model: ir.Model, folder: Path, *options: str) -> Result:
    ir.save(model, folder / "m.onnx")
    return CliRunner().invoke(main, ["lint", str(folder / "m.onnx"), *options])


def test_the_command_prints_the_findings_and_fails_on_errors(tmp_path: Path) -> None:
    good, warned, bad = (
        lint(model, tmp_path) for model in (conv_model(), quantized(graph=np.float32), quantized(zero=3))
    )
    assert [result.exit_code for result in (good, warned, bad)] == [0, 0, 1]
    assert good.stdout == f"{tmp_path / 'm.onnx'}: 0 errors, 0 warnings\n"
    assert warned.stdout.endswith("0 errors, 1 warnings (1 slower)\n")
    assert "a zero point other than 0" in bad.stdout
    report = json.loads(lint(quantized(zero=3), tmp_path, "--json").stdout)
    assert report["ok"] is False
    assert report["findings"][0]["rule"] == "zero-point"
    assert report["findings"][0]["layer"] == "layer0"


def test_the_command_takes_a_runtime_a_version_and_a_gpu(tmp_path: Path) -> None:
    mixed = quantized(0.1, scale_type=np.float32)
    assert lint(mixed, tmp_path).exit_code == 0
    strict = lint(mixed, tmp_path, "--runtime", "tensorrt")
    assert strict.exit_code == 1
    assert "and not run" in strict.stderr
    assert lint(mixed, tmp_path, "--runtime", "tensorrt", "--runtime-version", "10.13").exit_code == 0
    assert lint(quantized(graph=BFLOAT16), tmp_path, "--gpu", "sm75").exit_code == 1
    assert lint(mixed, tmp_path, "--gpu", "sm90").exit_code == 2
    assert lint(mixed, tmp_path, "--shapes", "x:4x32").exit_code == 2
