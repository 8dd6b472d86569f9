"""Taking out of a graph what a parser refuses, so that it reads on."""

from __future__ import annotations

import re

import numpy as np
import onnx_ir as ir

from dmq_export.lint.view import element_type, is_constant

INITIALIZER = re.compile(r"Failed to import initializer: (\S+)\s*$")
CODES = ir.DataType.INT8  # what is left of codes of types that the parser does not know


def cut_node(model: ir.Model, name: str, operator: str) -> bool:
    """Replace the node's outputs by inputs of the graph, of the same type and shape, in place.

    A quantizer of data becomes one with a scale of 1 instead, which keeps shapes that are not known.

    Returns:
        Whether it was there to be cut: at the top of the graph, its outputs of known shape.
    """
    found = next((node for node in model.graph if node.name == name and node.op_type == operator), None)
    if found is None or found.graph is not model.graph:
        return False
    if _neutralize(found):
        return True
    if any(value.shape is None for value in found.outputs):
        return False
    for value in found.outputs:
        _replace(model, value, _input(model, value))
    model.graph.remove(found, safe=False)
    return True


def cut_constant(model: ir.Model, text: str) -> bool:
    """Replace the initializer that the parser's error ``text`` names by an input of INT8, in place."""
    named = INITIALIZER.search(text)
    value = model.graph.initializers.get(named[1]) if named else None
    if value is None:
        return False
    del model.graph.initializers[value.name or ""]
    value.const_value = None
    _replace(model, value, _input(model, value))
    return True


def _neutralize(node: ir.Node) -> bool:
    """Give a quantizer of data a scale of 1 and no zero point, once."""
    scale = node.inputs[1] if len(node.inputs) > 1 else None
    if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or scale is None or is_constant(node.inputs[0]):
        return False
    graph = node.graph
    name = f"{node.name}/scale"
    if not isinstance(graph, ir.Graph) or name in graph.initializers:
        return False
    kind = element_type(scale) or ir.DataType.FLOAT
    value = ir.Value(name=name, const_value=ir.tensor(np.ones((), kind.numpy()), name=name))
    graph.register_initializer(value)
    node.replace_input_with(1, value)
    if len(node.inputs) > 2:
        node.resize_inputs(2)
    if node.op_type == "QuantizeLinear":
        node.outputs[0].type = ir.TensorType(CODES)
    return True


def _replace(model: ir.Model, value: ir.Value, by: ir.Value) -> None:
    for index, output in enumerate(model.graph.outputs):
        if output is value:
            model.graph.outputs[index] = by
    ir.convenience.replace_all_uses_with(value, by)


def _input(model: ir.Model, value: ir.Value) -> ir.Value:
    """A new input like ``value``."""
    codes = value.dtype is not None and value.dtype.is_integer() and value.dtype.bitwidth <= 16
    kind = CODES if codes else value.dtype or ir.DataType.FLOAT
    new = ir.Value(name=f"{value.name}/cut", type=ir.TensorType(kind), shape=value.shape)
    model.graph.inputs.append(new)
    return new


def name_nodes(model: ir.Model) -> None:
    """Give every node a name of its own, in place; those that have one first keep it."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph.all_nodes()):
        if not node.name or node.name in seen:
            node.name = f"{node.name or node.op_type}/{index}"
        seen.add(node.name)
