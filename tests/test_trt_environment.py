"""A machine without TensorRT is told exactly what is missing and how to get it."""

import ctypes
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from dmq_export.errors import DmqError
from engines.tensorrt import environment as trt_environment
from engines.tensorrt.environment import missing, require_tensorrt

INSTALLED = {"tensorrt": "10.16.1.11", "polygraphy": "0.53.6", "cuda-bindings": "13.5.0"}


def pretend(monkeypatch: pytest.MonkeyPatch, versions: dict[str, str], *, driver: bool, devices: int = 1) -> None:
    """A machine with these packages; mocks, because a GPU and its driver are needed otherwise."""
    monkeypatch.setattr(trt_environment, "_version", versions.get)
    trt = ModuleType("tensorrt")
    trt.__version__ = versions.get("tensorrt", "")  # type: ignore[attr-defined]
    properties = SimpleNamespace(name=b"NVIDIA H200", major=9, minor=0)
    runtime: Any = ModuleType("cuda.bindings.runtime")
    runtime.cudaError_t = SimpleNamespace(cudaSuccess=0)
    runtime.cudaGetDeviceCount = lambda: (0, devices) if devices else (100, None)
    runtime.cudaGetDevice = lambda: (0, 0)
    runtime.cudaGetDeviceProperties = lambda device: (0, properties)
    runtime.cudaGetErrorString = lambda error: (0, b"no CUDA-capable device is detected")
    bindings: Any = ModuleType("cuda.bindings")
    bindings.runtime = runtime
    modules = {"tensorrt": trt, "polygraphy": ModuleType("polygraphy"), "cuda": ModuleType("cuda")}
    for name, module in {**modules, "cuda.bindings": bindings, "cuda.bindings.runtime": runtime}.items():
        monkeypatch.setitem(sys.modules, name, module)

    def load(name: str, *arguments: Any) -> object:
        if not driver:
            raise OSError(name)
        return object()

    monkeypatch.setattr(ctypes, "CDLL", load)


def test_a_complete_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, INSTALLED, driver=True)
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
    pretend(monkeypatch, INSTALLED | {package: version}, driver=True)
    assert missing() == [f"{package} {version} is too old ({wanted} is needed): pip install 'dmq-export[tensorrt]'"]


def test_a_package_that_does_not_load_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, INSTALLED, driver=True)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    (problem,) = missing()
    assert problem.startswith("tensorrt 10.16.1.11 does not load (")


def test_a_driver_without_a_gpu_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, INSTALLED, driver=True, devices=0)
    assert missing() == ["no usable NVIDIA GPU (CUDA: no CUDA-capable device is detected): see what nvidia-smi says"]
