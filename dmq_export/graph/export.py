"""From a traced network to an ONNX file."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes import common

from dmq_export import __version__
from dmq_export.batch import Batch
from dmq_export.checkpoint import Checkpoint
from dmq_export.common.files import atomic_files
from dmq_export.errors import ExportError
from dmq_export.graph.float16 import to_float16
from dmq_export.graph.fold import fold_factors
from dmq_export.graph.integer import lower_integer
from dmq_export.graph.lower import lower
from dmq_export.graph.lowered_layer import LoweredLayer
from dmq_export.graph.portable import lower_portable
from dmq_export.graph.simplify import simplify_graph
from dmq_export.graph.step_tables import STEP
from dmq_export.layer import QuantizedLayer
from dmq_export.metadata import METADATA_KEY, export_metadata
from dmq_export.target import FloatType, Target

LARGEST_FILE = 2**31 - 2**24  # bytes of weights: protobuf refuses messages of 2 GiB, and the graph needs some


@dataclass(frozen=True)
class ExportedGraph:
    """A graph and what was made of each quantized layer in it."""

    model: ir.Model
    lowered_layers: Mapping[str, LoweredLayer]
    target: Target = "portable"
    dtype: FloatType = "float32"
    batch: Batch | None = None

    @property
    def scaled(self) -> dict[str, str]:
        """Why, by layer, the LES and PTS factors stay a ``Mul`` before the quantizer; the portable graph has none."""
        return {name: lowered.scaled for name, lowered in self.lowered_layers.items() if lowered.scaled}


def require_type(target: Target, dtype: FloatType) -> None:
    """Refuse a type that the graphs for ``target`` do not come in.

    Raises:
        ExportError: it is one.
    """
    if dtype == "float16" and target != "tensorrt":
        raise ExportError(f"--dtype float16 is for --target tensorrt; the {target} graph is float32")


def lower_graph(
    model: ir.Model, checkpoint: Checkpoint, target: Target, dtype: FloatType, batch: Batch | None
) -> ExportedGraph:
    """The graph of ``checkpoint`` for ``target``, in memory; any batch size where ``batch`` does not fix one.

    Args:
        model: the traced network, with a marker for each quantized layer; it becomes the result.

    Raises:
        ExportError: a layer cannot be lowered.
    """
    simplify_graph(model, None if batch is None else batch.fixed)
    if target == "portable":
        lowered_layers = lower(model, checkpoint.layers, checkpoint.timesteps, lower_portable)
    else:
        lowered_layers = _lower_folded(model, checkpoint, target, dtype)
    if dtype == "float16":
        to_float16(model)
    common.RemoveUnusedNodesPass()(model)
    common.CheckerPass()(model)
    model.graph.name = checkpoint.model.class_name
    model.producer_name, model.producer_version = "dmq-export", __version__
    model.metadata_props[METADATA_KEY] = json.dumps(export_metadata(checkpoint, target, dtype, batch))
    return ExportedGraph(model, lowered_layers, target, dtype, batch)


def _lower_folded(model: ir.Model, checkpoint: Checkpoint, target: Target, dtype: FloatType) -> dict[str, LoweredLayer]:
    folding = fold_factors(model, checkpoint.layers)
    lowered_layers = lower(model, folding.layers, checkpoint.timesteps, lower_integer(target, dtype))
    return {
        name: replace(
            lowered,
            input_factor=folding.input_factor.get(name),
            output_factor=folding.output_factor.get(name),
            scaled=folding.stays.get(name, ""),
        )
        for name, lowered in lowered_layers.items()
    }


def save_onnx(model: ir.Model, path: Path, *, largest: int = LARGEST_FILE) -> None:
    """Write the file whole or not at all; of a model with more than ``largest`` bytes of weights two files or none.

    The second is :func:`data_path`, which the first names relative to itself.

    Raises:
        DmqError: the folder cannot be written.
    """
    data = data_path(path).name
    with atomic_files(path, data) as scratch:
        ir.save(model, scratch, external_data=data if weight_bytes(model) > largest else None)


def data_path(path: Path) -> Path:
    """Where the weights of a model lie that is too large for the file ``path`` alone."""
    return path.with_name(f"{path.name}.data")


@contextmanager
def loadable(model: ir.Model, *, largest: int = LARGEST_FILE) -> Iterator[bytes | Path]:
    """The model as a runtime takes it: from memory, or, where it is too large for that, from a file that goes away."""
    if weight_bytes(model) <= largest:
        yield serialized(model)
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_onnx(model, path, largest=largest)
        yield path


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initializers as a file stores them."""
    tensors = (value.const_value for graph in model.graphs() for value in graph.initializers.values())
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def serialized(model: ir.Model) -> bytes:
    """The model as a runtime takes it from memory."""
    content: bytes = ir.to_proto(model).SerializeToString()
    return content


def layer_bytes(model: ir.Model, layers: tuple[QuantizedLayer, ...]) -> int:
    """Bytes of all initializers that belong to quantized layers: codes, scales, zero points, tables, biases."""
    prefixes = tuple(f"{layer.spec.name}/" for layer in layers) + ((f"{STEP}/",) if layers else ())
    initializers = model.graph.initializers.items()
    tensors = (value.const_value for name, value in initializers if name.startswith(prefixes))
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)
