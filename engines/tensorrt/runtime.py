"""The runtime of a plan, TensorRT or TensorRT-RTX: its module, what it logs, and the engine it makes of a plan.

Both modules have the names that are used here, so the code is written for ``tensorrt`` and given either; a test reads
it against the real bindings of both.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, MutableSequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmq_export.errors import DmqError
from engines.tensorrt.log import explain
from engines.tensorrt.plan_file import RUNTIME_NAMES, Runtime

if TYPE_CHECKING:
    import tensorrt as trt

MODULES: dict[Runtime, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def bindings(runtime: Runtime) -> Any:
    """NVIDIA's module.

    Raises:
        ImportError: it is not installed.
    """
    return import_module(MODULES[runtime])


def deserialize(
    content: bytes, *, host_code: bool, runtime: Runtime = "tensorrt", log: MutableSequence[str] | None = None
) -> trt.ICudaEngine:
    """The engine in a plan that is known to be ours.

    Args:
        host_code: a version compatible plan carries the runtime it runs with.
        log: receives the warnings and errors of the engine's whole life.

    Raises:
        DmqError: the runtime refuses it.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings(runtime)

    lines: MutableSequence[str] = [] if log is None else log
    logger: Any = new_logger(runtime, lines)  # newer bindings declare the next call to take a capsule
    trt.init_libnvinfer_plugins(logger, "")
    loader = trt.Runtime(logger)
    loader.engine_host_code_allowed = host_code
    engine: trt.ICudaEngine | None = loader.deserialize_cuda_engine(content)
    if engine is None:
        raise DmqError(f"{RUNTIME_NAMES[runtime]} refuses the plan: {explain(list(lines)).text()}")
    return engine


def new_logger(runtime: Runtime, log: MutableSequence[str]) -> trt.ILogger:
    """A logger that adds warnings and errors to ``log`` and keeps the user's streams clean."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings(runtime)

    marks = {trt.ILogger.WARNING: "[W]", trt.ILogger.ERROR: "[E]", trt.ILogger.INTERNAL_ERROR: "[F]"}

    class Logger(trt.ILogger):  # type: ignore[misc, unused-ignore]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)  # pybind11 wants it so, not by super()

        def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
            if severity in marks:
                log.append(f"{marks[severity]} {msg}")

    return Logger()


def output_names(engine: trt.ICudaEngine, runtime: Runtime) -> list[str]:
    """Names of the engine's outputs, in its order."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings(runtime)

    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    return [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]


def tensor_type(engine: trt.ICudaEngine, name: str, runtime: Runtime) -> np.dtype[Any]:
    """NumPy's type for an input or output."""
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings(runtime)

    found: np.dtype[Any] = np.dtype(trt.nptype(engine.get_tensor_dtype(name)))
    return found


def refit(engine: trt.ICudaEngine, weights: Path, runtime: Runtime, log: MutableSequence[str]) -> None:
    """Put the weights of the ONNX file ``weights`` into an engine whose plan was built without them.

    Raises:
        DmqError: the runtime cannot.
    """
    if TYPE_CHECKING:
        import tensorrt as trt
    else:
        trt = bindings(runtime)

    logger = new_logger(runtime, log)
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(weights)) or not refitter.refit_cuda_engine():
        title = RUNTIME_NAMES[runtime]
        raise DmqError(f"{title} could not put the weights of {weights} into the plan: {explain(list(log)).text()}")


@contextmanager
def captured_log() -> Iterator[list[str]]:
    """What Polygraphy and TensorRT log while the block runs, which stays off the user's streams."""
    from polygraphy.logger import G_LOGGER

    lines: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("Polygraphy"), Collect()
    before = (logger.level, logger.propagate, G_LOGGER.use_python_logging_system, G_LOGGER.colors)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    logger.addHandler(handler)
    G_LOGGER.use_python_logging_system, G_LOGGER.colors = True, False
    try:
        with G_LOGGER.verbosity(G_LOGGER.VERBOSE):
            yield lines
    finally:
        logger.removeHandler(handler)
        level, logger.propagate, G_LOGGER.use_python_logging_system, G_LOGGER.colors = before
        logger.setLevel(level)
