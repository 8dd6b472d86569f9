"""Replaces the traced graph's ``dmq::Layer`` nodes, whatever each becomes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.errors import ExportError
from dmq_export.graph.lowered_layer import LoweredLayer
from dmq_export.graph.marker import DOMAIN
from dmq_export.graph.node_builder import NodeBuilder
from dmq_export.graph.step_tables import StepTables
from dmq_export.layer import LayerSpec, QuantizedLayer

CODES, OUTPUT = "codes", "output"  # what every lowered layer calls its integer input and its result

LowerLayer = Callable[[NodeBuilder, QuantizedLayer, ir.Value, StepTables], tuple[ir.Value, LoweredLayer]]
"""``(builder, layer, input, tables of the graph) -> (output, what was made of it)``"""


def lower(
    model: ir.Model, layers: tuple[QuantizedLayer, ...], timesteps: NDArray[np.float32], lower_layer: LowerLayer
) -> dict[str, LoweredLayer]:
    """Replace every ``dmq::Layer`` node of ``model`` in place; returns what was made of each layer.

    Precondition: the ``layer`` attributes of these nodes name ``layers``, each once. Postcondition: no such node
    is left, and the values ``<layer>/codes`` (with a suffix per part where parts are quantized apart) and
    ``<layer>/output`` exist for each layer.

    Raises:
        ExportError: the precondition does not hold, or a layer cannot be lowered.
    """
    nodes = layer_nodes(model)
    by_name = {layer.spec.name: layer for layer in layers}
    if set(nodes) != set(by_name):
        odd = sorted(set(nodes) ^ set(by_name))[0]
        raise ExportError(f"layer {odd}: the traced graph and the checkpoint disagree on whether it exists")
    steps = StepTables(model.graph, timesteps)
    lowered_layers = {}
    for name, node in nodes.items():
        y = node.outputs[0]
        builder = NodeBuilder(model.graph, name)
        output, lowered_layers[name] = lower_layer(builder, by_name[name], layer_input(node), steps)
        output.shape, output.type = y.shape, y.type
        # not onnx_ir's replace_nodes_and_values: that gives the new output the old one's name
        ir.convenience.replace_all_uses_with(y, output)
        model.graph.insert_before(node, builder.nodes)
        model.graph.remove(node, safe=True)
    steps.finish()
    model.opset_imports.pop(DOMAIN, None)
    return lowered_layers


def layer_nodes(model: ir.Model) -> dict[str, ir.Node]:
    """The ``dmq::Layer`` nodes by the name of their layer, in the order of the graph."""
    return {node.attributes["layer"].as_string(): node for node in model.graph if node.domain == DOMAIN}


def layer_input(node: ir.Node) -> ir.Value:
    """The value that a layer's node reads."""
    x = node.inputs[0]
    if x is None:
        raise ExportError(f"layer {node.attributes['layer'].as_string()}: the traced graph gives it no input")
    return x


def channel_axis(spec: LayerSpec, x: ir.Value) -> int:
    """Axis of the channels in ``x``, counted from the front."""
    if x.shape is None:
        raise ExportError(f"layer {spec.name}: the traced graph does not know the rank of its input")
    return spec.channel_axis % x.shape.rank()
