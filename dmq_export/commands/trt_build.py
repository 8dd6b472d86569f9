"""``dmq-export trt-build``: from an ONNX file to a plan of TensorRT or TensorRT-RTX."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from dmq_export.batch import Batch
from dmq_export.common.files import require_file, require_room
from dmq_export.common.memory import in_words
from dmq_export.common.progress import Progress
from dmq_export.errors import CheckFailedError, DmqError
from dmq_export.graph.float_twin import float_twin
from dmq_export.graph.onnx_file import Sizes, external_files, input_sizes, load_onnx, metadata_of
from dmq_export.lint import lint_model, require_buildable
from dmq_export.lint.view import QdqGraph

if TYPE_CHECKING:
    from engines.tensorrt.build import BuildSettings, Plan, Source
    from engines.tensorrt.compiler import Capability
    from engines.tensorrt.inspector import EngineLayers
    from engines.tensorrt.plan_file import PlanMetadata, Runtime, RuntimeChoice
    from engines.tensorrt.profile import ShapeRange

BATCH = Batch(1, 2, 8)  # where neither the user nor the file says more than that it is open


@dataclass(frozen=True)
class Order:
    """What to build.

    Attributes:
        runtime: for which; ``auto`` is TensorRT where it and a GPU are there, else TensorRT-RTX.
        shapes: of the inputs whose size is open.
        capabilities: of the GPUs that TensorRT-RTX builds for; none for NVIDIA's default.
        beside_float16: compile the graph without its quantizers too, to compare.
        strict: refuse an engine in which a product meant for Int8 runs in float.
    """

    runtime: RuntimeChoice = "auto"
    shapes: Mapping[str, ShapeRange] | None = None
    capabilities: tuple[Capability, ...] = ()
    beside_float16: bool = False
    strict: bool = False


@dataclass(frozen=True)
class Build:
    """A written plan."""

    path: Path
    metadata_path: Path
    plan_bytes: int
    metadata: PlanMetadata
    layers: EngineLayers | None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        metadata, layers = self.metadata, self.layers
        return {
            "plan": str(self.path),
            "bytes": self.plan_bytes,
            "runtime": metadata.runtime,
            "version": metadata.machine.version,
            "capabilities": list(metadata.capabilities),
            "layers": dict(metadata.layers),
            "not_integer": list(not_integer(metadata, layers)),
            "unseen": [] if layers is None else list(layers.unseen),
            "kernels": None if metadata.kernels is None else asdict(metadata.kernels),
            "float16": None if metadata.float16 is None else asdict(metadata.float16),
        }

    def text(self) -> str:
        """What the engine is made of, then where it is."""
        from engines.tensorrt.summary import summary_text

        metadata = self.metadata
        made = (
            summary_text(metadata.kernels, metadata.float16)
            if metadata.kernels
            else self.layers.text()
            if self.layers
            else ""
        )
        target = (
            f"compute capability {', '.join(metadata.capabilities)}" if metadata.capabilities else metadata.machine.gpu
        )
        return (
            f"{made}\n\n{self.path}  {in_words(self.plan_bytes)}  for {target}, {metadata.machine.title}\n"
            f"{self.metadata_path} says what it is and must stay beside it"
        )


def build_engine(
    onnx: str | Path,
    output: str | Path,
    order: Order = Order(),
    settings: BuildSettings | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] = warnings.warn,
) -> Build:
    """Find a runtime, lint ``onnx``, build it; the plan and its ``engine.json`` are written together or not at all.

    Args:
        settings: for TensorRT; None for the defaults.
        note: receives the linter's warnings, what is assumed, and what is about to happen.

    Raises:
        DmqError: bad input, a runtime is missing, or it refuses.
        CheckFailedError: the order is strict, and a product meant for Int8 runs in float.
    """
    from engines.tensorrt.build import BuildSettings
    from engines.tensorrt.plan_file import metadata_path, save_plan

    onnx, output = Path(onnx), Path(output)
    settings, progress = settings or BuildSettings(), progress or Progress()
    if output.suffix != ".plan":
        raise DmqError(f"{output} must end in .plan, as sample expects")
    require_file(output)
    runtime = choose_runtime(order, settings, note)
    model = load_onnx(onnx)
    require_clean(model, onnx, note)
    source = read_source(model, onnx, order.shapes or {}, note)
    require_room(output.parent, sum(path.stat().st_size for path in (onnx, *source.external)))
    plan = _tensorrt(source, settings, note) if runtime == "tensorrt" else _rtx(model, source, order, progress)
    if order.strict:
        require_integer(plan)
    save_plan(plan.content, output, plan.metadata)
    return Build(output, metadata_path(output), len(plan.content), plan.metadata, plan.layers)


def require_clean(model: ir.Model, onnx: Path, note: Callable[[str], None]) -> None:
    """Refuse what the linter refuses.

    Raises:
        DmqError: naming the first error.
    """
    findings = lint_model(model)
    try:
        require_buildable(findings, str(onnx))
    except CheckFailedError as error:  # here it is bad input, not the result of a check
        raise DmqError(str(error)) from error
    warnings = f"{len(findings)} warning{'s' * (len(findings) != 1)}"
    note(f"{onnx} has no lint errors, {warnings}{' (dmq-export lint shows them)' * bool(findings)}")


def choose_runtime(order: Order, settings: BuildSettings, note: Callable[[str], None]) -> Runtime:
    """The runtime to build for, which can build here.

    Raises:
        DmqError: it cannot, or does not know an option that was given.
    """
    from engines.tensorrt.build import BuildSettings
    from engines.tensorrt.environment import missing, require_tensorrt
    from engines.tensorrt.rtx_build import require_rtx

    runtime = order.runtime
    if runtime == "auto":
        runtime = "tensorrt-rtx" if missing() else "tensorrt"
    if runtime == "tensorrt":
        given = ("compute_capability",) * bool(order.capabilities) + ("beside_float16",) * order.beside_float16
        _refuse(given, "TensorRT-RTX", "--runtime tensorrt-rtx")
        require_tensorrt()
        return runtime
    defaults = asdict(BuildSettings())
    _refuse(
        [name for name, value in asdict(settings).items() if value != defaults[name]], "TensorRT", "--runtime tensorrt"
    )
    require_rtx()
    if order.runtime == "auto":
        note("TensorRT-RTX builds, because TensorRT or its GPU is not here (dmq-export doctor says what is missing)")
    return runtime


def read_source(model: ir.Model, onnx: Path, shapes: Mapping[str, ShapeRange], note: Callable[[str], None]) -> Source:
    """What is built from ``model``, which lies in the file ``onnx``.

    Raises:
        DmqError: an input's size stays open.
    """
    from engines.tensorrt.build import Source
    from engines.tensorrt.profile import resolve_shapes
    from engines.tensorrt.summary import layer_names

    metadata, inputs = metadata_of(model), input_sizes(model)
    nodes = integer_nodes(model)
    batch = _stated_batch(metadata) or BATCH
    resolved = resolve_shapes(inputs, shapes, batch)
    _note_batch(inputs, shapes, batch, resolved, note)
    return Source(
        path=onnx,
        shapes=resolved,
        integer_nodes=nodes,
        layers=tuple(layer_names(nodes)),
        external=tuple(external_files(model, onnx.parent)),
        metadata=metadata,
        products=_products(model),
        types=frozenset(each.type.name for each in QdqGraph(model).quantizers),
    )


def integer_nodes(model: ir.Model) -> tuple[str, ...]:
    """Names of the convolutions and matrix products whose data and weights are both quantized to 8 bits."""
    return tuple(node.name for node in QdqGraph(model).integer_operators() if node.name)


def not_integer(metadata: PlanMetadata, layers: EngineLayers | None) -> tuple[str, ...]:
    """Nodes meant to run in Int8 that do not."""
    if layers is not None:
        return layers.not_integer
    return metadata.kernels.not_integer if metadata.kernels else ()


def require_integer(plan: Plan) -> None:
    """Refuse an engine that is not as it was meant.

    Raises:
        CheckFailedError: naming the layers.
    """
    from engines.tensorrt.summary import layer_names

    names = layer_names(not_integer(plan.metadata, plan.layers))
    if names:
        raise CheckFailedError(
            f"--strict: meant for Int8, but run in float: {', '.join(names)}; nothing is written: see dmq-export lint, "
            "or build without --strict"
        )


def _tensorrt(source: Source, settings: BuildSettings, note: Callable[[str], None]) -> Plan:
    from engines.tensorrt.build import build_plan
    from engines.tensorrt.environment import require_tensorrt

    machine = require_tensorrt()
    note(f"building for {machine.gpu} with {machine.title}; this takes minutes")
    return build_plan(source, settings, machine)


def _rtx(model: ir.Model, source: Source, order: Order, progress: Progress) -> Plan:
    from engines.tensorrt.rtx_build import build_rtx_plan, kernels_of

    with progress.stage("building with TensorRT-RTX", None, "phase") as advance:
        plan = build_rtx_plan(source, order.capabilities, lambda phase: advance(0, phase))
    if not order.beside_float16:
        return plan
    with progress.stage("building its float16 graph", None, "phase") as advance, _twin(model, source) as twin:
        float16 = kernels_of(twin, order.capabilities, lambda phase: advance(0, phase))
    return replace(plan, metadata=replace(plan.metadata, float16=float16))


@contextmanager
def _twin(model: ir.Model, source: Source) -> Iterator[Source]:
    """The graph without its quantizers, in a file that goes away."""
    with tempfile.TemporaryDirectory(prefix="dmq-float16-") as folder:
        path = Path(folder) / f"{source.path.stem}-float16.onnx"
        twin = float_twin(model)
        ir.save(twin, path, external_data=f"{path.name}.data")  # protobuf alone ends at 2 GiB
        yield replace(source, path=path, integer_nodes=(), products=_products(twin))


def _products(model: ir.Model) -> tuple[str, ...]:
    return tuple(node.name for node in QdqGraph(model).weighted if node.name)


def _refuse(options: Any, runtime: str, way: str) -> None:
    for name in options:
        option = f"--{name.replace('_', '-')}"
        raise DmqError(f"{option} is for {runtime}, which is not what builds here: leave it out, or give {way}")


def _stated_batch(metadata: Mapping[str, Any] | None) -> Batch | None:
    """The batch sizes that our export states."""
    stated = (metadata or {}).get("batch")
    sizes = [size for size in stated if isinstance(size, int)] if isinstance(stated, list) else []
    return Batch(*sizes) if len(sizes) == 3 else None


def _note_batch(
    inputs: Mapping[str, Sizes],
    given: Mapping[str, ShapeRange],
    batch: Batch,
    resolved: Mapping[str, ShapeRange],
    note: Callable[[str], None],
) -> None:
    """Say what was assumed of a batch that nobody stated."""
    from engines.tensorrt.profile import free_batches

    known = {size for name in given for size in inputs[name]}
    free = [size for size in free_batches(inputs) if size not in known]
    if free:
        first = next(name for name, sizes in inputs.items() if sizes and sizes[0] in free)
        shape = ",".join("x".join(map(str, one)) for one in vars(resolved[first]).values())
        note(
            f"the batch is open: building for {batch.smallest} to {batch.largest}, tuned for {batch.usual} "
            f"(--shapes {first}:{shape} says otherwise)"
        )
