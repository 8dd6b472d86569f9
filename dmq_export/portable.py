"""The portable graph: standard ONNX operators only, 4-bit weights, runs in ONNX Runtime on a CPU as it is.

A layer becomes::

    x - QuantizeLinear(tau*s*2^-k, z) - [Clip] - DequantizeLinear(s*2^-k, z) ---- Conv / MatMul - y
                                     W (UINT4) - DequantizeLinear(s_w, z_w) ---/

with per-channel scales on the activation, where the power-of-two steps stay visible. Tables with a row per step
are looked up by the ``timestep`` input, nearest calibrated step. Both halves of a split layer share the
activation nodes (their scales differ per channel) and join their dequantized weights before one operator.
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.builder import NodeBuilder
from dmq_export.errors import ExportError
from dmq_export.layer import LayerSpec, QuantizedLayer
from dmq_export.trace import DOMAIN

CODES, OUTPUT = "codes", "output"  # what every lowered layer calls its integer input and its result


def lower_portable(model: ir.Model, layers: tuple[QuantizedLayer, ...], timesteps: NDArray[np.float32]) -> None:
    """Replace every ``dmq::Layer`` node of ``model`` in place.

    Precondition: the ``layer`` attributes of these nodes name ``layers``, each once. Postcondition: no such node
    is left, and the values ``<layer>/codes`` and ``<layer>/output`` exist for each layer.

    Raises:
        ExportError: the precondition does not hold.
    """
    nodes = {node.attributes["layer"].as_string(): node for node in model.graph if node.domain == DOMAIN}
    by_name = {layer.spec.name: layer for layer in layers}
    if set(nodes) != set(by_name):
        odd = sorted(set(nodes) ^ set(by_name))[0]
        raise ExportError(f"layer {odd}: the traced graph and the checkpoint disagree on whether it exists")
    row = _step_row(model.graph, timesteps) if any(len(layer.scale) > 1 for layer in layers) else None
    for name, node in nodes.items():
        x, y = node.inputs[0], node.outputs[0]
        if x is None:
            raise ExportError(f"layer {name}: the traced graph gives it no input")
        builder = NodeBuilder(model.graph, name)
        output = _lower_layer(builder, by_name[name], x, row)
        output.shape, output.type = y.shape, y.type
        # not onnx_ir's replace_nodes_and_values: that gives the new output the old one's name
        ir.convenience.replace_all_uses_with(y, output)
        model.graph.insert_before(node, builder.nodes)
        model.graph.remove(node, safe=True)
    model.opset_imports.pop(DOMAIN, None)


def _step_row(graph: ir.Graph, timesteps: NDArray[np.float32]) -> ir.Value:
    """The row of the calibrated timestep nearest to the ``timestep`` input, the first of two equally near."""
    timestep = next(value for value in graph.inputs if value.name == "timestep")
    builder = NodeBuilder(graph, "step")
    difference = builder.op("Sub", [builder.constant("timesteps", timesteps), timestep], name="difference")
    distance = builder.op("Abs", [difference], name="distance")
    row = builder.op("ArgMin", [distance], {"axis": 0, "keepdims": 0}, name="row")
    graph.insert_before(graph[0], builder.nodes)
    return row


def _lower_layer(builder: NodeBuilder, layer: QuantizedLayer, x: ir.Value, row: ir.Value | None) -> ir.Value:
    spec = layer.spec
    axis = {"axis": _channel_axis(spec, x)}
    scale, input_scale, zero_point = _activation_qparams(builder, layer, row)
    codes_name = CODES if spec.bits.activation == 8 else "unclipped_codes"
    codes = builder.op("QuantizeLinear", [x, input_scale, zero_point], axis, name=codes_name)
    if spec.bits.activation < 8:
        largest = builder.constant("largest_code", np.array(2**spec.bits.activation - 1, np.uint8))
        codes = builder.op("Clip", [codes, None, largest], name=CODES)
    rounded = builder.op("DequantizeLinear", [codes, scale, zero_point], axis, name="rounded_input")
    return _operator(builder, layer, rounded)


def _channel_axis(spec: LayerSpec, x: ir.Value) -> int:
    """Axis of the channels in ``x``, counted from the front."""
    if x.shape is None:
        raise ExportError(f"layer {spec.name}: the traced graph does not know the rank of its input")
    return spec.channel_axis % x.shape.rank()


def _activation_qparams(
    builder: NodeBuilder, layer: QuantizedLayer, row: ir.Value | None
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """``s * 2^-k``, ``tau * s * 2^-k`` and ``z``, each ``[C]``, of the current step."""
    steps = np.ldexp(np.float32(1), -layer.shift.astype(np.int32)).astype(np.float32)
    if row is None or len(layer.scale) == 1:
        scale = np.repeat(layer.scale[0], layer.spec.parts) * steps
        return (
            builder.constant("scale", scale),
            builder.constant("input_scale", layer.tau * scale),
            builder.constant("zero_point", np.repeat(layer.zero_point[0], layer.spec.parts)),
        )
    scale = _of_step(builder, layer, "step_scale", layer.scale, row)
    if layer.shift.any():
        scale = builder.op("Mul", [scale, builder.constant("powers_of_two", steps)], name="scale")
    input_scale = builder.op("Mul", [builder.constant("tau", layer.tau), scale], name="input_scale")
    return scale, input_scale, _of_step(builder, layer, "zero_point", layer.zero_point, row)


def _of_step(builder: NodeBuilder, layer: QuantizedLayer, name: str, table: NDArray[Any], row: ir.Value) -> ir.Value:
    """The current row of ``table [T, P]``, spread over the channels ``[C]``."""
    parts = builder.op("Gather", [builder.constant(f"{name}_table", table), row], {"axis": 0}, name=f"{name}_parts")
    if len(layer.spec.parts) == 1:
        shape = builder.constant(f"{name}_shape", np.array([layer.spec.in_channels], np.int64))
        return builder.op("Expand", [parts, shape], name=name)
    part_of_channel = np.repeat(np.arange(len(layer.spec.parts), dtype=np.int32), layer.spec.parts)
    channels = builder.constant(f"{name}_part", part_of_channel)
    return builder.op("Gather", [parts, channels], {"axis": 0}, name=name)


def _operator(builder: NodeBuilder, layer: QuantizedLayer, x: ir.Value) -> ir.Value:
    """The float operator on the rounded input and the dequantized weights."""
    spec = layer.spec
    weight = _weight(builder, layer)
    bias = None if layer.bias is None else builder.constant("bias", layer.bias)
    if spec.kind == "linear":
        if bias is None:
            return builder.op("MatMul", [x, weight], name=OUTPUT)
        return builder.op("Add", [builder.op("MatMul", [x, weight], name="product"), bias], name=OUTPUT)
    attributes = {
        "kernel_shape": spec.kernel,
        "strides": spec.stride,
        "pads": (*spec.padding, *spec.padding),
        "dilations": spec.dilation,
        "group": spec.groups,
    }
    return builder.op("Conv", [x, weight] if bias is None else [x, weight, bias], attributes, name=OUTPUT)


def _weight(builder: NodeBuilder, layer: QuantizedLayer) -> ir.Value:
    """``w^``: ``[O, C / groups, *kernel]``, for a linear layer ``[C, O]``; parts joined along the inputs."""
    spec = layer.spec
    split = len(spec.parts) > 1
    pieces = [
        _dequantized(builder, layer, part, channels if split else slice(None), f"_{part}" if split else "")
        for part, channels in enumerate(spec.part_slices())
    ]
    if not split:
        return pieces[0]
    return builder.op("Concat", pieces, {"axis": 0 if spec.kind == "linear" else 1}, name="weight")


def _dequantized(builder: NodeBuilder, layer: QuantizedLayer, part: int, channels: slice, suffix: str) -> ir.Value:
    """``w^`` of one part."""
    linear, four_bits = layer.spec.kind == "linear", layer.spec.bits.weight <= 4
    container = ml_dtypes.uint4 if four_bits else np.uint8
    matrix = layer.codes[:, channels].T if linear else layer.codes[:, channels]
    codes = builder.constant(f"weight_codes{suffix}", matrix.view(container))  # a byte holds one code of either type
    zero_point = builder.constant(f"weight_zero_point{suffix}", layer.weight_zero_point[part].astype(container))
    scale = builder.constant(f"weight_scale{suffix}", layer.weight_scale[part])
    axis = {"axis": int(linear)}
    if four_bits or not linear:
        return builder.op("DequantizeLinear", [codes, scale, zero_point], axis, name=f"weight{suffix}")
    # ONNX Runtime (1.31) would fuse 8-bit weights into an integer MatMul that then refuses the activation's
    # zero point per channel; with the scale in a Mul of its own the arithmetic is the same and nothing fuses
    ones = builder.constant(f"weight_unit{suffix}", np.ones_like(layer.weight_scale[part]))
    steps = builder.op("DequantizeLinear", [codes, ones, zero_point], axis, name=f"weight_steps{suffix}")
    return builder.op("Mul", [steps, scale], name=f"weight{suffix}")
