"""The script for a GPU machine: sound as far as that can be seen without one."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import click
import numpy as np
import onnx_ir as ir
import pytest
from qdq import GraphBuilder, conv_model

from dmq_export.cli import main
from dmq_export.export import serialized
from engines.ort import OnnxSession

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "verify_tensorrt.sh"
OPTIONS = {name: {option for each in command.params for option in each.opts} for name, command in main.commands.items()}


@pytest.fixture(scope="module")
def helper() -> ModuleType:
    spec = importlib.util.spec_from_file_location("trt_verdict", ROOT / "bench" / "trt_verdict.py")
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
    result = subprocess.run([str(SCRIPT)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "scripts/verify_tensorrt.sh CHECKPOINT [FOLDER] [BATCH]" in result.stderr


def test_every_command_and_option_it_uses_exists() -> None:
    text = SCRIPT.read_text().replace("\\\n", " ")
    lines = re.findall(r"^\s*run dmq-export ([a-z]\S*)(.*)$", text, re.M)
    assert [name for name, _ in lines] == ["onnx", "onnx", "lint", "trt-build", "inspect"]
    for name, rest in lines:
        assert set(re.findall(r"\s(--?[a-z][a-z-]*)", rest)) <= OPTIONS[name], name


def test_every_value_it_chooses_is_allowed() -> None:
    text = SCRIPT.read_text().replace("\\\n", " ")
    chosen = dict(re.findall(r"(--[a-z-]+) ([a-z0-9]+)\b", " ; ".join(re.findall(r"run dmq-export.*", text))))
    parameters = {option: each for command in main.commands.values() for each in command.params for option in each.opts}
    assert {"--target", "--dtype", "--optimization-level"} <= set(chosen)
    for option, value in chosen.items():
        parameters[option].type.convert(value, parameters[option], click.Context(main))


def test_the_shape_option_fills_in_the_batch(helper: ModuleType, tiny_onnx: Path) -> None:
    assert helper.shape_option(ir.load(tiny_onnx), 3) == "sample:3x1x8x8"


def test_the_graph_without_quantizers_computes_the_same_on_the_grid(helper: ModuleType) -> None:
    """On inputs that quantize without error, both are one float convolution of the dequantized weights."""
    model = conv_model(dtype=np.float32)
    x = np.random.default_rng(0).integers(-127, 128, (1, 32, 8, 8)).astype(np.float32) * np.float32(0.1)
    (expected,) = OnnxSession(serialized(model)).run({"x": x}).values()
    helper.unquantize(model)
    assert {node.op_type for node in model.graph} == {"Conv"}
    (found,) = OnnxSession(serialized(model)).run({"x": x}).values()
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_weights_become_floats_of_the_scales_type(helper: ModuleType) -> None:
    b = GraphBuilder()
    scale = np.linspace(0.1, 0.4, 32)
    model = b.model(b.op("MatMul", b.pair(b.input("x", 4, 16)), b.weight(16, 32, axis=1, scale=scale)))
    helper.unquantize(model)
    weight = model.graph[0].inputs[1].const_value.numpy()
    assert weight.dtype == np.float16
    np.testing.assert_array_equal(weight, np.broadcast_to(scale.astype(np.float16), (16, 32)))
