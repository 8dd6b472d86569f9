"""Makes the traced graph legible: names of the diffusers model, and no chains of shape arithmetic."""

from __future__ import annotations

import ast
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import pattern

from dmq_export.graph.marker import BATCH

SCOPES = "pkg.torch.onnx.name_scopes"  # where the exporter notes the modules that a node lies in
ROOT = "network."  # what the tracer calls the denoiser


def simplify_graph(model: ir.Model, batch: int | None = None) -> None:
    """Simplify, name and strip ``model`` in place; give the batch axis a size where ``batch`` says one.

    Postcondition: it computes what it did; nodes are called ``<module>/<operator>`` after the model's modules,
    initializers as the model's tensors, and nothing of this machine (stack traces, paths) is left.
    """
    RULES.apply_to_model(model)
    if batch is not None:
        fix_batch(model, batch)
        fold_constants(model)
    common.RemoveUnusedNodesPass()(model)
    name_nodes(model)
    common.ClearMetadataAndDocStringPass()(model)


class TransposedKeys(pattern.RewriteRuleClassBase):
    """The keys of attention: ``[N, H, L, D]`` flattened, transposed and unflattened is one Transpose."""

    def pattern(self, op: Any, x: Any, start: Any, end: Any, second: Any, last: Any, first: Any, any_size: Any) -> Any:
        shape = op.Shape(x)
        length = op.Slice(shape, second, last)
        width = op.Slice(shape, start, end)
        batch = op.Slice(shape, first, second)
        flat = op.Transpose(op.Reshape(x, op.Concat(any_size, length, width)), perm=[0, 2, 1])
        return op.Reshape(flat, op.Concat(batch, width, length))

    def check(self, context: Any, x: ir.Value, **_: Any) -> bool:  # type: ignore[override]
        return x.shape is not None and x.shape.rank() == 4

    def rewrite(self, op: Any, x: ir.Value, **_: Any) -> Any:
        return op.Transpose(x, perm=[0, 1, 3, 2])


class MultipliedOnes(pattern.RewriteRuleClassBase):
    """A value spread over the batch and multiplied by ones of the same shape is the spread value."""

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        return op.Mul(op.Expand(x, shape), op.Expand(1.0, shape))

    def rewrite(self, op: Any, x: ir.Value, shape: ir.Value) -> Any:
        return op.Expand(x, shape)


RULES = pattern.RewriteRuleSet([rule.rule() for rule in (TransposedKeys, MultipliedOnes)])  # type: ignore[no-untyped-call]


def name_nodes(model: ir.Model) -> None:
    """Call nodes and their results after the module they lie in, initializers after the model's tensors.

    Names of graph inputs and outputs stay.
    """
    taken: dict[str, int] = {}
    for node in model.graph:
        name = f"{_module(node)}/{node.op_type}".lstrip("/")
        count = taken[name] = taken.get(name, 0) + 1
        node.name = name if count == 1 else f"{name}_{count}"
        for index, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = node.name if len(node.outputs) == 1 else f"{node.name}:{index}"
    for name, value in list(model.graph.initializers.items()):
        model.graph.initializers.pop(name)
        value.name = name.removeprefix(ROOT)
        model.graph.register_initializer(value)


def fix_batch(model: ir.Model, batch: int) -> None:
    """Give the batch axis a size everywhere."""
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = ir.Shape([batch if str(size) == BATCH else size for size in value.shape])


def _module(node: ir.Node) -> str:
    """The innermost module whose code made ``node``; empty outside of all."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    inside = [scope for scope in scopes[:-1] if scope.startswith(ROOT)]
    return inside[-1].removeprefix(ROOT) if inside else ""
