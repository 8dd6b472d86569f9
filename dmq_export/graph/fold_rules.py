"""Carries a factor backwards through a graph into the constants of what computes a value.

A factor is an array of the value's rank that broadcasts over it: sizes of one where it does not vary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.graph.marker import DOMAIN

Factor = NDArray[np.float64]


class BlockedError(Exception):
    """The factor cannot pass; the message says what it met."""


@dataclass
class FactorPath:
    """Where a factor ends, found before anything is changed.

    Attributes:
        constants: inputs of nodes to be multiplied, each with its factor.
        layers: quantized layers whose output is to be multiplied, with the factor on it.
    """

    constants: list[tuple[ir.Node, int, Factor]] = field(default_factory=list)
    layers: dict[str, Factor] = field(default_factory=dict)

    def apply(self) -> None:
        """Multiply the constants; one that other nodes read too is copied first."""
        for node, index, factor in self.constants:
            value = node.inputs[index]
            assert value is not None
            assert value.const_value is not None
            graph = node.graph
            assert isinstance(graph, ir.Graph)
            old = value.const_value.numpy()
            new = (old.astype(np.float64) * factor).astype(old.dtype)
            own = len(value.uses()) == 1
            name = str(value.name) if own else f"{value.name} of {node.name}"
            tensor = ir.tensor(new, name=name)
            copy = ir.Value(name=name, shape=ir.Shape(new.shape), type=value.type, const_value=tensor)
            if own:
                node.replace_input_with(index, None)
                graph.initializers.pop(name)
            graph.register_initializer(copy)
            node.replace_input_with(index, copy)

    def join(self, other: FactorPath) -> None:
        """Take over what another way found."""
        self.constants += other.constants
        for name, factor in other.layers.items():
            self.layers[name] = self.layers.get(name, np.ones(1)) * factor


def factor_path(value: ir.Value, factor: Factor) -> FactorPath:
    """Where ``factor`` on ``value`` can go; the caller has seen to all that reads ``value``.

    Raises:
        BlockedError: it meets something that is not linear, or a value that something else reads.
    """
    node = value.producer()
    if node is None:
        raise BlockedError("its input is an input of the network")
    rule = _layer if node.domain == DOMAIN else RULES.get(node.op_type)
    if rule is None:
        raise BlockedError(f"{node.op_type} lies before it")
    path = FactorPath()
    rule(path, node, value, factor)
    return path


def _into(path: FactorPath, node: ir.Node, index: int, factor: Factor) -> None:
    """Carry ``factor`` into an input of ``node``: a constant, or what computes it."""
    source = node.inputs[index]
    if source is None or source.shape is None:
        raise BlockedError(f"an input of {node.op_type} before it has no known shape")
    if source.const_value is not None and source.producer() is None:
        path.constants.append((node, index, factor))
        return
    if len(source.uses()) > 1 or source.is_graph_output():
        others = sorted({user.op_type for user, _ in source.uses() if user is not node})
        raise BlockedError(f"{' and '.join(others) or 'something else'} reads what it would be folded into too")
    factor = factor.reshape(factor.shape[factor.ndim - source.shape.rank() :])
    sizes: list[tuple[int, object]] = list(zip(factor.shape, source.shape, strict=True))
    if any(own not in (1, whole) for own, whole in sizes):
        raise BlockedError(f"{node.op_type} before it spreads an input over the channels")
    path.join(factor_path(source, factor))


def _layer(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    path.join(FactorPath(layers={node.attributes["layer"].as_string(): factor}))


def _norm(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    channels = _only(factor, 1 if node.op_type == "GroupNormalization" else factor.ndim - 1, node)
    for index in range(1, len(node.inputs)):
        _into(path, node, index, channels)


def _conv(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    rows = _only(factor, 1, node)
    _into(path, node, 1, rows.reshape(-1, *[1] * (factor.ndim - 1)))
    if len(node.inputs) > 2:
        _into(path, node, 2, rows)


def _gemm(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    rows = _only(factor, 1, node)
    transposed = node.attributes.get_int("transB", 0)
    _into(path, node, 1, rows[:, None] if transposed else rows[None])
    if len(node.inputs) > 2:
        _into(path, node, 2, rows)


def _matmul(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    """Into the right-hand side: the weight of a linear layer, or the values of attention."""
    if factor.ndim < 2 or factor.shape[-2] != 1:
        raise BlockedError("MatMul before it sums over the channels")
    right = node.inputs[1]
    if right is None or right.shape is None:
        raise BlockedError("an input of MatMul before it has no known shape")
    extra = factor.ndim - right.shape.rank()
    if any(size != 1 for size in factor.shape[:extra]):
        raise BlockedError("MatMul before it shares its weight over the channels")
    _into(path, node, 1, factor.reshape(factor.shape[extra:]))


def _add(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    for index in range(2):
        _into(path, node, index, factor)


def _product(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    """Into whichever side takes it."""
    reasons = []
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        side = FactorPath()
        try:
            _into(side, node, index, factor)
        except BlockedError as blocked:
            reasons.append(blocked)
        else:
            path.join(side)
            return
    raise reasons[0]


def _transpose(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    order = node.attributes.get_ints("perm", tuple(reversed(range(factor.ndim))))
    _into(path, node, 0, factor.transpose(np.argsort(order)))


def _reshape(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    source = node.inputs[0]
    if source is None or source.shape is None or value.shape is None:
        raise BlockedError(f"{node.op_type} before it has no known shape")
    _into(path, node, 0, reshaped(factor, list(value.shape), list(source.shape)))


def reshaped(factor: Factor, new: list[int | ir.SymbolicDim], old: list[int | ir.SymbolicDim]) -> Factor:
    """A factor on a tensor of shape ``new`` as the factor on the same tensor before it was reshaped from ``old``.

    Raises:
        BlockedError: the factor varies where sizes are mixed that are not known.
    """
    pieces: list[int] = []
    at, start = 0, 0  # in new, in old
    while at < len(new) or start < len(old):
        end, stop = _matching(new, at, old, start)
        group = factor.shape[at:end]
        if all(size == 1 for size in group):
            pieces += [1] * (stop - start)
        elif any(not isinstance(size, int) for size in old[start:stop]):
            raise BlockedError("Reshape before it mixes the channels with the batch")
        else:
            full = [size for size in new[at:end] if isinstance(size, int)]
            factor = np.broadcast_to(factor, (*factor.shape[:at], *full, *factor.shape[end:]))
            pieces += [size for size in old[start:stop] if isinstance(size, int)]
        at, start = end, stop
    return np.ascontiguousarray(factor).reshape(pieces)


def _matching(
    new: Sequence[int | ir.SymbolicDim], at: int, old: Sequence[int | ir.SymbolicDim], start: int
) -> tuple[int, int]:
    """Ends of the shortest runs from ``at`` and ``start`` that hold equally many elements."""
    if at < len(new) and start < len(old) and new[at] == old[start]:
        return at + 1, start + 1
    end, stop = at, start
    counts = [1, 1]
    while (end, stop) == (at, start) or counts[0] != counts[1]:
        shorter = counts[0] <= counts[1] and end < len(new)
        size = (new[end] if shorter else old[stop]) if (shorter or stop < len(old)) else None
        if not isinstance(size, int):
            raise BlockedError("Reshape before it has sizes that are not known")
        counts[0 if shorter else 1] *= size
        end, stop = end + shorter, stop + (not shorter)
    return end, stop


def _split(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    """Into one piece; the others are multiplied by one."""
    source = node.inputs[0]
    axis = node.attributes.get_int("axis", 0) % factor.ndim
    sizes = [output.shape[axis] if output.shape is not None else None for output in node.outputs]
    if source is None or any(not isinstance(size, int) for size in sizes):
        raise BlockedError("Split before it has no known sizes")
    before = sum(size for size in sizes[: node.outputs.index(value)] if isinstance(size, int))
    whole = np.ones((*factor.shape[:axis], sum(s for s in sizes if isinstance(s, int)), *factor.shape[axis + 1 :]))
    own = sizes[node.outputs.index(value)]
    assert isinstance(own, int)
    where = [slice(None)] * axis + [slice(before, before + own)]
    whole[tuple(where)] = factor
    _into(path, node, 0, whole)


def _concat(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    axis = node.attributes["axis"].as_int() % factor.ndim
    end = 0
    for index, piece in enumerate(node.inputs):
        size = piece.shape[axis] if piece is not None and piece.shape is not None else None
        if not isinstance(size, int):
            raise BlockedError("Concat before it has no known sizes")
        own = factor if factor.shape[axis] == 1 else factor.take(range(end, end + size), axis)
        end += size
        _into(path, node, index, own)


def _unsqueeze(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    _reshape(path, node, value, factor)


def _resize(path: FactorPath, node: ir.Node, value: ir.Value, factor: Factor) -> None:
    _only(factor, 1, node)
    _into(path, node, 0, factor)


def only_along(factor: Factor, axis: int, what: str) -> Factor:
    """The factor along ``axis``.

    Raises:
        BlockedError: it varies along another, which ``what`` does not take.
    """
    if factor.size != factor.shape[axis]:
        raise BlockedError(f"{what} before it mixes the channels")
    return factor.reshape(-1)


def _only(factor: Factor, axis: int, node: ir.Node) -> Factor:
    return only_along(factor, axis, node.op_type)


Rule = Callable[[FactorPath, ir.Node, ir.Value, Factor], None]
RULES: dict[str, Rule] = {
    "GroupNormalization": _norm,
    "LayerNormalization": _norm,
    "Conv": _conv,
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Add": _add,
    "Sub": _add,
    "Mul": _product,
    "Div": _product,
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _unsqueeze,
    "Split": _split,
    "Concat": _concat,
    "Resize": _resize,
}
