"""A plan as an engine, in TensorRT or TensorRT-RTX.

No machine of ours has the GPU this needs, so nothing behind the checks has been run; every name and argument it uses is
checked against NVIDIA's bindings (``tests/engines/tensorrt/test_tensorrt_api.py``), and ``scripts/verify_tensorrt.sh``
runs it where it can.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.common.files import sha256
from dmq_export.errors import DmqError
from engines.batching import run_batched
from engines.inputs import Input
from engines.tensorrt.cuda import Buffer, Stream
from engines.tensorrt.environment import require_runtime
from engines.tensorrt.log import explain
from engines.tensorrt.plan_file import RUNTIME_NAMES, PlanMetadata, read_plan, read_plan_metadata
from engines.tensorrt.profile import ShapeRange
from engines.tensorrt.runtime import deserialize, output_names, refit, tensor_type
from engines.tensorrt.runtime_cache import RuntimeCache

if TYPE_CHECKING:
    import tensorrt as trt

Array = NDArray[Any]
LOG_LINES = 100  # of the runtime's warnings and errors, the last are kept


class TensorRtDenoiser:
    """Runs a plan: ``denoise(sample, timestep, **conditioning) -> prediction``, NumPy arrays.

    Buffers are bound once for each batch size that follows another, and the work is recorded as a CUDA graph: with
    TensorRT by us, with TensorRT-RTX by itself. A call then copies its inputs, launches the graph and copies the
    prediction back. A batch outside the plan's range is padded or cut into several. The kernels that TensorRT-RTX
    compiles are kept beside the plan, see :mod:`engines.tensorrt.runtime_cache`.

    Args:
        path: the plan, with ``engine.json`` beside it, which says whose plan it is.
        weights: the ONNX file a plan without weights was built from.
        note: receives what the user should know; warned of by default.

    Raises:
        DmqError: the runtime or a GPU is missing, or the plan was not built for what is here.
    """

    def __init__(self, path: Path, weights: Path | None = None, note: Callable[[str], None] = warnings.warn) -> None:
        runtime = read_plan_metadata(path).runtime
        content, self.metadata = read_plan(path, require_runtime(runtime))
        self.inputs = {name: Input(None, shape.optimum) for name, shape in self.metadata.shapes.items()}
        self._log: deque[str] = deque(maxlen=LOG_LINES)
        host_code = self.metadata.version_compatible
        self._engine = deserialize(content, host_code=host_code, runtime=runtime, log=self._log)
        if self.metadata.stripped:
            refit(self._engine, _weights(self.metadata, path, weights), runtime, self._log)
        self._stream = Stream()  # and with it the CUDA context that the next line needs
        rtx = runtime == "tensorrt-rtx"
        cache = RuntimeCache(self._engine, path, self.metadata.sha256, note) if rtx else None
        self._context = self._new_context(cache)  # an attribute before the cache that it uses, so that it goes first
        self._cache = cache
        self._output = output_names(self._engine, runtime)[0]
        self._buffers: dict[str, Buffer] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graph: Any = None

    def __call__(self, sample: NDArray[np.float32], timestep: float, **conditioning: Array) -> NDArray[np.float32]:
        arrays = {"sample": sample, "timestep": np.array(timestep, np.float32), **conditioning}
        _require_inputs(arrays, self.metadata.shapes)
        sample_range = self.metadata.shapes["sample"]
        sizes = sample_range.minimum[0], sample_range.maximum[0]
        return run_batched(lambda piece: self._run(piece).astype(np.float32), arrays, sizes)

    def _run(self, arrays: Mapping[str, Array]) -> Array:
        """The first output for inputs of one batch; overwritten by the next call."""
        shapes = {name: value.shape for name, value in arrays.items()}
        if shapes != self._shapes:
            self._bind(shapes)
        for name, value in arrays.items():
            self._buffers[name].upload(value, self._stream)
        if self._graph is None:
            self._enqueue()
        else:
            self._stream.launch(self._graph)
        return self._buffers[self._output].download(self._stream)

    def _new_context(self, cache: RuntimeCache | None) -> trt.IExecutionContext:
        context: trt.IExecutionContext | None = (
            self._engine.create_execution_context()
            if cache is None
            else self._engine.create_execution_context(cache.config)
        )
        if context is None:
            raise self._failure("could not prepare the engine")
        return context

    def _bind(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Give every tensor its memory, then record one evaluation or let the runtime do so."""
        self._shapes = {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise DmqError(f"the engine does not take input {name} of shape {list(shape)}")
        for buffer in self._buffers.values():
            buffer.free()
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            sizes = self._context.get_tensor_shape(name)
            shape = tuple(sizes[axis] for axis in range(len(sizes)))
            self._buffers[name] = Buffer(shape, tensor_type(self._engine, name, self.metadata.runtime))
            self._context.set_tensor_address(name, self._buffers[name].address)
        self._enqueue()  # a change of shapes takes effect with the first run, which must not be recorded
        self._stream.synchronize()
        self._settle()
        self._shapes = shapes

    def _settle(self) -> None:
        """After the first run with new shapes: record the next, or keep the kernels that were compiled for it."""
        if self._cache is not None:
            self._cache.keep()
            return
        if self._graph is not None:
            self._stream.forget(self._graph)
        self._graph = self._stream.record(self._enqueue)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise self._failure("could not start the engine")

    def _failure(self, what: str) -> DmqError:
        return DmqError(f"{RUNTIME_NAMES[self.metadata.runtime]} {what}: {explain(list(self._log)).text()}")


def _require_inputs(arrays: Mapping[str, Array], shapes: Mapping[str, ShapeRange]) -> None:
    odd = sorted(set(arrays) ^ set(shapes))
    if odd:
        problem = "is missing" if odd[0] in shapes else "is unknown"
        raise DmqError(f"input {odd[0]} {problem}: the plan takes {', '.join(shapes)}")


def _weights(metadata: PlanMetadata, path: Path, weights: Path | None) -> Path:
    """The ONNX file that the plan ``path`` was built from.

    Raises:
        DmqError: it is not given, or is another.
    """
    if weights is None:
        raise DmqError(f"{path} was built without weights: give the ONNX file {next(iter(metadata.onnx_sha256))} too")
    for name, digest in metadata.onnx_sha256.items():
        beside = weights.with_name(name) if len(metadata.onnx_sha256) > 1 else weights
        if not beside.is_file() or sha256(beside) != digest:
            raise DmqError(f"{path} was not built from {beside}: give the ONNX file it was built from")
    return weights
