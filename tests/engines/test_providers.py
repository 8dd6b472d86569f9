"""ONNX Runtime's providers: each starts, or is refused with the reason, and nothing falls back unsaid."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from nvidia import unpack_wheel

from dmq_export.errors import DmqError
from engines import providers
from engines.onnxruntime import OnnxSession
from engines.problem import Problem
from engines.providers import PROVIDERS, provider_problem

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "cpu"])
def test_a_provider_either_starts_or_is_refused_with_those_that_do(tiny_onnx: Path, name: str) -> None:
    problem = provider_problem(name)
    if problem is None:
        assert OnnxSession(tiny_onnx, name).output_names == ["out_sample"]
        return
    assert "\n" not in problem.text()
    with pytest.raises(DmqError, match=f"no provider {name} here .*: .*cpu.* can be used; otherwise .") as raised:
        OnnxSession(tiny_onnx, name)
    assert f"({problem.what})" in str(raised.value)
    assert str(raised.value).endswith(problem.remedy)


def test_a_provider_that_does_not_exist_is_refused(tiny_onnx: Path) -> None:
    with pytest.raises(DmqError, match="no provider tpu: cpu, cuda, tensorrt, tensorrt-rtx are known"):
        OnnxSession(tiny_onnx, "tpu")


def test_a_provider_that_the_build_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    problem = provider_problem("cuda")
    assert problem is not None
    assert problem.what == "this build of onnxruntime lacks it"
    assert provider_problem("cpu") is None


def test_nothing_falls_back_to_the_cpu_unsaid(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.providers.provider_problem", lambda name: None)
    if provider_problem("cuda") is None:
        pytest.skip("the CUDA provider starts here")
    with pytest.raises(DmqError, match="on its cuda provider: try --provider cpu"):
        OnnxSession(tiny_onnx, "cuda")


def test_refusing_a_provider_prints_nothing(tiny_onnx: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in PROVIDERS:
        provider_problem(name)
    assert capfd.readouterr() == ("", "")


def test_a_plugin_that_is_not_installed_is_refused_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "find_spec", lambda name: None)
    assert provider_problem("tensorrt-rtx") == Problem(
        "onnxruntime-ep-nv-tensorrt-rtx is not installed",
        "on a machine with an RTX GPU: pip install 'dmq-export[onnxruntime-tensorrt-rtx]'",
    )


def test_an_old_onnxruntime_takes_no_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "find_spec", lambda name: name)
    monkeypatch.setattr(providers, "driver_problem", lambda: None)
    monkeypatch.delattr("onnxruntime.get_ep_devices")
    problem = provider_problem("tensorrt-rtx")
    assert problem is not None
    assert problem.what.endswith("takes no plugins")


@pytest.mark.slow
def test_the_plugin_of_nvidia_says_itself_what_it_lacks(tmp_path: Path) -> None:
    """Its own library is given to ONNX Runtime, which needs the driver to load it."""
    if providers.driver_problem() is None:
        pytest.skip("NVIDIA's driver is here")
    unpack_wheel("onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0", tmp_path / "plugin")
    code = (
        "from engines import providers; print(providers.provider_problem('tensorrt-rtx').text()); "
        "providers.driver_problem = lambda: None; print(providers.provider_problem('tensorrt-rtx').what)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path / 'plugin'}"}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    assert result.stdout.splitlines() == [
        "no NVIDIA driver (libcuda.so.1): use a machine with an NVIDIA GPU and its driver",
        "libcuda.so.1: cannot open shared object file: No such file or directory",
    ]
    assert result.stderr == ""


def test_a_session_on_the_devices_of_a_plugin_computes_the_same(
    tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The way of a plugin's sessions, on the one device there always is: ONNX Runtime's own CPU."""
    import onnxruntime

    cpu = [one for one in onnxruntime.get_ep_devices() if one.ep_name == PROVIDERS["cpu"]]
    monkeypatch.setitem(PROVIDERS, "tensorrt-rtx", PROVIDERS["cpu"])
    monkeypatch.setattr(providers, "plugin_devices", lambda provider: tuple(cpu))
    monkeypatch.setattr(providers, "provider_problem", lambda provider: None)
    monkeypatch.setenv("LOCAL_RANK", "1")  # one GPU for two processes: both take it
    sample = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    inputs = {"sample": sample, "timestep": np.array(67, np.float32), "class_labels": np.array([0, 2])}
    outputs = [OnnxSession(tiny_onnx, name, threads=1).run(inputs)["out_sample"] for name in ("tensorrt-rtx", "cpu")]
    np.testing.assert_array_equal(*outputs)
