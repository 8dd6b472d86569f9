"""Cuts an exported graph at every quantized layer, so that each piece can be fed the reference's values."""

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.errors import ExportError
from dmq_export.portable import CODES, OUTPUT
from dmq_export.verify import LayerValues


def cut_graph(model: ir.Model, layers: Sequence[str]) -> None:
    """Cut ``model`` at every layer, in place.

    Each layer gains the graph inputs ``<layer>/given_input`` and ``<layer>/given_codes``, which its quantizer and
    its operator now read, and the graph outputs ``<layer>/input``, ``<layer>/codes`` and ``<layer>/output``.
    """
    values = ir.convenience.create_value_mapping(model.graph)
    for name in layers:
        codes, output = values[f"{name}/{CODES}"], values[f"{name}/{OUTPUT}"]
        x = _quantized_value(codes)
        given_codes = ir.Value(name=f"{name}/given_codes", type=ir.TensorType(ir.DataType.UINT8), shape=x.shape)
        given_input = ir.Value(name=f"{name}/given_input", type=x.type, shape=x.shape)
        codes.type, codes.shape = given_codes.type, x.shape
        for node, index in list(codes.uses()):
            node.replace_input_with(index, given_codes)
        quantizer = _quantizer(codes)
        quantizer.replace_input_with(0, given_input)
        model.graph.inputs.extend([given_input, given_codes])
        copy = ir.node("Identity", [x], outputs=[ir.Value(name=f"{name}/input", type=x.type, shape=x.shape)])
        model.graph.append(copy)
        model.graph.outputs.extend([copy.outputs[0], codes, output])


def cut_inputs(reference: Mapping[str, LayerValues]) -> dict[str, NDArray[Any]]:
    """The reference's values for the inputs that :func:`cut_graph` adds."""
    inputs: dict[str, NDArray[Any]] = {}
    for name, values in reference.items():
        inputs |= {f"{name}/given_input": values.input, f"{name}/given_codes": values.codes}
    return inputs


def cut_outputs(outputs: Mapping[str, NDArray[Any]], layers: Sequence[str]) -> dict[str, LayerValues]:
    """What a cut graph said, layer by layer."""
    return {name: LayerValues(*(outputs[f"{name}/{what}"] for what in ("input", CODES, OUTPUT))) for name in layers}


def _quantizer(codes: ir.Value) -> ir.Node:
    """The QuantizeLinear behind ``codes``, possibly before a Clip."""
    node = codes.producer()
    while node is not None and node.op_type != "QuantizeLinear":
        source = node.inputs[0]
        node = source.producer() if source is not None else None
    if node is None:
        raise ExportError(f"{codes.name} is not the result of a QuantizeLinear")
    return node


def _quantized_value(codes: ir.Value) -> ir.Value:
    x = _quantizer(codes).inputs[0]
    if x is None:
        raise ExportError(f"{codes.name}: its QuantizeLinear has no input")
    return x
