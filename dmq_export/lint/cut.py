"""Taking out of a graph what a parser refuses, so that it reads on."""

from __future__ import annotations

import re

import onnx_ir as ir

INITIALIZER = re.compile(r"Failed to import initializer: (\S+)\s*$")
CODES = ir.DataType.INT8  # what is left of codes of types that the parser does not know


def cut_node(model: ir.Model, name: str, operator: str) -> bool:
    """Replace the node's outputs by inputs of the graph, of the same type and shape, in place.

    Returns:
        Whether it was there to be cut, at the top of the graph.
    """
    found = next((node for node in model.graph if node.name == name and node.op_type == operator), None)
    if found is None or found.graph is not model.graph:
        return False
    for value in found.outputs:
        replacement = _input(model, value)
        for index, output in enumerate(model.graph.outputs):
            if output is value:
                model.graph.outputs[index] = replacement
        ir.convenience.replace_all_uses_with(value, replacement)
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
    ir.convenience.replace_all_uses_with(value, _input(model, value))
    return True


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
