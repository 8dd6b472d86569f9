"""``trt-build`` for TensorRT: everything around the build itself, which needs a GPU and is replaced here."""

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from engine_information import HALF, INT8, as_ten, layer
from plans import MACHINE
from qdq import GraphBuilder, conv_model

from dmq_export.cli import main
from dmq_export.commands.trt_build import integer_nodes, read_source
from dmq_export.errors import DmqError
from dmq_export.graph.onnx_file import load_onnx
from engines.problem import Problem
from engines.tensorrt import build as trt_build
from engines.tensorrt import environment as trt_environment
from engines.tensorrt.plan_file import read_plan
from engines.tensorrt.profile import ShapeRange, parse_shapes

PLAN = b"what TensorRT would have built"
KERNELS = [layer("layer3/Conv", "CaskConvolution", INT8, HALF), layer("layer0/QuantizeLinear", "Scale", HALF, INT8)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["trt-build", *map(str, arguments)])


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    path = tmp_path / "in" / "model.onnx"
    ir.save(conv_model(), path)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A machine whose TensorRT builds :data:`PLAN`; holds what it was asked to build."""
    asked: dict[str, Any] = {"kernels": KERNELS}

    def build(source: Any, settings: Any) -> bytes:
        asked.update(source=source, settings=settings)
        return PLAN

    monkeypatch.setattr(trt_environment, "missing", list)
    monkeypatch.setattr(trt_environment, "require_tensorrt", lambda: MACHINE)
    monkeypatch.setattr(trt_build, "_engine_bytes", build)
    monkeypatch.setattr(trt_build, "deserialize", lambda content, *, host_code: content)
    monkeypatch.setattr(trt_build, "_inspected", lambda engine: as_ten(asked["kernels"]))
    return asked


def test_a_plan_is_written_with_its_metadata(onnx: Path, out: Path, gpu: dict[str, Any]) -> None:
    result = run(onnx, "-o", out / "m.plan", "--workspace", "2GiB", "--refit", "--optimization-level", 5)
    assert result.exit_code == 0, result.output
    assert "int8" in result.stdout
    assert "warning" not in result.stdout
    content, metadata = read_plan(out / "m.plan", MACHINE)
    assert content == PLAN
    assert metadata.layers == {"int8": 1, "float16": 1}
    assert metadata.settings == {"optimization_level": 5, "workspace": 2**31, "refit": True}
    assert metadata.shapes == {"x": ShapeRange(*[(1, 32, 8, 8)] * 3)}
    assert list(metadata.onnx_sha256) == ["model.onnx"]
    assert sorted(path.name for path in out.iterdir()) == ["m.engine.json", "m.plan"]
    assert gpu["source"].integer_nodes == ("layer3/Conv",)


def test_a_layer_that_is_not_what_it_was_meant_to_be_is_told(onnx: Path, out: Path, gpu: dict[str, Any]) -> None:
    gpu["kernels"] = [layer("layer3/Conv", "CaskConvolution", HALF, HALF)]
    result = run(onnx, "-o", out / "m.plan")
    assert "warning: 1 layers were meant to run in int8 and do not: layer3/Conv" in result.stdout
    assert json.loads(run(onnx, "-o", out / "m.plan", "--json").stdout)["not_integer"] == ["layer3/Conv"]


def test_a_missing_runtime_is_said_before_all_else(onnx: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt_environment, "missing", lambda: [Problem("no NVIDIA driver", "use a machine with one")])
    result = run(onnx, "-o", out / "m.plan", "--shapes", "y:1", "--runtime", "tensorrt")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "Error: TensorRT cannot work here: no NVIDIA driver: use a machine with one\n"
    assert list(out.iterdir()) == []


def test_what_the_linter_refuses_is_not_built(tiny_onnx: Path, out: Path, gpu: dict[str, Any]) -> None:
    result = run(tiny_onnx, "-o", out / "m.plan")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "cannot become an engine of TensorRT-RTX" in result.stderr
    assert list(out.iterdir()) == []
    assert "source" not in gpu


def test_a_failing_build_leaves_what_was_there(
    onnx: Path, out: Path, gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(onnx, "-o", out / "m.plan").exit_code == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def fail(source: Any, settings: Any) -> bytes:
        raise DmqError("TensorRT cannot build it")

    monkeypatch.setattr(trt_build, "_engine_bytes", fail)
    assert run(onnx, "-o", out / "m.plan", "--refit").exit_code == 2
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Missing option '-o' / '--output'"),
        (["-o", "m.engine"], "m.engine must end in .plan"),
        (["-o", "absent/m.plan"], "cannot write absent/m.plan"),
        (["-o", "m.plan", "--shapes", "x"], "'x' is no shape"),
        (["-o", "m.plan", "--shapes", "y:1"], "the model has no input 'y': it takes x"),
        (["-o", "m.plan", "--shapes", "x:2x32x8x8"], "does not fit the model's"),
        (["-o", "m.plan", "--workspace", "much"], "'much' is no size"),
        (["-o", "m.plan", "--optimization-level", "6"], "6 is not in the range"),
        (["-o", "m.plan", "--hardware-compatible", "all"], "'all' is not one of 'none'"),
        (["-o", "m.plan", "--compute-capability", "9.0"], "9.0 is not one of 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"),
        (["-o", "m.plan", "--workspace", "1G"], "--workspace is for TensorRT, which is not what builds here"),
    ],
)
def test_mistakes_are_one_line(onnx: Path, options: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(onnx.parent)
    result = run(onnx, *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert message in result.stderr.splitlines()[-1]
    assert [path.name for path in onnx.parent.iterdir()] == ["model.onnx"]


def test_lint_only_is_lint(onnx: Path, tiny_onnx: Path) -> None:
    assert run(onnx, "--lint-only").stdout == f"{onnx}: 0 errors, 0 warnings\n"
    for options in ([], ["--json"]):
        alone = CliRunner().invoke(main, ["lint", str(tiny_onnx), *options])
        result = run(tiny_onnx, "--lint-only", *options)
        assert (result.exit_code, result.stdout) == (1, alone.stdout)


def test_only_products_with_both_inputs_in_int8_are_meant_to_be_integer() -> None:
    b = GraphBuilder()
    x = b.input("x", 4, 32)
    whole = b.op("MatMul", b.pair(x), b.weight(32, 32, axis=1))
    half = b.op("MatMul", b.pair(x), b.constant([[1.0]] * 32))
    model = b.model(whole, half, b.op("MatMul", x, b.constant([[1.0]] * 32)))
    assert integer_nodes(model) == (whole.removesuffix("_out"),)


def test_sizes_that_inputs_share_need_one_shape(tmp_path: Path) -> None:
    b = GraphBuilder()
    total = b.op("Add", b.input("sample", "batch", 4), b.input("other", "batch", 1))
    ir.save(b.model(total), tmp_path / "m.onnx")
    model, notes = load_onnx(tmp_path / "m.onnx"), list[str]()
    source = read_source(model, tmp_path / "m.onnx", parse_shapes(["sample:1x4,4x4,16x4"]), notes.append)
    assert source.shapes["other"] == ShapeRange((1, 1), (4, 1), (16, 1))
    assert notes == []


@pytest.mark.parametrize(("stated", "sizes"), [(None, (1, 2, 8)), ([2, 3, 4], (2, 3, 4))])
def test_a_batch_that_nobody_gives_is_what_the_file_states(stated: object, sizes: tuple[int, ...]) -> None:
    b = GraphBuilder()
    model = b.model(b.op("Add", b.input("sample", "batch", 4), b.input("other", "batch", 1)))
    model.metadata_props["dmq"] = json.dumps({"batch": stated})
    notes: list[str] = []
    source = read_source(model, Path("m.onnx"), {}, notes.append)
    assert source.shapes["other"] == ShapeRange(*((size, 1) for size in sizes))
    assert notes == [
        f"the batch is open: building for {sizes[0]} to {sizes[2]}, tuned for {sizes[1]} "
        + "(--shapes sample:{}x4,{}x4,{}x4 says otherwise)".format(*sizes)
    ]


def test_another_size_than_the_batch_must_be_given() -> None:
    b = GraphBuilder()
    model = b.model(b.op("Neg", b.input("sample", "batch", 4, "width")))
    with pytest.raises(DmqError, match=r"has the open size 'width': give --shapes sample:MIN,OPT,MAX"):
        read_source(model, Path("m.onnx"), {}, lambda line: None)


def test_an_engine_that_is_not_as_meant_is_refused_where_that_is_asked(
    onnx: Path, out: Path, gpu: dict[str, Any]
) -> None:
    gpu["kernels"] = [layer("layer3/Conv", "CaskConvolution", HALF, HALF)]
    result = run(onnx, "-o", out / "m.plan", "--strict")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "--strict: meant for Int8, but run in float: layer3; nothing is written" in result.stderr
    assert list(out.iterdir()) == []


def test_what_only_tensorrt_rtx_knows_is_refused(onnx: Path, out: Path, gpu: dict[str, Any]) -> None:
    for option in (["--compute-capability", "8.9"], ["--beside-float16"]):
        result = run(onnx, "-o", out / "m.plan", *option)
        assert result.exit_code == 2
        assert f"{option[0]} is for TensorRT-RTX, which is not what builds here" in result.stderr
