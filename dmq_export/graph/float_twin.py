"""The float16 twin of a quantized graph: the network as it was, to compare an engine with.

Of a graph of other tools the quantizers are taken out. Of our own everything goes that the lowering put around them
(``docs/lowerings.md``): a layer becomes its one operator again, with the weights that the codes stand for. With
``x' = m * x + a`` in front of the quantizer, and ``g * y' + b`` behind the product, this is ``op(x, g * w * m)`` with
the bias ``g * (op(a, w) + b') + b``. What follows the sampling step cancels out, so the row of the first step serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from dmq_export.errors import ExportError
from dmq_export.graph.float16 import to_float16
from dmq_export.graph.node_builder import NodeBuilder
from dmq_export.graph.onnx_file import metadata_of
from dmq_export.lint.view import QdqGraph, Quantizer, constant, dequantized

BEFORE = frozenset({"stepped", "scaled", "padded", "shifted", "raised", "clipped"})  # names of the lowering's nodes
BEHIND = frozenset({"rescaled", "gained", "sum", "biased", "output"})
PRODUCT = frozenset({"product", "output"})
NOTHING = 2.0**-8  # of its terms: a bias that float16 leaves of them where they cancel out

Array = NDArray[np.float32]


def float_twin(model: ir.Model) -> ir.Model:
    """A float16 copy of ``model`` without quantizers; its weights are computed when they are used.

    Raises:
        ExportError: codes come from where no quantizer is, or a constant overflows float16.
    """
    twin = model.clone()
    if metadata_of(twin) is not None:
        for name, products in _layers(twin).items():
            _restore(twin.graph, name, products)
    _unquantize(twin)
    common.RemoveUnusedNodesPass()(twin)
    twin.graph.sort()
    types = {value.const_value.dtype for value in twin.graph.initializers.values() if value.const_value is not None}
    if ir.DataType.FLOAT16 not in types:
        to_float16(twin)
    return twin


@dataclass(frozen=True, eq=False)
class _Part:
    """A layer's product over some of its input channels: ``gain * (op(factor * x + shift, w) + inner) + bias``.

    ``factor`` and ``shift`` are ``[1]`` or ``[C]``, ``gain``, ``inner`` and ``bias`` ``[1]`` or ``[O]``; ``end`` is
    what it comes to in the graph.
    """

    node: ir.Node
    weight: Quantizer
    x: ir.Value
    end: ir.Value
    factor: Array
    shift: Array
    pads: Array | None
    gain: Array
    inner: Array
    bias: Array

    @property
    def linear(self) -> bool:
        return self.node.op_type == "MatMul"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        tensor = self.weight.data.const_value
        assert tensor is not None
        return tuple(tensor.shape.numpy())

    def columns(self, channels: Array, shape: tuple[int, ...]) -> Array:
        """``channels``, a number for each input channel, as they meet weights of ``shape``."""
        if self.linear or channels.size == 1:
            return channels.reshape(-1, 1) if self.linear else channels
        groups = len(channels) // shape[1]
        rows = np.repeat(channels.reshape(groups, -1), shape[0] // groups, axis=0)
        return rows.reshape(*rows.shape, *(1,) * (len(shape) - 2))

    def rows(self, outputs: Array, rank: int) -> Array:
        """``outputs``, a number for each output channel, as they meet weights."""
        return outputs if self.linear else outputs.reshape(-1, *(1,) * (rank - 1))

    def plain_weight(self) -> Array:
        """What the float layer has."""
        w = _float_weight(self.weight)
        return w * self.columns(self.factor, w.shape) * self.rows(self.gain, w.ndim)

    def bias_terms(self) -> list[Array]:
        """Their sum is the bias."""
        w = _float_weight(self.weight)
        sums = (w * self.columns(self.shift, w.shape)).sum(axis=0 if self.linear else tuple(range(1, w.ndim)))
        return [self.gain * sums, self.gain * self.inner, self.bias]


def _layers(model: ir.Model) -> dict[str, list[ir.Node]]:
    """The integer products of our lowering by layer."""
    found: dict[str, list[ir.Node]] = {}
    for node in QdqGraph(model).integer_operators():
        layer, stem = _names(node)
        if stem in PRODUCT:
            found.setdefault(layer, []).append(node)
    return found


def _names(node: ir.Node) -> tuple[str, str]:
    """Layer and role of one of the lowering's nodes: ``a.b/gained_1`` to ``a.b, gained``."""
    layer, _, name = str(node.name).rpartition("/")
    stem, _, part = name.rpartition("_")
    return layer, stem if part.isdigit() else name


def _restore(graph: ir.Graph, layer: str, products: Sequence[ir.Node]) -> None:
    """Put the plain operator in the place of a lowered layer."""
    parts = [_part(layer, node) for node in products]
    total = _summed(parts)
    total, _, after = _behind(layer, total)
    builder = NodeBuilder(graph, f"{layer}/plain")
    bias = _bias([*(term for part in parts for term in part.bias_terms()), after])
    joined = _joined([part.x for part in parts])
    if joined is not None:
        y = _operator(builder, parts, joined, bias)
    else:
        y, *others = [_operator(builder, [part], part.x, None if index else bias) for index, part in enumerate(parts)]
        for other in others:
            y = builder.op("Add", [y, other], name="sum")
    y.shape, y.type = total.shape, total.type
    last = total.producer()
    assert last is not None
    ir.convenience.replace_all_uses_with(total, y, replace_graph_outputs=True)
    graph.insert_before(last, builder.nodes)


def _part(layer: str, node: ir.Node) -> _Part:
    codes, weight = (dequantized(value) for value in node.inputs[:2])
    assert codes is not None  # the product is an integer one
    assert weight is not None
    quantizer = codes.codes_of()
    if quantizer is None:
        raise ExportError(
            f"{codes.node.name} dequantizes what no QuantizeLinear made: there is no float graph behind it"
        )
    x, factor, shift, pads = _before(layer, quantizer.data)
    end, gain, bias = _behind(layer, node.outputs[0])
    inner = _row(node.inputs[2]) if len(node.inputs) > 2 else None
    return _Part(
        node, weight, x, end, factor, shift, pads, gain, np.zeros(1, np.float32) if inner is None else inner, bias
    )


def _before(layer: str, value: ir.Value) -> tuple[ir.Value, Array, Array, NDArray[Any] | None]:
    """The layer's input, the factor and shift that make ``value`` of it, and its padding."""
    factor, shift, pads = np.ones(1, np.float32), np.zeros(1, np.float32), None
    node = value.producer()
    while node is not None and node.inputs[0] is not None and _names(node) in {(layer, stem) for stem in BEFORE}:
        if node.op_type == "Pad":
            pads = constant(node.inputs[1])
        elif node.op_type in ("Mul", "Add"):
            other = _row(node.inputs[1])
            assert other is not None
            shift = shift + other * factor if node.op_type == "Add" else shift
            factor = factor * other if node.op_type == "Mul" else factor
        value = node.inputs[0]
        node = value.producer()
    return value, factor, shift, pads


def _behind(layer: str, value: ir.Value) -> tuple[ir.Value, Array, Array]:
    """What ``value`` comes to before anything else is added to it, and its gain and bias there."""
    gain, bias = np.ones(1, np.float32), np.zeros(1, np.float32)
    while (node := _only_user(value)) is not None and _names(node) in {(layer, stem) for stem in BEHIND}:
        other = _row(node.inputs[1])
        if other is None:  # the other part of a split layer
            break
        gain = gain * other if node.op_type == "Mul" else gain
        bias = bias * other if node.op_type == "Mul" else bias + other
        value = node.outputs[0]
    return value, gain, bias


def _only_user(value: ir.Value) -> ir.Node | None:
    users = [node for node, _ in value.uses()]
    return users[0] if len(users) == 1 and not value.is_graph_output() else None


def _summed(parts: Sequence[_Part]) -> ir.Value:
    """The sum of the parts' products."""
    total = parts[-1].end
    for _ in parts[1:]:
        node = _only_user(total)
        assert node is not None
        assert node.op_type == "Add"
        total = node.outputs[0]
    return total


def _row(value: ir.Value | None) -> Array | None:
    """A constant, or the first row of a table by step, flat; None for anything else."""
    found = constant(value)
    if found is None and value is not None and (split := value.producer()) is not None and split.op_type == "Split":
        source = split.inputs[0].producer() if split.inputs[0] is not None else None
        table = constant(source.inputs[0]) if source is not None and source.op_type == "Gather" else None
        sizes = constant(split.inputs[1])
        if table is not None and sizes is not None:
            ends = np.cumsum(sizes)[:-1]
            found = np.split(table[0], ends, split.attributes["axis"].as_int())[split.outputs.index(value)]
    return None if found is None else found.astype(np.float32).reshape(-1)


def _joined(pieces: Sequence[ir.Value]) -> ir.Value | None:
    """The value whose channels ``pieces`` are, where the graph has it."""
    if len(pieces) == 1:
        return pieces[0]
    for node, _ in pieces[0].uses():
        if node.op_type == "Concat" and list(node.inputs) == list(pieces):
            return node.outputs[0]
    producers = [piece.producer() for piece in pieces]
    data = {node.inputs[0] if node is not None and node.op_type == "Slice" else None for node in producers}
    return data.pop() if len(data) == 1 else None


def _bias(terms: Sequence[Array]) -> Array | None:
    """The sum, or None where nothing is left of it."""
    total = np.asarray(sum(term.astype(np.float64) for term in terms))
    most = np.asarray(sum(np.abs(term.astype(np.float64)) for term in terms))
    return None if (np.abs(total) <= NOTHING * most).all() else total.astype(np.float32)


def _operator(builder: NodeBuilder, parts: Sequence[_Part], x: ir.Value, bias: Array | None) -> ir.Value:
    """The operator of ``parts`` on all their channels side by side."""
    first = parts[0]
    shapes = [part.shape for part in parts]
    axis = 0 if first.linear else 1
    shape = [*shapes[0][:axis], sum(each[axis] for each in shapes), *shapes[0][axis + 1 :]]
    dtype = first.weight.scale.dtype or ir.DataType.FLOAT
    compute = partial(_concatenated, parts, axis, dtype)
    number = len(builder.nodes)
    w = _lazy(builder, f"weight_{number}", compute, ir.Shape(shape), dtype)
    constants = [] if bias is None else [builder.constant(f"bias_{number}", bias.astype(dtype.numpy()))]
    if not first.linear:
        attributes = dict(first.node.attributes)
        if first.pads is not None:
            rank = len(first.pads) // 2
            attributes["pads"] = ir.AttrInt64s("pads", [*first.pads[2:rank], *first.pads[rank + 2 :]])
        return builder.op("Conv", [x, w, *constants], attributes, name=f"product_{number}")
    y = builder.op("MatMul", [x, w], name=f"product_{number}")
    return builder.op("Add", [y, *constants], name=f"biased_{number}") if constants else y


def _concatenated(parts: Sequence[_Part], axis: int, dtype: ir.DataType) -> ir.TensorProtocol:
    return ir.tensor(np.concatenate([part.plain_weight() for part in parts], axis).astype(dtype.numpy()))


def _lazy(
    builder: NodeBuilder, name: str, compute: Callable[[], ir.TensorProtocol], shape: ir.Shape, dtype: ir.DataType
) -> ir.Value:
    """An initializer that is computed when it is written."""
    full = f"{builder.prefix}/{name}"
    tensor = ir.LazyTensor(compute, dtype=dtype, shape=shape, name=full)
    value = ir.Value(name=full, shape=shape, type=ir.TensorType(dtype), const_value=tensor)
    builder.graph.register_initializer(value)
    return value


def _unquantize(model: ir.Model) -> None:
    """Take the quantizers out: weights become what they stand for, in the scale's type."""
    for each in [each for each in QdqGraph(model).quantizers if each.dequantizes and each.output.uses()]:
        before = each.codes_of()
        if before is not None:
            value = before.data
        elif each.of_weight:
            value = _float_initializer(model.graph, each)
        else:
            raise ExportError(
                f"{each.node.name} dequantizes what no QuantizeLinear made: there is no float graph behind it"
            )
        ir.convenience.replace_all_uses_with(each.output, value, replace_graph_outputs=True)


def _float_initializer(graph: ir.Graph, each: Quantizer) -> ir.Value:
    builder = NodeBuilder(graph, str(each.node.name))
    dtype = each.scale.dtype or ir.DataType.FLOAT
    shape = each.data.shape
    assert shape is not None
    return _lazy(builder, "float", lambda: ir.tensor(_float_weight(each).astype(dtype.numpy())), shape, dtype)


def _float_weight(each: Quantizer) -> Array:
    """``scale * codes`` of a constant."""
    codes, scales = constant(each.data), each.scales
    assert codes is not None
    assert scales is not None
    scales = scales.astype(np.float32)
    block = each.node.attributes.get_int("block_size", 0)
    axis = 1 if each.axis is None else each.axis
    if block:
        scales = np.repeat(scales, block, axis)
    elif scales.size > 1:
        scales = scales.reshape([-1 if index == axis % codes.ndim else 1 for index in range(codes.ndim)])
    return np.asarray(codes.astype(np.float32) * scales)
