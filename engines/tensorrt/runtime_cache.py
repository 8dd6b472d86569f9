"""The kernels that TensorRT-RTX compiles for a GPU when an engine first runs there, kept beside the plan.

``model.rtx-cache`` begins with 32 bytes that tie it to the plan and to its own content; TensorRT-RTX itself checks that
the rest suits its version, the GPU and the driver. A cache that is not good is ignored with a note and written again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmq_export.common.files import atomic_file
from dmq_export.errors import DmqError

if TYPE_CHECKING:
    import tensorrt_rtx as rtx

SEAL_BYTES = 32


def cache_path(plan: Path) -> Path:
    """``model.rtx-cache`` for ``model.plan``."""
    return plan.with_suffix(".rtx-cache")


class RuntimeCache:
    """A runtime configuration of TensorRT-RTX whose compiled kernels outlast the process.

    It compiles kernels for a batch size before that first runs, not behind it while others are used, so that one run
    has one set of numbers; and it records CUDA graphs itself, since plans not built for it cannot be recorded from
    outside.

    Args:
        engine: which it is for; a CUDA context must be current.
        plan: where the engine comes from.
        plan_sha256: of that file.
        note: receives why a cache is not used, or not kept.
    """

    def __init__(self, engine: rtx.ICudaEngine, plan: Path, plan_sha256: str, note: Callable[[str], None]) -> None:
        self.config = _config(engine)
        self._cache = _empty_cache(self.config)
        self._path, self._plan_sha256, self._note = cache_path(plan), plan_sha256, note
        self._kept = read_cache(self._path, plan_sha256, note)
        if self._kept is not None and not self._cache.deserialize(self._kept):
            note(f"{self._path} is of another GPU, driver or TensorRT-RTX: the kernels are compiled again")
        self.config.set_runtime_cache(self._cache)

    def keep(self) -> None:
        """Write the cache if kernels were compiled since it was read or written."""
        memory: Any = self._cache.serialize()  # a buffer, which its declaration does not say
        content = b"" if memory is None else bytes(memory)
        if content and content != self._kept:
            self._kept = content
            write_cache(self._path, self._plan_sha256, content, self._note)


def _config(engine: rtx.ICudaEngine) -> rtx.IRuntimeConfig:
    import tensorrt_rtx as rtx

    config = engine.create_runtime_config()
    config.cuda_graph_strategy = rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    config.dynamic_shapes_kernel_specialization_strategy = rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    return config


def _empty_cache(config: rtx.IRuntimeConfig) -> rtx.IRuntimeCache:
    cache: rtx.IRuntimeCache = config.create_runtime_cache()
    return cache


def read_cache(path: Path, plan_sha256: str, note: Callable[[str], None]) -> bytes | None:
    """What TensorRT-RTX left in ``path``; None where there is none for this plan, with a note if that is amiss."""
    if not path.exists():
        return None
    try:
        stored = path.read_bytes()
    except OSError as error:
        note(f"cannot read {path} ({error.strerror}): the kernels are compiled again")
        return None
    content = stored[SEAL_BYTES:]
    if not content or stored[:SEAL_BYTES] != _seal(plan_sha256, content):
        note(f"{path} is of another plan, or damaged: the kernels are compiled again")
        return None
    return content


def write_cache(path: Path, plan_sha256: str, content: bytes, note: Callable[[str], None]) -> None:
    """Write ``content`` so that :func:`read_cache` takes it for this plan alone; a note where that is not possible."""
    try:
        with atomic_file(path) as scratch:
            scratch.write_bytes(_seal(plan_sha256, content) + content)
    except (DmqError, OSError) as error:
        note(f"the compiled kernels are not kept: {error}")


def _seal(plan_sha256: str, content: bytes) -> bytes:
    return hashlib.sha256(plan_sha256.encode() + content).digest()
