"""The little of CUDA that an engine needs: memory, one stream, one graph. NVIDIA's own bindings do the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import DmqError


def checked(result: tuple[Any, ...]) -> Any:
    """The value of a call that returns ``(error, value)`` or ``(error,)``.

    Raises:
        DmqError: with CUDA's own text.
    """
    from cuda.bindings import runtime

    error, *values = result
    if error != runtime.cudaError_t.cudaSuccess:
        _, text = runtime.cudaGetErrorString(error)
        raise DmqError(f"CUDA: {text.decode() if isinstance(text, bytes) else error}")
    return values[0] if values else None


def gpu() -> tuple[str, str]:
    """Name and compute capability of this process's GPU, which becomes the current device.

    Under torchrun each process takes the GPU of its number on the machine.

    Raises:
        DmqError: there is none.
    """
    from cuda.bindings import runtime

    count = checked(runtime.cudaGetDeviceCount())
    if not count:
        raise DmqError("CUDA: no device")
    device = int(os.environ.get("LOCAL_RANK", "0")) % count
    checked(runtime.cudaSetDevice(device))
    properties = checked(runtime.cudaGetDeviceProperties(device))
    name = properties.name
    return name.decode() if isinstance(name, bytes) else str(name), f"{properties.major}.{properties.minor}"


class Stream:
    """Work in order, apart from the default stream, which CUDA graphs cannot record."""

    def __init__(self) -> None:
        from cuda.bindings import runtime

        self.handle = checked(runtime.cudaStreamCreateWithFlags(runtime.cudaStreamNonBlocking))

    def synchronize(self) -> None:
        """Wait until everything is done.

        Raises:
            DmqError: some of it failed.
        """
        from cuda.bindings import runtime

        checked(runtime.cudaStreamSynchronize(self.handle))

    def record(self, work: Callable[[], None]) -> Any:
        """The executable graph of what ``work`` starts on this stream; nothing runs yet."""
        from cuda.bindings import runtime

        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        checked(runtime.cudaStreamBeginCapture(self.handle, mode))
        try:
            work()
        finally:
            graph = checked(runtime.cudaStreamEndCapture(self.handle))
        executable = checked(runtime.cudaGraphInstantiate(graph, 0))
        checked(runtime.cudaGraphDestroy(graph))
        return executable

    def forget(self, graph: Any) -> None:
        """Give back what a recorded graph takes."""
        from cuda.bindings import runtime

        checked(runtime.cudaGraphExecDestroy(graph))

    def launch(self, graph: Any) -> None:
        """Run a recorded graph."""
        from cuda.bindings import runtime

        checked(runtime.cudaGraphLaunch(graph, self.handle))


class Buffer:
    """Device memory that holds one tensor."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        from cuda.bindings import runtime

        self.host = np.empty(shape, dtype)
        self.address = int(checked(runtime.cudaMalloc(max(self.host.nbytes, 1))))

    def upload(self, value: NDArray[Any], stream: Stream) -> None:
        """Copy ``value`` to the device."""
        from cuda.bindings import runtime

        np.copyto(self.host, value, casting="same_kind")
        kind = runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        checked(runtime.cudaMemcpyAsync(self.address, self.host.ctypes.data, self.host.nbytes, kind, stream.handle))

    def download(self, stream: Stream) -> NDArray[Any]:
        """The device's content, once all work on ``stream`` is done; the array is used again by the next call."""
        from cuda.bindings import runtime

        kind = runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        checked(runtime.cudaMemcpyAsync(self.host.ctypes.data, self.address, self.host.nbytes, kind, stream.handle))
        stream.synchronize()
        return self.host

    def free(self) -> None:
        """Give the memory back."""
        from cuda.bindings import runtime

        checked(runtime.cudaFree(self.address))
