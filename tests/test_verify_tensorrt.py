"""The script for a GPU machine: sound as far as that can be seen without one."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import click
import onnx_ir as ir
import pytest

from dmq_export.cli import main

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
