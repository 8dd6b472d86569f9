"""What is in a checkpoint or an ONNX file: what is quantized and how, what stayed float, sizes, provenance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dmq_export.checkpoint import RUN, Checkpoint, load_checkpoint
from dmq_export.common.memory import in_words
from dmq_export.common.table import table
from dmq_export.coverage import FloatLayer
from dmq_export.layer import QuantizedLayer

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class LayerSummary:
    """One quantized layer.

    Attributes:
        parts: input channels of each independently quantized part.
        steps: rows of the activation tables, 1 for static ranges.
        pts_channels: channels with a finer step than the layer's own.
        pts_exponent: the largest of their exponents.
        tau_min, tau_max: range of the LES factors.
        bytes: of its codes, scales, zero points, factors and bias as the checkpoint stores them.
    """

    name: str
    kind: str
    bits: str
    scheme: str
    parts: tuple[int, ...]
    steps: int
    pts_channels: int
    pts_exponent: int
    tau_min: float
    tau_max: float
    parameters: int
    bytes: int


@dataclass(frozen=True)
class CheckpointSummary:
    """A checkpoint; ``float_bytes`` are those of everything outside the quantized layers."""

    path: Path
    model: str
    weights_sha256: str
    scheduler: str
    timesteps: tuple[float, ...]
    recipe: Mapping[str, Any]
    versions: Mapping[str, str]
    layers: tuple[LayerSummary, ...]
    float_layers: tuple[FloatLayer, ...]
    quantized_bytes: int
    float32_bytes: int
    float_bytes: int
    file_bytes: int
    summary: str

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"kind": "checkpoint", **asdict(self), "path": str(self.path)}

    def text(self) -> str:
        """Provenance, then every layer, then sizes."""
        recipe = ", ".join(f"{name} {value}" for name, value in self.recipe.items())
        ratio = self.quantized_bytes / max(self.float32_bytes, 1)
        return "\n\n".join(
            [
                f"checkpoint {self.path} of a {self.model} (weights {self.weights_sha256[:12]})\n"
                f"{self.scheduler}, {len(self.timesteps)} calibrated timesteps; {_versions(self.versions)}\n"
                f"recipe: {recipe}",
                self._quantized_table(),
                self._float_table(),
                f"{self.summary}\nquantized layers {in_words(self.quantized_bytes)} ({ratio:.3f} of float32), "
                f"float tensors {in_words(self.float_bytes)}, files {in_words(self.file_bytes)}",
            ]
        )

    def _quantized_table(self) -> str:
        header = ("quantized", "kind", "bits", "scheme", "split", "steps", "PTS channels", "tau", "size")
        rows = [
            (
                layer.name,
                layer.kind,
                layer.bits,
                layer.scheme,
                "+".join(map(str, layer.parts)) if len(layer.parts) > 1 else "",
                str(layer.steps),
                f"{layer.pts_channels} (2^-{layer.pts_exponent})" if layer.pts_channels else "",
                f"{layer.tau_min:.3g}..{layer.tau_max:.3g}",
                in_words(layer.bytes),
            )
            for layer in self.layers
        ]
        return table(header, rows, right=(5, 8))

    def _float_table(self) -> str:
        rows = [(layer.name, layer.kind, f"{layer.parameters:,}", layer.reason) for layer in self.float_layers]
        return table(("float", "kind", "parameters", "reason"), rows, right=(2,))


@dataclass(frozen=True)
class OnnxSummary:
    """An ONNX file.

    Attributes:
        pairs: QuantizeLinear and DequantizeLinear nodes, of activations and of weights.
        products: convolutions and matrix products by what they multiply: ``int8``, ``quantized`` (another type, or
            only one side) and ``float``.
        weights: by type, how many initializers and bytes.
        metadata: what our export says of the model; None for files of other tools.
    """

    path: Path
    producer: str
    opset: int
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]
    operators: Mapping[str, int]
    pairs: Mapping[str, int]
    products: Mapping[str, int]
    float_products: tuple[str, ...]
    weights: Mapping[str, tuple[int, int]]
    file_bytes: int
    metadata: Mapping[str, Any] | None

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        return {"kind": "onnx", **asdict(self), "path": str(self.path)}

    def text(self) -> str:
        """Provenance, then operators, then weights."""
        signature = [f"{name} {kind}" for name, kind in {**self.inputs, **self.outputs}.items()]
        weights = [(kind, str(count), in_words(size)) for kind, (count, size) in self.weights.items()]
        operators = [(name, str(count)) for name, count in self.operators.items()]
        products = ", ".join(f"{count} {kind}" for kind, count in self.products.items())
        return "\n\n".join(
            [
                f"{self.path}  {in_words(self.file_bytes)}, opset {self.opset}, {self.producer}\n{self._origin()}",
                "\n".join(signature),
                table(("operator", "count"), operators, right=(1,)),
                table(("Q/DQ", "count"), [(name, str(count)) for name, count in self.pairs.items()], right=(1,)),
                f"convolutions and matrix products: {products or 'none'}",
                self._float(),
                table(("weights", "tensors", "size"), weights, right=(1, 2)),
            ]
        )

    def _float(self) -> str:
        """The float layers with their reasons, where the file tells them; else the float operators."""
        reasons = (self.metadata or {}).get("float_layers")
        if isinstance(reasons, dict):
            return table(("float", "reason"), [(name, str(reason)) for name, reason in reasons.items()])
        return "float: " + (", ".join(self.float_products) or "none")

    def _origin(self) -> str:
        if self.metadata is None:
            return "no dmq-export metadata: made by another tool"
        metadata = self.metadata
        return (
            f"{metadata.get('bits')} {metadata.get('model')} for {metadata.get('target')}, "
            f"{len(metadata.get('timesteps', ()))} calibrated timesteps, "
            f"from weights {str(metadata.get('weights_sha256'))[:12]}"
        )


def inspect_checkpoint(folder: Path) -> CheckpointSummary:
    """Summarize the checkpoint in ``folder``.

    Raises:
        CheckpointError: it is none, or is damaged.
    """
    checkpoint = load_checkpoint(folder)
    layers = tuple(_layer(layer) for layer in checkpoint.layers)
    return CheckpointSummary(
        path=folder,
        model=checkpoint.model.class_name,
        weights_sha256=checkpoint.model.weights_sha256,
        scheduler=str(checkpoint.model.scheduler.get("_class_name", "no scheduler")),
        timesteps=tuple(checkpoint.timesteps.tolist()),
        recipe=checkpoint.recipe,
        versions=checkpoint.versions,
        layers=layers,
        float_layers=checkpoint.float_layers,
        quantized_bytes=sum(layer.bytes for layer in layers),
        float32_bytes=_float32_bytes(checkpoint),
        float_bytes=sum(value.nbytes for value in checkpoint.float_tensors.values()),
        file_bytes=sum(path.stat().st_size for path in folder.iterdir() if path.is_file() and path.name != RUN),
        summary=checkpoint.coverage.summary(),
    )


def inspect_onnx(path: Path) -> OnnxSummary:
    """Summarize the ONNX file ``path``, which may come from any tool.

    Raises:
        DmqError: it is no ONNX file.
    """
    from dmq_export.graph.onnx_file import external_files, load_onnx, metadata_of
    from dmq_export.lint.view import QdqGraph, with_types

    model = load_onnx(path)
    graph = QdqGraph(with_types(model))
    products, float_products = _products(graph)
    files = [path, *external_files(model, path.parent)]
    return OnnxSummary(
        path=path,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))) or "unknown producer",
        opset=graph.opset,
        inputs={str(value.name): _signature(value) for value in model.graph.inputs if not value.is_initializer()},
        outputs={str(value.name): _signature(value) for value in model.graph.outputs},
        operators=dict(Counter(node.op_type for node in model.graph.all_nodes()).most_common()),
        pairs=dict(Counter(_pair(each) for each in graph.quantizers)),
        products=products,
        float_products=float_products,
        weights=_weights(model),
        file_bytes=sum(each.stat().st_size for each in files),
        metadata=metadata_of(model),
    )


def _layer(layer: QuantizedLayer) -> LayerSummary:
    spec = layer.spec
    packed = -(-layer.codes.size // 2) if spec.bits.weight <= 4 else layer.codes.size
    others = sum(value.nbytes for name, value in layer.tensors().items() if name != "codes")
    return LayerSummary(
        name=spec.name,
        kind=spec.kind,
        bits=str(spec.bits),
        scheme=spec.scheme,
        parts=spec.parts,
        steps=len(layer.scale),
        pts_channels=int(np.count_nonzero(layer.shift)),
        pts_exponent=int(layer.shift.max(initial=0)),
        tau_min=float(layer.tau.min()),
        tau_max=float(layer.tau.max()),
        parameters=layer.codes.size,
        bytes=packed + others,
    )


def _float32_bytes(checkpoint: Checkpoint) -> int:
    return sum(4 * (layer.codes.size + (0 if layer.bias is None else layer.bias.size)) for layer in checkpoint.layers)


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _signature(value: ir.Value) -> str:
    kind = value.dtype.name.lower() if value.dtype is not None else "unknown"
    sizes = "?" if value.shape is None else ", ".join(str(size) for size in value.shape)
    return f"{kind} [{sizes}]"


def _pair(each: Any) -> str:
    return f"{each.node.op_type} of {'weights' if each.of_weight else 'activations'}, {each.type.name}"


def _products(graph: Any) -> tuple[dict[str, int], tuple[str, ...]]:
    """Convolutions and matrix products by kind, and the names of the float ones."""
    from dmq_export.lint.view import dequantized

    integer = {id(node) for node in graph.integer_operators()}
    kinds: Counter[str] = Counter()
    names = []
    for node in graph.weighted:
        quantized = any(dequantized(value) is not None for value in node.inputs[:2])
        kind = "int8" if id(node) in integer else "quantized" if quantized else "float"
        kinds[kind] += 1
        if kind == "float":
            names.append(node.name or node.outputs[0].name or node.op_type)
    return dict(kinds), tuple(names)


def _weights(model: ir.Model) -> dict[str, tuple[int, int]]:
    """Initializers by type: how many, and their bytes."""
    found: dict[str, tuple[int, int]] = {}
    for graph in model.graphs():
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None:
                count, size = found.get(tensor.dtype.name, (0, 0))
                found[tensor.dtype.name] = (count + 1, size + tensor.nbytes)
    return dict(sorted(found.items()))
