"""The graphs that integer kernels execute: int8 weights, one constant scale per quantizer (TensorRT, OpenVINO).

A layer becomes, without what does not apply to it::

    x - Mul(ratio) - Mul(factor) - Pad - Add(shift) - Clip - Q - DQ -- Conv - Mul(rest) - Mul(gain) - Add
                                              W (INT8) - DQ(S) -/ product_bias -/

``S`` is the scale per output channel for OpenVINO; for TensorRT it is one power of two, and ``Mul(rest)`` is what the
scale of each channel is of it. ``Mul(factor)`` is there where the LES and PTS factors could not be folded;
``Mul(ratio)``, ``Mul(gain)`` and an ``Add`` of the bias where the scale has a row per step; ``Pad`` and ``Add(shift)``
where 8-bit codes are asymmetric and the kernel's zero point is fixed, and then ``product_bias`` takes most of the shift
out again; ``Clip`` where the codes take fewer than 8 bits. The parts of a split layer are quantized apart and their
products added. See ``docs/lowerings.md``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.graph.activation_codes import ActivationCodes, part_activation_codes
from dmq_export.graph.bias_correction import BiasCorrection, bias_correction
from dmq_export.graph.int8_weights import Int8Weights, lifted_weights
from dmq_export.graph.lower import CODES, OUTPUT, LowerLayer, channel_axis
from dmq_export.graph.lowered_layer import LoweredLayer
from dmq_export.graph.node_builder import NodeBuilder, conv_attributes
from dmq_export.graph.step_tables import StepTables
from dmq_export.layer import Float, LayerSpec, QuantizedLayer
from dmq_export.target import FloatType, Target

SCALED, STEPPED = "scaled", "stepped"  # the Mul of the LES and PTS factors, and that of the step's scale


def lower_integer(target: Target, dtype: FloatType = "float32") -> LowerLayer:
    """The lowering for ``target``, see :data:`dmq_export.graph.lower.LowerLayer`.

    Args:
        dtype: that the graph will be typed; the constants are chosen for it, still in float32.
    """

    def lower_layer(
        builder: NodeBuilder, layer: QuantizedLayer, x: ir.Value, tables: StepTables
    ) -> tuple[ir.Value, LoweredLayer]:
        parts = range(len(layer.spec.parts))
        part_weights = [lifted_weights(layer, part, target, dtype) for part in parts]
        activations = [part_activation_codes(layer, part, target, dtype) for part in parts]
        bias = bias_correction(layer, activations, part_weights, dtype)
        lowered = _lowered_layer(layer, activations, bias)
        steps = _Steps(builder, tables, layer.spec)
        inputs = _part_inputs(builder, layer.spec, x)
        pieces = map(_Part, lowered.suffixes, activations, part_weights, bias.inner)
        products = [_product(steps, lowered, part, given) for part, given in zip(pieces, inputs, strict=True)]
        return _sum(steps, products, bias.outer), lowered

    return lower_layer


@dataclass(frozen=True)
class _Part:
    """One part's numbers; ``suffix`` ends the names of its nodes, ``bias [O]`` is added to its product."""

    suffix: str
    activation: ActivationCodes
    weights: Int8Weights
    bias: Float | None


class _Steps:
    """Constants, and tables with a row per step, as values of the graph."""

    def __init__(self, builder: NodeBuilder, tables: StepTables, spec: LayerSpec) -> None:
        self.builder = builder
        self.tables = tables
        self.spatial = (1,) * len(spec.kernel)

    def value(self, name: str, table: Float) -> ir.Value:
        """The current row of ``table``, ``[T, n]`` or ``[T]``; it broadcasts over the channels of the input or output.

        Where it varies it has the rank of what it meets: OpenVINO keeps the channels last only then.
        """
        rows = table.reshape(len(table), -1)
        if rows.size == 1:
            return self.builder.constant(name, rows.reshape(()))
        if self.spatial:
            rows = rows.reshape(len(rows), 1, -1, *self.spatial)
        if len(rows) == 1:
            return self.builder.constant(name, rows[0])
        return self.tables.value(f"{self.builder.prefix}/{name}", rows)


def _lowered_layer(layer: QuantizedLayer, activations: list[ActivationCodes], bias: BiasCorrection) -> LoweredLayer:
    spec = layer.spec
    rows = len(layer.scale)
    shift = np.stack([np.broadcast_to(part.shift, rows) for part in activations], axis=1)
    return LoweredLayer(
        spec=spec,
        suffixes=("",) if len(activations) == 1 else tuple(f"_{part}" for part in range(len(activations))),
        container=activations[0].container,
        zero_point=layer.zero_point.astype(np.int32),
        offset=np.stack([np.broadcast_to(part.offset, rows) for part in activations], axis=1),
        shift=shift,
        cancelled=bias.added,
        left=bias.left,
        padding=spec.padding if shift.any() and any(spec.padding) else (),
    )


def _part_inputs(builder: NodeBuilder, spec: LayerSpec, x: ir.Value) -> list[ir.Value]:
    """What each part reads: where ``x`` was concatenated from just these, the pieces themselves."""
    if len(spec.parts) == 1:
        return [x]
    axis = channel_axis(spec, x)
    producer = x.producer()
    if producer is not None and producer.op_type == "Concat":
        pieces = [piece for piece in producer.inputs if piece is not None and piece.shape is not None]
        sizes = [piece.shape[axis] for piece in pieces if piece.shape is not None]
        if producer.attributes["axis"].as_int() % len(pieces[0].shape or ()) == axis and sizes == list(spec.parts):
            return pieces
    axes = builder.constant("channel_axis", np.array([axis], np.int64))
    slices = []
    for part, channels in enumerate(spec.part_slices()):
        ends = [
            builder.constant(f"{name}_{part}", np.array([end], np.int64))
            for name, end in (("first_channel", channels.start), ("end_channel", channels.stop))
        ]
        piece = builder.op("Slice", [x, *ends, axes], name=f"part_{part}")
        sizes = list(x.shape or ())
        sizes[axis] = spec.parts[part]
        piece.shape, piece.type = ir.Shape(sizes), x.type
        slices.append(piece)
    return slices


def _product(steps: _Steps, lowered: LoweredLayer, part: _Part, x: ir.Value) -> ir.Value:
    """One part's operator on its rounded input, in the units of the layer's output."""
    builder, spec, suffix = steps.builder, lowered.spec, part.suffix
    rounded = _rounded(steps, lowered, suffix, x, part.activation)
    linear = spec.kind == "linear"
    codes = builder.constant(f"weight_codes{suffix}", part.weights.codes.T if linear else part.weights.codes)
    scale = builder.constant(f"weight_scale{suffix}", part.weights.scale)
    axis = {"axis": int(linear)} if part.weights.scale.ndim else {}
    weight = builder.op("DequantizeLinear", [codes, scale], axis, name=f"weight{suffix}")
    if linear:
        product = builder.op("MatMul", [rounded, weight], name=f"product{suffix}")
    else:
        padding = (0,) * len(spec.padding) if lowered.padding else spec.padding
        bias = [] if part.bias is None else [builder.constant(f"product_bias{suffix}", part.bias)]
        product = builder.op("Conv", [rounded, weight, *bias], conv_attributes(spec, padding), name=f"product{suffix}")
    return _gained(steps, part, product)


def _gained(steps: _Steps, part: _Part, product: ir.Value) -> ir.Value:
    """The product times the gain of its weights, by output channel, and that of its codes, by step."""
    gains = {"rescaled": ("rest", part.weights.gain[None]), "gained": ("gain", part.activation.gain)}
    for node, (name, gain) in gains.items():
        if (gain != 1).any():
            factor = steps.value(f"{name}{part.suffix}", gain)
            product = steps.builder.op("Mul", [product, factor], name=f"{node}{part.suffix}")
    return product


def _rounded(steps: _Steps, lowered: LoweredLayer, suffix: str, x: ir.Value, activation: ActivationCodes) -> ir.Value:
    """``x / tau * 2^k`` rounded to the part's codes and back, in steps of the constant scale."""
    builder, scale = steps.builder, activation.scale
    if (activation.ratio != 1).any():  # before the factor: a runtime folds a constant per channel into the quantizer
        x = builder.op("Mul", [x, steps.value(f"ratio{suffix}", activation.ratio)], name=f"{STEPPED}{suffix}")
    # OpenVINO (2026.4) loses constant bounds between a factor per channel and the quantizer
    early = activation.container is np.uint8 and activation.bounds is not None and len(activation.bounds) == 1
    if early:
        x = _clipped(steps, suffix, x, activation, 1 / activation.factor.astype(np.float64))
    if (activation.factor != 1).any():
        factor = steps.value(f"factor{suffix}", activation.factor[None])
        x = builder.op("Mul", [x, factor], name=f"{SCALED}{suffix}")
    if lowered.padding:
        sides = (0, 0, *lowered.padding)
        pads = builder.constant(f"pads{suffix}", np.array([*sides, *sides], np.int64))
        x = builder.op("Pad", [x, pads], name=f"padded{suffix}")
    if activation.shift.any():
        shift = steps.value(f"shift{suffix}", (activation.shift * scale).astype(np.float32))
        x = builder.op("Add", [x, shift], name=f"shifted{suffix}")
    if activation.bounds is not None and not early:
        x = _clipped(steps, suffix, x, activation, np.ones(1))
    qparams = [
        builder.constant(f"scale{suffix}", np.asarray(scale)),
        builder.constant(f"zero_point{suffix}", np.array(activation.zero_point, activation.container)),
    ]
    codes = builder.op("QuantizeLinear", [x, *qparams], name=f"{CODES}{suffix}")
    return builder.op("DequantizeLinear", [codes, *qparams], name=f"rounded_input{suffix}")


def _clipped(
    steps: _Steps, suffix: str, x: ir.Value, activation: ActivationCodes, unit: NDArray[np.float64]
) -> ir.Value:
    """``x`` within the bounds, in steps of ``scale * unit``; ``unit`` is ``[C]`` or ``[1]``."""
    assert activation.bounds is not None
    builder = steps.builder
    ends = [
        (activation.bounds[:, side, None] * (float(activation.scale) * unit)).astype(np.float32) for side in range(2)
    ]
    low, high = (steps.value(f"{name}{suffix}", end) for name, end in zip(("lowest", "highest"), ends, strict=True))
    if activation.container is np.int8 and len(activation.bounds) == 1:
        return builder.op("Clip", [x, low, high], name=f"clipped{suffix}")
    # Clip takes scalars; these are rows of a table, or one per channel
    raised = builder.op("Max", [x, low], name=f"raised{suffix}")
    return builder.op("Min", [raised, high], name=f"clipped{suffix}")


def _sum(steps: _Steps, products: list[ir.Value], bias: Float | None) -> ir.Value:
    """The parts' products and the bias, the last node called ``<layer>/output``."""
    builder, total = steps.builder, products[-1]
    for product in products[:-1]:
        total = builder.op("Add", [product, total], name="sum")
    if bias is not None:
        total = builder.op("Add", [total, steps.value("bias", bias)], name="biased")
    return builder.renamed(total, OUTPUT)
