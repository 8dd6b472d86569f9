"""Cuts an exported graph at every quantized layer, so that each piece can be fed the reference's values."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.errors import ExportError
from dmq_export.graph.lower import CODES, OUTPUT
from dmq_export.graph.lowered_layer import LayerValues, LoweredLayer, PartValues

LoweredLayers = Mapping[str, LoweredLayer]
QUANTIZER = {
    "Mul",
    "Pad",
    "Add",
    "Clip",
    "Max",
    "Min",
    "QuantizeLinear",
}  # what lies between a layer's input and its codes


def isolate_layers(model: ir.Model, lowered_layers: LoweredLayers) -> None:
    """Cut ``model`` at every layer, in place.

    Each quantizer of a layer gains the graph inputs ``<layer>/given_input`` and ``<layer>/given_codes``, which it and
    the layer's operator now read, and the graph outputs ``<layer>/input`` and ``<layer>/codes``, all with its
    suffix; each layer gains the graph input ``<layer>/given_output``, which the network behind it now reads (a norm
    there may magnify what the layer rounded), and the graph output ``<layer>/output``.
    """
    values = ir.convenience.create_value_mapping(model.graph)
    for name, lowered in lowered_layers.items():
        for suffix in lowered.suffixes:
            _cut_quantizer(model.graph, name, suffix, values[f"{name}/{CODES}{suffix}"], lowered)
        _cut_output(model.graph, name, values[f"{name}/{OUTPUT}"])


def _cut_output(graph: ir.Graph, name: str, output: ir.Value) -> None:
    given = ir.Value(name=f"{name}/given_output", type=output.type, shape=output.shape)
    for node, at in list(output.uses()):
        node.replace_input_with(at, given)
    graph.inputs.append(given)
    graph.outputs.append(output)


def _cut_quantizer(graph: ir.Graph, name: str, suffix: str, codes: ir.Value, lowered: LoweredLayer) -> None:
    first, x = _quantizer_input(name, codes)
    integers = ir.TensorType(ir.DataType.from_numpy(np.dtype(lowered.container)))
    spatial_free = ir.Shape([None] * len(x.shape or ()))  # an explicit Pad makes the codes larger than the input
    given_codes = ir.Value(name=f"{name}/given_codes{suffix}", type=integers, shape=spatial_free)
    given_input = ir.Value(name=f"{name}/given_input{suffix}", type=x.type, shape=x.shape)
    codes.type, codes.shape = integers, spatial_free
    for node, at in list(codes.uses()):
        node.replace_input_with(at, given_codes)
    first.replace_input_with(0, given_input)
    graph.inputs.extend([given_input, given_codes])
    copy = ir.node("Identity", [x], outputs=[ir.Value(name=f"{name}/input{suffix}", type=x.type, shape=x.shape)])
    graph.append(copy)
    graph.outputs.extend([copy.outputs[0], codes])


def isolated_inputs(
    lowered_layers: LoweredLayers, reference: Mapping[str, LayerValues], row: int
) -> dict[str, NDArray[Any]]:
    """The reference's values at the step of ``row`` for the inputs that :func:`isolate_layers` adds."""
    inputs: dict[str, NDArray[Any]] = {}
    for name, values in reference.items():
        for suffix, part in lowered_layers[name].given(values, row).items():
            inputs |= {f"{name}/given_input{suffix}": part.input, f"{name}/given_codes{suffix}": part.codes}
        inputs[f"{name}/given_output"] = lowered_layers[name].expected(values, row).output
    return inputs


def isolated_outputs(
    lowered_layers: LoweredLayers, outputs: Mapping[str, NDArray[Any]], row: int
) -> dict[str, LayerValues]:
    """What a cut graph said, layer by layer, in the reference's codes."""
    said = {}
    for name, lowered in lowered_layers.items():
        parts = [
            PartValues(outputs[f"{name}/input{suffix}"], outputs[f"{name}/{CODES}{suffix}"])
            for suffix in lowered.suffixes
        ]
        said[name] = lowered.seen(parts, outputs[f"{name}/{OUTPUT}"], row)
    return said


def _quantizer_input(name: str, codes: ir.Value) -> tuple[ir.Node, ir.Value]:
    """The first node of the quantizer behind ``codes``, and what it reads from outside the layer."""
    value: ir.Value | None = codes
    first = None
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in QUANTIZER or not (node.name or "").startswith(f"{name}/"):
            break
        first, value = node, node.inputs[0]
    if first is None or value is None or value.shape is None:
        raise ExportError(f"{codes.name} is not the result of a quantizer with an input of a known rank")
    return first, value
