"""``trt-build`` with the real TensorRT-RTX, on small graphs."""

import hashlib
import json
import platform
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from qdq import conv_model
from rtx import REFUSED, float_product, needs_rtx, open_model, saved

import dmq_export.common.extras
from dmq_export.cli import main
from dmq_export.commands import trt_build
from engines.tensorrt.capability import runs_on
from engines.tensorrt.plan_file import read_plan_metadata
from engines.tensorrt.profile import ShapeRange

RTX = ("--runtime", "tensorrt-rtx")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["trt-build", *map(str, arguments), *RTX])


def inspected(plan: Path) -> str:
    return CliRunner().invoke(main, ["inspect", str(plan)]).stdout


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    (tmp_path / "in").mkdir()
    return saved(conv_model(), tmp_path / "in" / "model.onnx")


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out" / "m.plan"


@pytest.fixture
def unlinted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the linter lets through today it may refuse tomorrow; what the compiler then says is tested here."""
    monkeypatch.setattr(trt_build, "lint_model", lambda model: ())


@needs_rtx
def test_a_plan_is_written_with_what_it_is(onnx: Path, plan: Path) -> None:
    result = run(onnx, "-o", plan, "--compute-capability", "12.0", "--compute-capability", "8.9")
    assert result.exit_code == 0, result.output
    assert "products in Int8" in result.stdout
    assert "for compute capability 8.9, 12.0, TensorRT-RTX 1." in result.stdout
    metadata = read_plan_metadata(plan)
    assert metadata.sha256 == hashlib.sha256(plan.read_bytes()).hexdigest()
    assert (metadata.runtime, metadata.machine.gpu, metadata.capabilities) == ("tensorrt-rtx", None, ("8.9", "12.0"))
    assert metadata.onnx_sha256 == {"model.onnx": hashlib.sha256(onnx.read_bytes()).hexdigest()}
    assert metadata.kernels is not None
    assert (metadata.kernels.integer, metadata.kernels.not_integer) == (("layer3/Conv",), ())
    assert metadata.kernels.engine_bytes == plan.stat().st_size
    assert metadata.kernels.activation_bytes is not None
    made = result.stdout.split("\n\n")
    assert made[0] in inspected(plan)
    assert made[1] in inspected(plan)
    assert sorted(path.name for path in plan.parent.iterdir()) == ["m.engine.json", "m.plan"]


@needs_rtx
def test_json_holds_the_figures(onnx: Path, plan: Path) -> None:
    content = json.loads(run(onnx, "-o", plan, "--json", "--beside-float16").stdout)
    assert content["capabilities"] == ["8.0", "8.6", "8.9", "12.0"]
    assert content["kernels"]["integer"] == ["layer3/Conv"]
    assert (content["float16"]["integer"], content["float16"]["float_products"]) == ([], ["layer3/Conv"])
    assert content["float16"]["constant_bytes"] > 1.9 * content["kernels"]["constant_bytes"]


@needs_rtx
def test_an_open_batch_needs_no_shapes(tmp_path: Path, plan: Path) -> None:
    result = run(saved(open_model(), tmp_path / "m.onnx"), "-o", plan)
    assert result.exit_code == 0, result.output
    assert "the batch is open: building for 1 to 8, tuned for 2 (--shapes x:1x4x32,2x4x32,8x4x32 says" in result.stderr
    metadata = read_plan_metadata(plan)
    assert metadata.shapes == {"x": ShapeRange((1, 4, 32), (2, 4, 32), (8, 4, 32))}
    assert metadata.kernels is not None
    assert (metadata.kernels.activation_bytes, metadata.kernels.float_products) == (None, ("layer4/MatMul",))
    for text in (result.stdout, inspected(plan)):
        assert "activations moved" in text
        assert "Bytes moved are known where every size is fixed" in text


@needs_rtx
def test_one_shape_fixes_the_bytes(tmp_path: Path, plan: Path) -> None:
    result = run(saved(open_model(), tmp_path / "m.onnx"), "-o", plan, "--shapes", "x:2x4x32")
    assert result.exit_code == 0, result.output
    kernels = read_plan_metadata(plan).kernels
    assert kernels is not None
    assert kernels.activation_bytes is not None
    assert kernels.activation_bytes >= 2 * 2 * 4 * (32 + 8)  # the input and the output in float16


@needs_rtx
@pytest.mark.usefixtures("unlinted")
def test_a_float_product_is_told_and_refused_where_that_is_asked(tmp_path: Path, plan: Path) -> None:
    onnx = saved(float_product(), tmp_path / "m.onnx")
    result = run(onnx, "-o", plan, "--strict")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "--strict: meant for Int8, but run in float: layer3; nothing is written" in result.stderr
    assert list(plan.parent.iterdir()) == []
    assert "float, meant for Int8" in run(onnx, "-o", plan).stdout


@needs_rtx
@pytest.mark.usefixtures("unlinted")
@pytest.mark.parametrize("by", REFUSED)
def test_a_refusal_is_one_line_and_leaves_nothing(by: str, tmp_path: Path, plan: Path) -> None:
    build, message = REFUSED[by]
    result = run(saved(build(), tmp_path / "m.onnx"), "-o", plan)
    assert (result.exit_code, result.stdout) == (2, "")
    error = result.stderr.splitlines()[-1]
    assert error.startswith("Error: ")
    assert message in error
    assert list(plan.parent.iterdir()) == []


def test_a_missing_runtime_is_said_before_all_else(onnx: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dmq_export.common.extras, "find_spec", lambda name: None)
    result = run(onnx, "-o", plan, "--shapes", "y:1")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == (
        "Error: building with TensorRT-RTX needs what is not installed, tensorrt_rtx, polygraphy: pip install "
        "'dmq-export[tensorrt-rtx]'\n"
    )


def test_a_platform_without_it_is_told(onnx: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    result = run(onnx, "-o", plan)
    assert result.exit_code == 2
    assert "TensorRT-RTX cannot build on Linux aarch64: NVIDIA has it for Linux and Windows on x86-64" in result.stderr


def test_where_there_is_no_room_nothing_is_built(onnx: Path, plan: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    result = run(onnx, "-o", plan)
    assert result.exit_code == 2
    assert f"{plan.parent} has 1000 B left, at least" in result.stderr


def test_types_of_newer_gpus_narrow_where_it_runs() -> None:
    assert runs_on((), ["INT8"]) == ("8.0", "8.6", "8.9", "12.0")
    assert runs_on((), ["INT8", "FLOAT8E4M3FN"]) == ("8.9", "12.0")
    assert runs_on(((7, 5), (12, 1)), ["FLOAT4E2M1"]) == ("12.1",)
