"""An installation without extras does what it is for, and says of the rest what to install."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from dmq_export.common.extras import EXTRAS, install, require
from dmq_export.errors import DmqError

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")  # pytest brings it for Python 3.10

ROOT = Path(__file__).resolve().parents[3]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
CORE_AND_A_RUNTIME = """
import json, sys
sys.modules.update(dict.fromkeys({blocked!r}))
from click.testing import CliRunner
from dmq_export.cli import main

for line in json.load(sys.stdin):
    result = CliRunner().invoke(main, line)
    print(json.dumps([result.exit_code, result.stdout, result.stderr]))
"""


def test_one_command_gets_what_is_missing() -> None:
    assert install("torch", "diffusers", "onnxscript") == "pip install 'dmq-export[calibrate]'"
    assert install("onnx_ir", "openvino") == "pip install onnx-ir 'dmq-export[openvino]'"


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    require("this", "torch", "json")
    monkeypatch.setattr(
        "dmq_export.common.extras.find_spec", lambda name: None if name in ("torch", "openvino") else name
    )
    with pytest.raises(DmqError) as caught:
        require("this", "torch", "json", "openvino")
    assert str(caught.value) == (
        "this needs what is not installed, torch, openvino: pip install 'dmq-export[calibrate]' 'dmq-export[openvino]'"
    )
    with pytest.raises(DmqError, match="this needs what is not installed, torch: pip"):
        require("this", "torch")


def brought(extra: str) -> set[str]:
    """Names of the distributions in ``extra`` and in those that it refers to."""
    found = set()
    for requirement in PROJECT["optional-dependencies"][extra]:
        name, _, inner = re.match(r"([\w-]+)(\[([\w,-]+)\])?", requirement).groups()  # type: ignore[union-attr]
        found |= set().union(*map(brought, inner.split(","))) if name == "dmq-export" else {name}
    return found


@pytest.mark.parametrize("library", EXTRAS)
def test_every_extra_brings_its_library(library: str) -> None:
    distributions = {"cuda": "cuda-bindings", "onnxruntime": "onnxruntime-gpu"}
    assert distributions.get(library, library.replace("_", "-")) in brought(EXTRAS[library])


def test_the_core_needs_nothing_of_the_extras() -> None:
    core = {re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]}  # type: ignore[index]
    assert not core & set().union(*map(brought, PROJECT["optional-dependencies"]))


@pytest.fixture(scope="module")
def said(tiny_model: Path, tiny_onnx: Path, tiny_checkpoint_folder: Path, tmp_path_factory: Any) -> dict[str, Any]:
    """Exit status, stdout and stderr of commands where no library of an extra but ONNX Runtime can be imported."""
    out = tmp_path_factory.mktemp("deployed")
    graph, checkpoint, picture = str(tiny_onnx), str(tiny_checkpoint_folder), ["-o", str(out / "p.png")]
    lines = {
        "sample": ["sample", graph, *picture, "--npz", str(out / "s.npz"), "--num", "2"],
        "bench": ["bench", graph, "--repeat", "1", "--warm-up", "1"],
        "inspect graph": ["inspect", graph],
        "inspect checkpoint": ["inspect", checkpoint],
        "lint": ["lint", graph, "--json"],
        "doctor": ["doctor", "--json"],
        "calibrate": ["calibrate", "digits", "-o", str(out / "ckpt")],
        "onnx": ["onnx", checkpoint, "-o", str(out / "m.onnx")],
        "quickstart": ["quickstart", "-o", str(out / "quick")],
        "euler": ["sample", graph, *picture, "--scheduler", "euler"],
        "reference": ["bench", graph, "--reference", str(tiny_model)],
        "checkpoint": ["sample", checkpoint, *picture],
        "openvino": ["sample", graph, *picture, "--backend", "openvino"],
    }
    blocked = [library for library in EXTRAS if library != "onnxruntime"]
    code = CORE_AND_A_RUNTIME.format(blocked=blocked)
    given = json.dumps(list(lines.values()))
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, input=given, check=True, capture_output=True, text=True
    )
    written = {"files": sorted(path.name for path in out.iterdir())}
    return written | dict(zip(lines, map(json.loads, run.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("command", ["sample", "bench", "inspect graph", "inspect checkpoint", "doctor"])
def test_the_core_and_a_runtime_are_enough(command: str, said: dict[str, Any]) -> None:
    status, _, stderr = said[command]
    assert status == 0, stderr


def test_lint_speaks_without_extras(said: dict[str, Any]) -> None:
    """The portable graph breaks TensorRT's rules, which is status 1."""
    status, stdout, _ = said["lint"]
    assert (status, json.loads(stdout)["ok"]) == (1, False)


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("calibrate", r"this needs diffusers, .*\[calibrate\]'"),
        ("onnx", r"this needs onnxscript, .*\[calibrate\]'"),
        ("quickstart", r"quickstart needs what is not installed, torch, diffusers, onnxscript: .*\[calibrate\]'"),
        ("euler", r"scheduler euler, as all but a plain DDIM, needs .* torch, diffusers: .*\[calibrate\]'"),
        ("reference", r"this needs torch, .*\[calibrate\]'"),
        ("checkpoint", r"runs on torch, .*\[calibrate\]'"),
        ("openvino", r"runs on openvino, .*\[openvino\]'"),
    ],
)
def test_the_rest_is_one_line_that_says_what_to_install(command: str, message: str, said: dict[str, Any]) -> None:
    status, stdout, stderr = said[command]
    assert (status, stdout) == (2, "")
    assert re.fullmatch(rf"Error: .*{message}\n", stderr), stderr


def test_nothing_is_written_by_what_cannot_run(said: dict[str, Any]) -> None:
    assert said["files"] == ["p.png", "s.npz"]


def test_doctor_tells_how_to_get_the_rest(said: dict[str, Any]) -> None:
    findings = json.loads(said["doctor"][1])["findings"]
    remedies = {f"{one['stage']} {one['what']}": one["remedy"] for one in findings}
    for what in ("calibrate on the CPU", "export ONNX", "run checkpoints on torch", "sample all other schedulers"):
        assert remedies[what] == "pip install 'dmq-export[calibrate]'", what
    assert remedies["run onnxruntime, cpu"] == ""
    assert remedies["run openvino"] == "pip install 'dmq-export[openvino]'"
    assert remedies["calibrate prompts"] == "pip install 'dmq-export[text]'"
