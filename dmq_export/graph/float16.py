"""Types a float32 graph in float16, as TensorRT's strong typing wants it: in the graph itself.

What is computed from the timestep alone (the row of the step tables, the sine and cosine of its embedding) stays
float32 up to the first matrix product: in float16 the angles would be off by tenths of a radian.
"""

from __future__ import annotations

from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.errors import ExportError
from dmq_export.layer import Float
from dmq_export.target import FloatType

SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)
LARGEST_FLOAT16 = float(np.finfo(np.float16).max)
FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
STOPS = ("Gemm", "MatMul", "Conv", "Gather")  # where float16 begins
KEPT_INPUTS = {"Resize": (1, 2)}  # region and scales are float32 by definition
TYPED = {"Cast": "to", "RandomNormalLike": "dtype", "EyeLike": "dtype"}


def held(values: NDArray[Any], dtype: FloatType) -> Float:
    """``values`` as a graph of ``dtype`` holds them: what a lowering computes from them then agrees with the graph."""
    with np.errstate(over="ignore"):  # to_float16 refuses it by name
        return values.astype(dtype).astype(np.float32)


def to_float16(model: ir.Model) -> None:
    """Make ``model`` float16, in place, but for what follows from ``timestep`` alone and that input itself.

    Postcondition: every other float32 input, output, constant and value is float16; quantizers have float16 scales.

    Raises:
        ExportError: a constant overflows float16, or a scale is below its smallest normal number; both are named.
    """
    graph = model.graph
    kept = _from_timestep(graph)
    for value in [*graph.inputs, *(output for node in graph if node not in kept for output in node.outputs)]:
        if value.dtype == FLOAT and value.name != "timestep":
            value.type = ir.TensorType(HALF)  # a new one: clones of a model share the old
    for node in list(graph):
        if node in kept:
            _cast_results(graph, node, kept)
            continue
        _retype_attributes(node)
        for index, constant in enumerate(node.inputs):
            if _is_float_constant(constant) and index not in KEPT_INPUTS.get(node.op_type, ()):
                node.replace_input_with(index, _float16_constant(graph, constant, node))
    for name, value in list(graph.initializers.items()):
        if not value.uses():
            graph.initializers.pop(name)


def _from_timestep(graph: ir.Graph) -> set[ir.Node]:
    """Nodes whose results follow from ``timestep`` and constants, before the first matrix product."""
    known = {value for value in graph.inputs if value.name == "timestep"}
    nodes: set[ir.Node] = set()
    for node in graph:
        variable = [value for value in node.inputs if value is not None and value.const_value is None]
        follows = any(value in known for value in variable)
        if node.op_type not in STOPS and follows and all(value in known or _is_shape(value) for value in variable):
            nodes.add(node)
            known.update(node.outputs)
    return nodes


def _is_float_constant(value: ir.Value | None) -> TypeGuard[ir.Value]:
    return value is not None and value.const_value is not None and value.const_value.dtype == FLOAT


def _is_shape(value: ir.Value) -> bool:
    producer = value.producer()
    return producer is not None and producer.op_type == "Shape"


def _cast_results(graph: ir.Graph, node: ir.Node, kept: set[ir.Node]) -> None:
    """Hand the float32 results of a kept node to the others in float16."""
    for output in node.outputs:
        users = [(user, index) for user, index in output.uses() if user not in kept]
        if not users or output.dtype not in (FLOAT, None):
            continue
        name = f"{output.name}/float16"
        half = ir.Value(name=name, type=ir.TensorType(HALF), shape=output.shape)
        graph.insert_after(node, ir.node("Cast", [output], {"to": HALF}, outputs=[half], name=name))
        for user, index in users:
            user.replace_input_with(index, half)


def _retype_attributes(node: ir.Node) -> None:
    attribute = TYPED.get(node.op_type)
    if attribute is not None and node.attributes.get_int(attribute, 0) == FLOAT:
        node.attributes[attribute] = ir.AttrInt64(attribute, HALF)


def _float16_constant(graph: ir.Graph, value: ir.Value, node: ir.Node) -> ir.Value:
    """The initializer in float16, made once."""
    name = f"{value.name}/float16"
    if name in graph.initializers:
        return graph.initializers[name]
    assert value.const_value is not None
    numbers = value.const_value.numpy()
    if np.abs(numbers).max(initial=0) > LARGEST_FLOAT16:
        raise ExportError(f"{value.name} has a value beyond float16's {LARGEST_FLOAT16:g}: export with --dtype float32")
    if node.op_type in ("QuantizeLinear", "DequantizeLinear") and numbers.min(initial=1) < SMALLEST_NORMAL:
        layer = str(node.name).rpartition("/")[0]
        raise ExportError(
            f"layer {layer}: a scale of {numbers.min():.1e} is below float16's smallest normal number "
            f"{SMALLEST_NORMAL:.1e}: export with --dtype float32, or calibrate with --float-layer {layer}"
        )
    tensor = ir.tensor(numbers.astype(np.float16), name=name)
    half = ir.Value(name=name, shape=value.shape, type=ir.TensorType(HALF), const_value=tensor)
    graph.register_initializer(half)
    return half
