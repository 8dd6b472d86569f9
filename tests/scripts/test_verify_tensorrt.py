"""The script for a GPU machine: sound as far as that can be seen without one."""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import onnx_ir as ir
import pytest
from click.testing import CliRunner
from host_gpu import plan_for
from qdq import conv_model

from dmq_export.cli import main
from dmq_export.graph.export import save_onnx
from engines.onnxruntime import OnnxRuntimeDenoiser
from engines.tensorrt.summary import KernelSummary

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "verify_tensorrt.sh"
HELPER = ROOT / "bench" / "trt_verdict.py"
OPTIONS = {name: {option for each in command.params for option in each.opts} for name, command in main.commands.items()}


@pytest.fixture(scope="module")
def helper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trt_verdict", HELPER)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_bash_parses_it_and_it_can_be_run() -> None:
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    assert SCRIPT.stat().st_mode & 0o111


def test_shellcheck_has_nothing_to_say() -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", str(SCRIPT)], check=True)


def test_without_a_checkpoint_it_says_how_it_is_used() -> None:
    for arguments in ([], ["--runtime"], ["--runtime", "tensorrt-rtx"], ["--runtime", "tpu", "ckpt"], list("abcd")):
        result = subprocess.run([str(SCRIPT), *arguments], capture_output=True, text=True, check=False)
        assert (result.returncode, result.stdout) == (2, "")
        assert "verify_tensorrt.sh [--runtime tensorrt|tensorrt-rtx] CHECKPOINT [FOLDER] [BATCH]" in result.stderr
        assert "Exit 0: the verdict is good; 1: it is not; 2: usage." in result.stderr


def test_every_command_and_option_it_uses_exists() -> None:
    text = SCRIPT.read_text().replace("\\\n", " ")
    lines = re.findall(r"^\s*run dmq-export ([a-z]\S*)(.*)$", text, re.M)
    assert [name for name, _ in lines] == ["doctor", "onnx", "onnx", "lint", "trt-build", "inspect", "bench", "bench"]
    lines += [("trt-build", settings) for settings in re.findall(r"settings=\((.*)\)", text)]
    assert len(lines) == 10
    for name, rest in lines:
        assert set(re.findall(r"(?:^|\s)(--?[a-z][a-z-]*)", rest)) <= OPTIONS[name], name


def test_the_engines_it_names_are_read_as_it_means_them(tmp_path: Path) -> None:
    """``bench`` gets as far as the file, which is not there."""
    for prefix in ("tensorrt", "tensorrt-rtx", "onnxruntime-tensorrt-rtx"):
        result = CliRunner().invoke(main, ["bench", f"{prefix}:{tmp_path / 'int8.plan'}"])
        assert f"Error: {tmp_path / 'int8.plan'} is no engine" in result.stderr


def test_every_value_it_chooses_is_allowed() -> None:
    text = SCRIPT.read_text().replace("\\\n", " ")
    chosen = dict(
        re.findall(r"(--[a-z-]+) ([a-z0-9]+)\b", " ; ".join(re.findall(r"run dmq-export.*|settings=.*", text)))
    )
    parameters = {option: each for command in main.commands.values() for each in command.params for option in each.opts}
    assert {"--target", "--dtype", "--optimization-level"} <= set(chosen)
    for option, value in chosen.items():
        parameters[option].type.convert(value, parameters[option], click.Context(main))


def test_the_shape_option_fills_in_the_batch(helper: ModuleType, tiny_onnx: Path) -> None:
    assert helper.shape_option(ir.load(tiny_onnx), 3) == "sample:3x1x8x8"


def test_the_plain_network_is_written_without_quantizers(helper: ModuleType, tmp_path: Path) -> None:
    save_onnx(conv_model(), tmp_path / "int8.onnx")
    command = [sys.executable, str(HELPER), "float16", str(tmp_path / "int8.onnx"), str(tmp_path / "float16.onnx")]
    subprocess.run(command, check=True)
    assert {node.op_type for node in ir.load(tmp_path / "float16.onnx").graph} == {"Conv"}


@pytest.mark.parametrize(
    ("change", "integer", "expected"),
    [
        (lambda y: y, ("conv",), True),
        (lambda y: y * np.nan, ("conv",), False),
        (lambda y: 3 * y, ("conv",), False),
        (lambda y: y, (), False),
    ],
)
def test_the_verdict_is_good_where_numbers_and_kernels_are(
    helper: ModuleType,
    tiny_checkpoint_folder: Path,
    tiny_onnx: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    change: Callable[[np.ndarray], np.ndarray],
    integer: tuple[str, ...],
    expected: bool,
) -> None:
    """ONNX Runtime stands in for the engine, which needs a GPU."""
    shutil.copy(tiny_onnx, tmp_path / "portable.onnx")
    portable = OnnxRuntimeDenoiser(tiny_onnx)
    denoiser: Callable[..., np.ndarray] = lambda *given, **rest: change(portable(*given, **rest))  # noqa: E731
    monkeypatch.setattr("engines.tensorrt.engine.TensorRtDenoiser", lambda path: denoiser)
    kernels = KernelSummary(integer, (), (), {}, None, 0, 0)
    plan_for("tensorrt-rtx", tmp_path / "int8.plan", kernels=kernels)
    assert helper.verdict(tiny_checkpoint_folder, tmp_path) is expected
