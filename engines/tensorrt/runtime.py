"""Plans and log lines, as TensorRT's runtime hands them out."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dmq_export.errors import DmqError
from engines.tensorrt.log import explain

if TYPE_CHECKING:
    import tensorrt as trt


def deserialize(content: bytes, *, host_code: bool) -> trt.ICudaEngine:
    """The engine in a plan that is known to be ours.

    Args:
        host_code: a version compatible plan carries the runtime it runs with.

    Raises:
        DmqError: TensorRT refuses it.
    """
    import tensorrt as trt
    from polygraphy.backend.trt import get_trt_logger

    with captured_log() as lines:
        logger = get_trt_logger()
        trt.init_libnvinfer_plugins(logger, "")
        runtime = trt.Runtime(logger)
        runtime.engine_host_code_allowed = host_code
        engine: trt.ICudaEngine | None = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise DmqError(f"TensorRT refuses the plan: {explain(lines).text()}")
    return engine


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
