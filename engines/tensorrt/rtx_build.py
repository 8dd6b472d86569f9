"""From an ONNX file to a plan of TensorRT-RTX, which needs no GPU."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Sequence
from importlib.metadata import version

from dmq_export import __version__
from dmq_export.common.extras import require
from dmq_export.common.files import sha256
from dmq_export.errors import DmqError
from engines.tensorrt.build import Plan, Source
from engines.tensorrt.capability import runs_on, written
from engines.tensorrt.compiler import Capability, Compiled, Refusal, Request, compile_onnx
from engines.tensorrt.plan_file import Machine, PlanMetadata, this_platform
from engines.tensorrt.summary import KernelSummary, layer_names, summarize

PROCESSORS = ("x86_64", "AMD64")
SYSTEMS = ("Linux", "Windows")

Watch = Callable[[str], None]


def require_rtx() -> None:
    """Refuse to begin where TensorRT-RTX cannot be.

    Raises:
        DmqError: it is not installed, or there is none for this platform.
    """
    if platform.system() not in SYSTEMS or platform.machine() not in PROCESSORS:
        raise DmqError(
            f"TensorRT-RTX cannot build on {this_platform()}: NVIDIA has it for Linux and Windows on x86-64, and an "
            "engine that is built there runs on any of them"
        )
    require("building with TensorRT-RTX", "tensorrt_rtx", "polygraphy")


def build_rtx_plan(source: Source, capabilities: Sequence[Capability], watch: Watch) -> Plan:
    """Build; seconds to minutes.

    Args:
        capabilities: of the GPUs to build for; none for NVIDIA's default.
        watch: called a few times a second with the builder's current phase.

    Raises:
        DmqError: TensorRT-RTX refuses; the message names the layer and what to do.
    """
    compiled = _compiled(source, capabilities, watch)
    metadata = PlanMetadata(
        sha256=hashlib.sha256(compiled.engine).hexdigest(),
        machine=Machine("tensorrt-rtx", compiled.version, this_platform()),
        capabilities=runs_on(capabilities, source.types),
        version_compatible=False,
        hardware_compatible="none",
        stripped=False,
        onnx_sha256={path.name: sha256(path) for path in (source.path, *source.external)},
        shapes=source.shapes,
        settings={"compute_capability": [written(pair) for pair in capabilities] or "default"},
        layers={},
        metadata=source.metadata,
        versions={"dmq-export": __version__, "polygraphy": version("polygraphy")},
        kernels=_summary(compiled, source),
    )
    return Plan(compiled.engine, metadata)


def kernels_of(source: Source, capabilities: Sequence[Capability], watch: Watch) -> KernelSummary:
    """What TensorRT-RTX makes of a graph, without keeping the engine.

    Raises:
        DmqError: as :func:`build_rtx_plan`.
    """
    return _summary(_compiled(source, capabilities, watch), source)


def _summary(compiled: Compiled, source: Source) -> KernelSummary:
    return summarize(compiled.table, compiled.engine, source.integer_nodes, source.products)


def _compiled(source: Source, capabilities: Sequence[Capability], watch: Watch) -> Compiled:
    result = compile_onnx(Request(source.path, source.shapes, tuple(capabilities)), watch)
    if isinstance(result, Refusal):
        title = f"TensorRT-RTX {result.version}".rstrip()
        raise DmqError(f"{title} cannot build {source.path}: {result.text(layer_names(source.products))}")
    return result
