"""``doctor``: it tries things, tells the truth about them, and always ends well."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from dmq_export.cli import main
from dmq_export.commands import doctor
from dmq_export.commands.doctor import Examination, Finding, examine

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def examination() -> Examination:
    return examine()


def finding(examination: Examination, stage: str, what: str) -> Finding:
    (found,) = (one for one in examination.findings if (one.stage, one.what) == (stage, what))
    return found


def test_what_the_tests_themselves_use_works(examination: Examination) -> None:
    for stage, what in (
        ("calibrate", "on the CPU"),
        ("export", "ONNX"),
        ("run", "onnxruntime, cpu"),
        ("run", "checkpoints on torch"),
        ("sample", "DDIM"),
        ("sample", "all other schedulers"),
    ):
        assert finding(examination, stage, what).works, (stage, what)
    assert torch.__version__ in finding(examination, "calibrate", "on the CPU").detail


def test_the_gpu_is_as_torch_sees_it(examination: Examination) -> None:
    assert finding(examination, "calibrate", "on a GPU").works is torch.cuda.is_available()


def test_whatever_is_missing_comes_with_its_remedy(examination: Examination) -> None:
    for one in examination.findings:
        assert one.detail
        assert bool(one.remedy) is not one.works


def test_both_runtimes_of_nvidia_are_rows_of_their_own(examination: Examination) -> None:
    from engines.tensorrt.environment import missing, missing_to_run

    for runtime, what in (("tensorrt", "TensorRT plans"), ("tensorrt-rtx", "TensorRT-RTX plans")):
        assert finding(examination, "build", what).works is not bool(missing(runtime))  # type: ignore[arg-type]
        assert finding(examination, "run", what).works is not bool(missing_to_run(runtime))  # type: ignore[arg-type]
    assert finding(examination, "run", "onnxruntime, tensorrt-rtx").detail


def test_tensorrt_rtx_builds_without_a_gpu(examination: Examination) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    found = finding(examination, "build", "TensorRT-RTX plans")
    assert (found.works, found.detail) == (True, f"tensorrt-rtx {rtx.__version__}, which needs no GPU for it")


def test_the_tables_fit_a_terminal(examination: Examination) -> None:
    missing = Finding("run", "x", False, "word " * 100 + "a-word-with-hyphens-that-stays-whole", "pip install " * 20)
    text = replace(examination, findings=(*examination.findings, missing)).text()
    assert max(map(len, text.splitlines())) <= 100
    assert text.count("word ") + text.count("word\n") == 100
    assert "a-word-with-hyphens-that-stays-whole" in text


def test_the_command_exits_well_and_speaks_json() -> None:
    text, report = CliRunner().invoke(main, ["doctor"]), CliRunner().invoke(main, ["doctor", "--json"])
    assert (text.exit_code, report.exit_code) == (0, 0)
    assert "onnxruntime, cpu" in text.stdout
    assert {"stage", "what", "works", "detail", "remedy"} == set(json.loads(report.stdout)["findings"][0])


def test_a_machine_with_nothing_is_told_how_to_get_it() -> None:
    blocked = (
        "torch diffusers safetensors onnx onnx_ir onnxscript onnxruntime openvino tensorrt tensorrt_rtx polygraphy "
        "transformers"
    )
    code = f"import sys; sys.modules.update(dict.fromkeys('{blocked}'.split())); "
    code += "from dmq_export.cli import main; main(['doctor', '--json'])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    findings = json.loads(result.stdout)["findings"]
    assert [one["what"] for one in findings if one["works"]] == ["DDIM"]
    remedies = {one["what"]: one["remedy"] for one in findings}
    assert remedies["ONNX"] == "pip install onnx onnx-ir 'dmq-export[calibrate]'"
    assert remedies["TensorRT-RTX plans"].startswith("pip install 'dmq-export[tensorrt-rtx]'")
    assert remedies["openvino"] == "pip install 'dmq-export[openvino]'"


def test_a_library_that_does_not_load_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise RuntimeError("\nundefined symbol: x\nmore")

    monkeypatch.setattr(doctor, "import_module", broken)
    assert doctor._import_problem("onnx") == "onnx does not load: undefined symbol: x"
