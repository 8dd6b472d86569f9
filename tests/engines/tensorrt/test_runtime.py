"""The runtime's module: its log, and what it says of a plan; Polygraphy's log is kept off the user's streams."""

import logging
from pathlib import Path

import onnx_ir as ir
import pytest
from qdq import conv_model

from dmq_export.errors import DmqError
from engines.nvidia_driver import driver_problem
from engines.tensorrt.compiler import Compiled, Request, compile_onnx
from engines.tensorrt.runtime import captured_log, deserialize, new_logger

polygraphy = pytest.importorskip("polygraphy.logger", reason="polygraphy is not installed").G_LOGGER


def test_the_log_is_captured_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with captured_log() as lines:
        polygraphy.verbose("what TensorRT calls information")
        polygraphy.error("an error")
    assert [line.split("] ")[-1] for line in lines] == ["what TensorRT calls information", "an error"]
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_logging_is_as_before_afterwards(capfd: pytest.CaptureFixture[str]) -> None:
    ours = logging.getLogger("Polygraphy")
    before = (ours.level, ours.propagate, list(ours.handlers))
    with pytest.raises(RuntimeError), captured_log():
        raise RuntimeError
    assert (ours.level, ours.propagate, list(ours.handlers)) == before
    polygraphy.error("printed again")
    assert "printed again" in capfd.readouterr().out


def test_warnings_and_errors_are_collected() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    lines: list[str] = []
    logger = new_logger("tensorrt-rtx", lines)
    for severity in ("VERBOSE", "INFO", "WARNING", "ERROR", "INTERNAL_ERROR"):
        logger.log(getattr(rtx.ILogger, severity), severity.lower())
    assert lines == ["[W] warning", "[E] error", "[F] internal_error"]


def test_what_is_no_plan_is_refused_by_tensorrt_rtx_itself(capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    lines: list[str] = []
    with pytest.raises(DmqError, match=r"TensorRT-RTX refuses the plan: .*: ") as caught:
        deserialize(b"no plan" * 100, host_code=False, runtime="tensorrt-rtx", log=lines)
    assert "\n" not in str(caught.value)
    assert any("incompatible serialization version" in line for line in lines)
    assert capfd.readouterr() == ("", "")


def test_tensorrt_rtx_reads_its_own_plan_as_far_as_the_driver(tmp_path: Path) -> None:
    """Up to the first call of CUDA, where the machine has no GPU."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from dmq_export.graph.export import save_onnx

    model = conv_model()
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    save_onnx(model, tmp_path / "model.onnx")
    compiled = compile_onnx(Request(tmp_path / "model.onnx", capabilities=((8, 9),)))
    assert isinstance(compiled, Compiled)
    if driver_problem() is None:
        pytest.skip("NVIDIA's driver is here")
    with pytest.raises(DmqError, match="TensorRT-RTX refuses the plan: no usable NVIDIA driver: see dmq-export doctor"):
        deserialize(compiled.engine, host_code=False, runtime="tensorrt-rtx")
