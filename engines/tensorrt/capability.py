"""Compute capabilities: the kinds of GPU that TensorRT-RTX builds for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from dmq_export.errors import DmqError
from engines.tensorrt.compiler import Capability

SUPPORTED: tuple[Capability, ...] = ((7, 5), (8, 0), (8, 6), (8, 9), (12, 0), (12, 1))  # by TensorRT-RTX 1.7.1
# NVIDIA's documentation of what an engine runs on where the builder is told nothing: Ampere and later, without Turing
DEFAULT: tuple[Capability, ...] = ((8, 0), (8, 6), (8, 9), (12, 0))
FIRST_WITH = {"FLOAT8E4M3FN": (8, 9), "FLOAT4E2M1": (12, 0)}  # the builder refuses older GPUs


def parse_capabilities(texts: Sequence[str]) -> tuple[Capability, ...]:
    """``8.9`` and ``12.0`` as numbers, ascending, each once.

    Raises:
        DmqError: one is not supported.
    """
    known = {written(pair): pair for pair in SUPPORTED}
    for text in texts:
        if text not in known:
            raise DmqError(f"--compute-capability {text} is not one of {', '.join(known)}: name those of your GPUs")
    return tuple(sorted({known[text] for text in texts}))


def runs_on(asked: Sequence[Capability], types: Iterable[str]) -> tuple[str, ...]:
    """Where an engine built for ``asked``, or for the default, runs whose graph has codes of the ONNX ``types``."""
    oldest = max((FIRST_WITH.get(each, SUPPORTED[0]) for each in types), default=SUPPORTED[0])
    return tuple(written(pair) for pair in asked or DEFAULT if pair >= oldest)


def written(capability: Capability) -> str:
    """``8.9``."""
    return ".".join(map(str, capability))
