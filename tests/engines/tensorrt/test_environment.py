"""A machine without TensorRT or TensorRT-RTX is told exactly what is missing and how to get it."""

import ctypes
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dmq_export.errors import DmqError
from engines.problem import Problem
from engines.tensorrt import environment as trt_environment
from engines.tensorrt.capability import SUPPORTED, written
from engines.tensorrt.environment import missing, missing_to_run, require_runtime, require_tensorrt

RTX = {"tensorrt-rtx": "1.7.1.116", "polygraphy": "0.53.6", "cuda-bindings": "13.5.0"}
INSTALLED = {"tensorrt": "10.16.1.11", "polygraphy": "0.53.6", "cuda-bindings": "13.5.0"}


def pretend(
    monkeypatch: pytest.MonkeyPatch,
    versions: dict[str, str],
    *,
    driver: bool = True,
    devices: int = 1,
    capability: tuple[int, int] = (9, 0),
) -> list[int]:
    """A machine with these packages; mocks, because a GPU and its driver are needed otherwise.

    Returns:
        The devices that are made the current one, as it happens.
    """
    chosen: list[int] = []
    monkeypatch.setattr(trt_environment, "package_version", versions.get)
    trt, rtx = ModuleType("tensorrt"), ModuleType("tensorrt_rtx")
    trt.__version__ = versions.get("tensorrt", "")  # type: ignore[attr-defined]
    rtx.__version__ = versions.get("tensorrt-rtx", "")  # type: ignore[attr-defined]
    members = dict.fromkeys(("NONE", "CURRENT", "SM120", "SM75", "SM89"))
    rtx.ComputeCapability = SimpleNamespace(__members__=members)  # type: ignore[attr-defined]
    properties = SimpleNamespace(name=b"NVIDIA H200", major=capability[0], minor=capability[1])
    runtime: Any = ModuleType("cuda.bindings.runtime")
    runtime.cudaError_t = SimpleNamespace(cudaSuccess=0)
    runtime.cudaGetDeviceCount = lambda: (0, devices) if devices else (100, None)
    runtime.cudaSetDevice = lambda device: (chosen.append(device) or 0,)
    runtime.cudaGetDeviceProperties = lambda device: (0, properties)
    runtime.cudaGetErrorString = lambda error: (0, b"no CUDA-capable device is detected")
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = runtime
    modules = {"tensorrt": trt, "tensorrt_rtx": rtx, "polygraphy": ModuleType("polygraphy"), "cuda": ModuleType("cuda")}
    for name, module in {**modules, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}.items():
        monkeypatch.setitem(sys.modules, name, module)

    def load(name: str, *arguments: Any) -> object:
        if not driver:
            raise OSError(name)
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)
    return chosen


def test_a_complete_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, INSTALLED)
    assert missing() == []
    machine = require_tensorrt()
    assert (machine.version, machine.gpu, machine.compute_capability) == ("10.16.1.11", "NVIDIA H200", "9.0")


def test_everything_that_is_missing_is_said_on_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {"polygraphy": "0.53.6"}, driver=False)
    with pytest.raises(DmqError) as caught:
        require_tensorrt()
    assert str(caught.value) == (
        "TensorRT cannot work here: tensorrt 10.9 or later is not installed, cuda-bindings 12.8 or later is not "
        "installed: pip install 'dmq-export[tensorrt]'; no NVIDIA driver (libcuda.so.1): use a machine with an NVIDIA "
        "GPU and its driver"
    )


@pytest.mark.parametrize(
    ("package", "version", "wanted"),
    [("tensorrt", "10.8.0.43", "10.9"), ("polygraphy", "0.49.27", "0.53"), ("cuda-bindings", "12.6.2", "12.8")],
)
def test_an_old_package_is_told_apart(monkeypatch: pytest.MonkeyPatch, package: str, version: str, wanted: str) -> None:
    pretend(monkeypatch, INSTALLED | {package: version})
    remedy = "pip install 'dmq-export[tensorrt]'"
    assert missing() == [Problem(f"{package} {version} is too old ({wanted} is needed)", remedy)]


def test_a_package_that_does_not_load_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, INSTALLED)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (problem,) = missing()
    assert problem.what.startswith("tensorrt 10.16.1.11 does not load (")


def test_a_driver_without_a_gpu_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, INSTALLED, devices=0)
    what = "no usable NVIDIA GPU (CUDA: no CUDA-capable device is detected)"
    assert missing() == missing_to_run("tensorrt") == [Problem(what, "see what nvidia-smi says")]


def test_running_needs_no_polygraphy(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {name: version for name, version in INSTALLED.items() if name != "polygraphy"})
    assert len(missing()) == 1
    assert missing_to_run("tensorrt") == []


def test_tensorrt_rtx_builds_without_a_gpu_and_runs_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {name: version for name, version in RTX.items() if name != "cuda-bindings"}, driver=False)
    assert missing("tensorrt-rtx") == []
    with pytest.raises(DmqError) as caught:
        require_runtime("tensorrt-rtx")
    assert str(caught.value) == (
        "TensorRT-RTX cannot run here: cuda-bindings 12.8 or later is not installed: pip install "
        "'dmq-export[tensorrt-rtx]'; no NVIDIA driver (libcuda.so.1): use a machine with an NVIDIA GPU and its driver"
    )


def test_a_gpu_that_tensorrt_rtx_is_not_for_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, RTX)
    (problem,) = missing_to_run("tensorrt-rtx")
    assert problem.what == "NVIDIA H200 has compute capability 9.0, TensorRT-RTX is for 7.5, 8.9, 12.0"
    pretend(monkeypatch, RTX, capability=(12, 0))
    assert require_runtime("tensorrt-rtx").title == "TensorRT-RTX 1.7.1.116"


def test_the_gpus_are_those_that_the_builder_takes() -> None:
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    assert trt_environment.supported_capabilities() == tuple(map(written, SUPPORTED))


def test_each_process_of_torchrun_takes_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = pretend(monkeypatch, INSTALLED, devices=4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    require_runtime("tensorrt")
    assert set(chosen) == {2}
