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

from dmq_export.graph.lower import CODES, OUTPUT, channel_axis
from dmq_export.graph.lowered_layer import LoweredLayer, plainly_lowered
from dmq_export.graph.node_builder import NodeBuilder, conv_attributes
from dmq_export.graph.step_tables import StepTables
from dmq_export.layer import QuantizedLayer


def lower_portable(
    builder: NodeBuilder, layer: QuantizedLayer, x: ir.Value, steps: StepTables
) -> tuple[ir.Value, LoweredLayer]:
    """The nodes of one layer, see :data:`dmq_export.graph.lower.LowerLayer`."""
    spec = layer.spec
    axis = {"axis": channel_axis(spec, x)}
    scale, input_scale, zero_point = _activation_qparams(builder, layer, steps)
    codes_name = CODES if spec.bits.activation == 8 else "unclipped_codes"
    codes = builder.op("QuantizeLinear", [x, input_scale, zero_point], axis, name=codes_name)
    if spec.bits.activation < 8:
        largest = builder.constant("largest_code", np.array(2**spec.bits.activation - 1, np.uint8))
        codes = builder.op("Clip", [codes, None, largest], name=CODES)
    rounded = builder.op("DequantizeLinear", [codes, scale, zero_point], axis, name="rounded_input")
    return _operator(builder, layer, rounded), plainly_lowered(layer)


def _activation_qparams(
    builder: NodeBuilder, layer: QuantizedLayer, steps: StepTables
) -> tuple[ir.Value, ir.Value, ir.Value]:
    """``s * 2^-k``, ``tau * s * 2^-k`` and ``z``, each ``[C]``, of the current step."""
    powers = np.ldexp(np.float32(1), -layer.shift.astype(np.int32)).astype(np.float32)
    if len(layer.scale) == 1:
        scale = np.repeat(layer.scale[0], layer.spec.parts) * powers
        return (
            builder.constant("scale", scale),
            builder.constant("input_scale", layer.tau * scale),
            builder.constant("zero_point", np.repeat(layer.zero_point[0], layer.spec.parts)),
        )
    scale = _of_step(builder, layer, "step_scale", layer.scale, steps.row)
    if layer.shift.any():
        scale = builder.op("Mul", [scale, builder.constant("powers_of_two", powers)], name="scale")
    input_scale = builder.op("Mul", [builder.constant("tau", layer.tau), scale], name="input_scale")
    return scale, input_scale, _of_step(builder, layer, "zero_point", layer.zero_point, steps.row)


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
    inputs = [x, weight] if bias is None else [x, weight, bias]
    return builder.op("Conv", inputs, conv_attributes(spec, spec.padding), name=OUTPUT)


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
