"""TensorRT-RTX's parser alone, in a process of its own that reads many graphs in turn."""

from __future__ import annotations

from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from types import TracebackType
from typing import Any

from engines.tensorrt.compiler import NodeError


class Parser:
    """The parser, as a context manager: its process ends with it."""

    def __enter__(self) -> Parser:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown()

    def errors(self, content: bytes, file: Path) -> tuple[NodeError, ...] | None:
        """What the parser refuses in the graph ``content``; it stops at the first node. None where it crashed.

        Args:
            content: the serialized model.
            file: where it would lie; its external data are looked for beside it.
        """
        try:
            found = self._pool.submit(_errors, content, str(file)).result()
        except BrokenProcessPool:
            return None
        return tuple(NodeError(**error) for error in found)


def _errors(content: bytes, file: str) -> list[dict[str, Any]]:
    """In the process: parse, and say what was refused."""
    trt = import_module("tensorrt_rtx")

    from engines.tensorrt.worker import _error

    logger = trt.Logger(trt.Logger.INTERNAL_ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)  # the parser does not keep it alive
    parser = trt.OnnxParser(network, logger)
    parser.parse(content, file)
    return [_error(parser.get_error(index)) for index in range(parser.num_errors)]
