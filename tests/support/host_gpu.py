"""A GPU made of host memory, for tests of what only a GPU can run: CUDA's calls, and an engine that doubles its sample.

Stand-ins for what physically needs a GPU. The engine and its context have the attributes of the real classes of
TensorRT-RTX and no others; types and enumerations are the real ones.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest

from engines.tensorrt.plan_file import Machine, PlanMetadata, Runtime, save_plan
from engines.tensorrt.profile import ShapeRange

CONTENT = b"a plan"
SHAPES = {"sample": ShapeRange((1, 3), (2, 3), (4, 3)), "timestep": ShapeRange((), (), ())}
MACHINES: dict[Runtime, Machine] = {
    "tensorrt": Machine("tensorrt", "10.16.1.11", "Linux x86_64", "NVIDIA H200", "9.0"),
    "tensorrt-rtx": Machine("tensorrt-rtx", "1.7.1.116", "Linux x86_64", "NVIDIA GeForce RTX 4070", "8.9"),
}


def plan_for(runtime: Runtime, path: Path, **changes: Any) -> Path:
    """A plan that suits the machine of its runtime in :data:`MACHINES`."""
    rtx = runtime == "tensorrt-rtx"
    metadata: dict[str, Any] = {
        "sha256": hashlib.sha256(CONTENT).hexdigest(),
        "machine": MACHINES[runtime],
        "capabilities": ("8.9",) if rtx else (),
        "version_compatible": False,
        "hardware_compatible": "none",
        "stripped": False,
        "onnx_sha256": {"model.onnx": "ab" * 32},
        "shapes": SHAPES,
        "settings": {},
        "layers": {},
        "metadata": None,
        "versions": {},
    }
    save_plan(CONTENT, path, PlanMetadata(**metadata | changes))
    return path


def on_host_memory(monkeypatch: pytest.MonkeyPatch) -> HostEngine:
    """Plans of :func:`plan_for` run, on an engine of host memory whatever their bytes are."""
    from engines.tensorrt import engine, runtime

    host = HostEngine(monkeypatch)
    monkeypatch.setitem(runtime.MODULES, "tensorrt", "tensorrt_rtx")  # its types and enumerations are the same
    monkeypatch.setattr(engine, "require_runtime", MACHINES.__getitem__)
    monkeypatch.setattr(engine, "deserialize", lambda content, **rest: host.engine)
    return host


class HostCuda:
    """``cuda.bindings.runtime`` as far as it is used; a stream does at once what it is given.

    Attributes:
        launches: how often a recorded graph was started.
    """

    cudaError_t = SimpleNamespace(cudaSuccess=0)  # noqa: N815
    cudaMemcpyKind = SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2)  # noqa: N815
    cudaStreamCaptureMode = SimpleNamespace(cudaStreamCaptureModeThreadLocal=1)  # noqa: N815
    cudaStreamNonBlocking = 1  # noqa: N815

    def __init__(self, work: Callable[[], None]) -> None:
        self.launches = 0
        self.recording = False
        self._work = work
        self._memory: dict[int, Any] = {}

    def __getattr__(self, name: str) -> Callable[..., tuple[int]]:
        if not name.startswith("cuda"):
            raise AttributeError(name)
        return lambda *arguments: (0,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[int, int]:  # noqa: N802
        return 0, 7

    def cudaMalloc(self, size: int) -> tuple[int, int]:  # noqa: N802
        block = ctypes.create_string_buffer(size)
        self._memory[ctypes.addressof(block)] = block
        return 0, ctypes.addressof(block)

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> tuple[int]:  # noqa: N802
        ctypes.memmove(to, source, size)
        return (0,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[int]:  # noqa: N802
        self.recording = True
        return (0,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[int, str]:  # noqa: N802
        self.recording = False
        return 0, "graph"

    def cudaGraphInstantiate(self, graph: str, flags: int) -> tuple[int, str]:  # noqa: N802
        return 0, "executable"

    def cudaGraphLaunch(self, graph: str, stream: int) -> tuple[int]:  # noqa: N802
        self.launches += 1
        self._work()
        return (0,)


class HostEngine:
    """An engine with the inputs ``sample`` and ``timestep`` whose output is the sample, doubled.

    Attributes:
        engine, context: mocks with the real classes' attributes.
        runs: how often the work was done, recordings apart.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import tensorrt_rtx as rtx

        self.runs = 0
        self.cuda = HostCuda(self._work)
        bindings: Any = ModuleType("cuda.bindings")
        bindings.runtime = self.cuda
        for name, module in {"cuda": ModuleType("cuda"), "cuda.bindings": bindings}.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", self.cuda)  # type: ignore[arg-type]
        self._shape: tuple[int, ...] = ()
        self._addresses: dict[str, int] = {}
        names = ["sample", "timestep", "out_sample"]
        outputs = {"out_sample": rtx.TensorIOMode.OUTPUT}
        self.engine = mock.MagicMock(spec_set=rtx.ICudaEngine, num_io_tensors=len(names))
        self.engine.get_tensor_name.side_effect = names.__getitem__
        self.engine.get_tensor_mode.side_effect = lambda name: outputs.get(name, rtx.TensorIOMode.INPUT)
        self.engine.get_tensor_dtype.return_value = rtx.DataType.FLOAT
        self.context = mock.MagicMock(spec_set=rtx.IExecutionContext)
        self.context.set_input_shape.side_effect = self._set_shape
        self.context.get_tensor_shape.side_effect = lambda name: () if name == "timestep" else self._shape
        self.context.set_tensor_address.side_effect = self._addresses.__setitem__
        self.context.execute_async_v3.side_effect = self._enqueue
        self.engine.create_execution_context.return_value = self.context
        self.config = mock.MagicMock(spec_set=rtx.IRuntimeConfig)
        self.cache = mock.MagicMock(spec_set=rtx.IRuntimeCache)
        self.cache.serialize.return_value = b"kernels"
        self.config.create_runtime_cache.return_value = self.cache
        self.engine.create_runtime_config.return_value = self.config

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        if name == "sample":
            self._shape = shape
        return True

    def _enqueue(self, stream: int) -> bool:
        if not self.cuda.recording:
            self._work()
        return True

    def _work(self) -> None:
        self.runs += 1
        sample, doubled = (self._array(name) for name in ("sample", "out_sample"))
        np.multiply(sample, 2, out=doubled)

    def _array(self, name: str) -> Any:
        values = (ctypes.c_float * int(np.prod(self._shape))).from_address(self._addresses[name])
        return np.ctypeslib.as_array(values).reshape(self._shape)
