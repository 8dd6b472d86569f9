"""From an ONNX file to a TensorRT plan, with Polygraphy.

Types come from the graph alone (strong typing): TensorRT 11 knows nothing else, and TensorRT 10 is told so.
Enumerations are used by name only, because TensorRT 11 renumbered them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dmq_export import __version__
from dmq_export.common.files import sha256
from dmq_export.errors import DmqError
from engines.tensorrt.inspector import EngineLayers, engine_layers
from engines.tensorrt.log import explain
from engines.tensorrt.plan_file import HardwareCompatibility, Machine, PlanMetadata
from engines.tensorrt.profile import ShapeRange
from engines.tensorrt.runtime import captured_log, deserialize

if TYPE_CHECKING:
    import tensorrt as trt
    from polygraphy.backend.trt import CreateConfig


@dataclass(frozen=True)
class BuildSettings:
    """How to build.

    Attributes:
        timing_cache: read and extended; None for none.
        optimization_level: 0 (fast to build) to 5 (fast to run).
        workspace: bytes of GPU memory that a kernel may use beside its data; None for all there is.
        version_compatible: run on later TensorRT versions too.
        hardware_compatible: run on other GPUs too.
        refit: weights can be replaced later.
        strip_weights: leave the weights out of the plan; loading puts them back from the ONNX file.
    """

    timing_cache: Path | None = None
    optimization_level: int = 3
    workspace: int | None = None
    version_compatible: bool = False
    hardware_compatible: HardwareCompatibility = "none"
    refit: bool = False
    strip_weights: bool = False


@dataclass(frozen=True)
class Source:
    """An ONNX file to build from.

    Attributes:
        path: the file.
        shapes: range of every input.
        integer_nodes: nodes that are meant to run in integers.
        layers: names of the model's layers, for messages.
        external: its external-data files.
        metadata: what it says of itself.
        products: all its convolutions and matrix products.
        types: ONNX types of its codes.
    """

    path: Path
    shapes: Mapping[str, ShapeRange]
    integer_nodes: Sequence[str]
    layers: Sequence[str] = ()
    external: Sequence[Path] = ()
    metadata: Mapping[str, Any] | None = None
    products: Sequence[str] = ()
    types: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Plan:
    """A built plan, not yet on disk; ``layers`` is what TensorRT's inspector says of it."""

    content: bytes = field(repr=False)
    metadata: PlanMetadata
    layers: EngineLayers | None = None


def build_plan(source: Source, settings: BuildSettings, machine: Machine) -> Plan:
    """Build and inspect; minutes to an hour of GPU time.

    Raises:
        DmqError: TensorRT refuses; the message names the layer and what to do.
    """
    content = _engine_bytes(source, settings)
    engine = deserialize(content, host_code=settings.version_compatible)
    layers = engine_layers(_inspected(engine), source.integer_nodes)
    metadata = PlanMetadata(
        sha256=hashlib.sha256(content).hexdigest(),
        machine=machine,
        capabilities=(),
        version_compatible=settings.version_compatible,
        hardware_compatible=settings.hardware_compatible,
        stripped=settings.strip_weights,
        onnx_sha256={path.name: sha256(path) for path in (source.path, *source.external)},
        shapes=source.shapes,
        settings=_recorded(settings),
        layers=layers.counts,
        metadata=source.metadata,
        versions={"dmq-export": __version__, "polygraphy": version("polygraphy")},
    )
    return Plan(content, metadata, layers)


def builder_config(shapes: Mapping[str, ShapeRange], settings: BuildSettings) -> CreateConfig:
    """Polygraphy's loader of the builder's configuration."""
    import tensorrt as trt
    from polygraphy.backend.trt import CreateConfig, Profile

    profile = Profile()
    for name, chosen in shapes.items():
        profile.add(name, min=chosen.minimum, opt=chosen.optimum, max=chosen.maximum)
    levels = {
        "none": trt.HardwareCompatibilityLevel.NONE,
        "same-compute-capability": trt.HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY,
        "ampere-plus": trt.HardwareCompatibilityLevel.AMPERE_PLUS,
    }
    cache = settings.timing_cache
    return CreateConfig(
        profiles=[profile],
        load_timing_cache=str(cache) if cache is not None and cache.exists() else None,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
        memory_pool_limits=None if settings.workspace is None else {trt.MemoryPoolType.WORKSPACE: settings.workspace},
        refittable=settings.refit,
        strip_plan=settings.strip_weights,
        builder_optimization_level=settings.optimization_level,
        hardware_compatibility_level=levels[settings.hardware_compatible],
        version_compatible=settings.version_compatible,
    )


def _engine_bytes(source: Source, settings: BuildSettings) -> bytes:
    from polygraphy.backend.trt import EngineBytesFromNetwork, NetworkFromOnnxPath
    from polygraphy.exception import PolygraphyException

    cache = None if settings.timing_cache is None else str(settings.timing_cache)
    build: Callable[[], Any] = EngineBytesFromNetwork(
        NetworkFromOnnxPath(str(source.path), strongly_typed=True),
        config=builder_config(source.shapes, settings),
        save_timing_cache=cache,
    )
    with captured_log() as lines:
        try:
            return bytes(build())
        except PolygraphyException as error:
            reason = explain([*lines, *str(error).splitlines()], source.layers).text()
            raise DmqError(f"TensorRT cannot build {source.path}: {reason}") from error


def _inspected(engine: trt.ICudaEngine) -> str:
    """The engine inspector's JSON."""
    import tensorrt as trt

    inspector: trt.EngineInspector = engine.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def _recorded(settings: BuildSettings) -> dict[str, Any]:
    """The settings as JSON values, without this machine's paths and what the metadata states itself."""
    stated = ("timing_cache", "version_compatible", "hardware_compatible", "strip_weights")
    return {name: value for name, value in asdict(settings).items() if name not in stated}
