"""TensorRT as an engine.

No machine of ours has the GPU this needs, so nothing here has been run; every name and argument it uses is checked
against NVIDIA's bindings (``tests/test_tensorrt_api.py``), and ``scripts/verify_tensorrt.sh`` runs it where it can.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import DmqError
from dmq_export.files import sha256
from engines.inputs import Input
from engines.pieces import in_pieces
from engines.tensorrt.cuda import Buffer, Stream
from engines.tensorrt.environment import require_tensorrt
from engines.tensorrt.plan_file import PlanFacts, read_plan
from engines.tensorrt.profile import ShapeRange
from engines.tensorrt.runtime import deserialize

if TYPE_CHECKING:
    import tensorrt as trt

Array = NDArray[Any]


class TensorRtDenoiser:
    """Runs a plan: ``denoise(sample, timestep, **conditioning) -> prediction``, NumPy arrays.

    Buffers are bound and the work is recorded as a CUDA graph once for each batch size that follows another; a call
    then copies its inputs, launches the graph and copies the prediction back. A batch outside the plan's range is
    padded or cut into several.

    Args:
        path: the plan, with ``engine.json`` beside it.
        weights: the ONNX file a plan without weights was built from.

    Raises:
        DmqError: TensorRT or a GPU is missing, or the plan was not built for what is here.
    """

    name = "tensorrt"

    def __init__(self, path: Path, weights: Path | None = None) -> None:
        content, facts = read_plan(path, require_tensorrt())
        engine = deserialize(content, host_code=facts.version_compatible)
        if facts.stripped:
            _refit(engine, facts, path, weights)
        self.facts = facts
        self.inputs = {name: Input(None, shape.optimum) for name, shape in facts.shapes.items()}
        self._engine: trt.ICudaEngine = engine
        self._context: trt.IExecutionContext = engine.create_execution_context()
        self._stream = Stream()
        self._buffers: dict[str, Buffer] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._graph: Any = None

    def __call__(self, sample: NDArray[np.float32], timestep: float, **conditioning: Array) -> NDArray[np.float32]:
        arrays = {"sample": sample, "timestep": np.array(timestep, np.float32), **conditioning}
        _require_inputs(arrays, self.facts.shapes)
        sample_range = self.facts.shapes["sample"]
        sizes = sample_range.minimum[0], sample_range.maximum[0]
        return in_pieces(lambda piece: self._run(piece).astype(np.float32), arrays, sizes)

    def _run(self, arrays: Mapping[str, Array]) -> Array:
        """The first output for inputs of one batch; overwritten by the next call."""
        shapes = {name: value.shape for name, value in arrays.items()}
        if shapes != self._shapes:
            self._bind(shapes)
        for name, value in arrays.items():
            self._buffers[name].upload(value, self._stream)
        self._stream.launch(self._graph)
        return self._buffers[self._outputs()[0]].download(self._stream)

    def _bind(self, shapes: dict[str, tuple[int, ...]]) -> None:
        """Give every tensor its memory, then record one evaluation."""
        import tensorrt as trt

        self._shapes = {}
        for name, shape in shapes.items():
            if not self._context.set_input_shape(name, shape):
                raise DmqError(f"the engine does not take input {name} of shape {list(shape)}")
        for buffer in self._buffers.values():
            buffer.free()
        for index in range(self._engine.num_io_tensors):
            name = self._engine.get_tensor_name(index)
            dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
            sizes = self._context.get_tensor_shape(name)
            self._buffers[name] = Buffer(tuple(sizes[axis] for axis in range(len(sizes))), dtype)
            self._context.set_tensor_address(name, self._buffers[name].address)
        self._enqueue()  # a change of shapes takes effect with the first run, which must not be recorded
        self._stream.synchronize()
        if self._graph is not None:
            self._stream.forget(self._graph)
        self._graph = self._stream.record(self._enqueue)
        self._shapes = shapes

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self._stream.handle)):
            raise DmqError("TensorRT could not start the engine")

    def _outputs(self) -> list[str]:
        import tensorrt as trt

        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        return [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]


def _require_inputs(arrays: Mapping[str, Array], shapes: Mapping[str, ShapeRange]) -> None:
    odd = sorted(set(arrays) ^ set(shapes))
    if odd:
        problem = "is missing" if odd[0] in shapes else "is unknown"
        raise DmqError(f"input {odd[0]} {problem}: the plan takes {', '.join(shapes)}")


def _refit(engine: trt.ICudaEngine, facts: PlanFacts, path: Path, weights: Path | None) -> None:
    """Put the weights of the ONNX file back into a plan that was built without them."""
    import tensorrt as trt
    from polygraphy.backend.trt import get_trt_logger

    if weights is None:
        raise DmqError(f"{path} was built without weights: give the ONNX file {next(iter(facts.onnx_sha256))} too")
    for name, digest in facts.onnx_sha256.items():
        beside = weights.with_name(name) if len(facts.onnx_sha256) > 1 else weights
        if not beside.is_file() or sha256(beside) != digest:
            raise DmqError(f"{path} was not built from {beside}: give the ONNX file it was built from")
    logger = get_trt_logger()
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
        raise DmqError(f"TensorRT could not put the weights of {weights} into {path}")
