"""The graphs that integer kernels execute: int8 carriers, one constant scale per quantizer (TensorRT, OpenVINO).

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

from dmq_export.graph.activation_codes import Encoding, part_encoding
from dmq_export.graph.bias_correction import Correction, correction
from dmq_export.graph.int8_weights import Carrier, part_carrier
from dmq_export.graph.lower import CODES, OUTPUT, LowerLayer, channel_axis
from dmq_export.graph.lowered_layer import LayerForm
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
    ) -> tuple[ir.Value, LayerForm]:
        parts = range(len(layer.spec.parts))
        carriers = [part_carrier(layer, part, target, dtype) for part in parts]
        encodings = [part_encoding(layer, part, target, dtype) for part in parts]
        bias = correction(layer, encodings, carriers, dtype)
        form = _form(layer, encodings, bias)
        steps = _Steps(builder, tables, layer.spec)
        inputs = _part_inputs(builder, layer.spec, x)
        pieces = map(_Part, form.suffixes, encodings, carriers, bias.inner)
        products = [_product(steps, form, part, given) for part, given in zip(pieces, inputs, strict=True)]
        return _sum(steps, products, bias.outer), form

    return lower_layer


@dataclass(frozen=True)
class _Part:
    """One part's numbers; ``suffix`` ends the names of its nodes, ``bias [O]`` is added to its product."""

    suffix: str
    encoding: Encoding
    carrier: Carrier
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


def _form(layer: QuantizedLayer, encodings: list[Encoding], bias: Correction) -> LayerForm:
    spec = layer.spec
    rows = len(layer.scale)
    shift = np.stack([np.broadcast_to(part.shift, rows) for part in encodings], axis=1)
    return LayerForm(
        spec=spec,
        suffixes=("",) if len(encodings) == 1 else tuple(f"_{part}" for part in range(len(encodings))),
        container=encodings[0].container,
        zero_point=layer.zero_point.astype(np.int32),
        offset=np.stack([np.broadcast_to(part.offset, rows) for part in encodings], axis=1),
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


def _product(steps: _Steps, form: LayerForm, part: _Part, x: ir.Value) -> ir.Value:
    """One part's operator on its rounded input, in the units of the layer's output."""
    builder, spec, suffix = steps.builder, form.spec, part.suffix
    rounded = _rounded(steps, form, suffix, x, part.encoding)
    linear = spec.kind == "linear"
    codes = builder.constant(f"weight_codes{suffix}", part.carrier.codes.T if linear else part.carrier.codes)
    scale = builder.constant(f"weight_scale{suffix}", part.carrier.scale)
    axis = {"axis": int(linear)} if part.carrier.scale.ndim else {}
    weight = builder.op("DequantizeLinear", [codes, scale], axis, name=f"weight{suffix}")
    if linear:
        product = builder.op("MatMul", [rounded, weight], name=f"product{suffix}")
    else:
        padding = (0,) * len(spec.padding) if form.padding else spec.padding
        bias = [] if part.bias is None else [builder.constant(f"product_bias{suffix}", part.bias)]
        product = builder.op("Conv", [rounded, weight, *bias], conv_attributes(spec, padding), name=f"product{suffix}")
    return _gained(steps, part, product)


def _gained(steps: _Steps, part: _Part, product: ir.Value) -> ir.Value:
    """The product times the gain of its weights, by output channel, and that of its codes, by step."""
    gains = {"rescaled": ("rest", part.carrier.gain[None]), "gained": ("gain", part.encoding.gain)}
    for node, (name, gain) in gains.items():
        if (gain != 1).any():
            factor = steps.value(f"{name}{part.suffix}", gain)
            product = steps.builder.op("Mul", [product, factor], name=f"{node}{part.suffix}")
    return product


def _rounded(steps: _Steps, form: LayerForm, suffix: str, x: ir.Value, encoding: Encoding) -> ir.Value:
    """``x / tau * 2^k`` rounded to the part's codes and back, in steps of the constant scale."""
    builder, scale = steps.builder, encoding.scale
    if (encoding.ratio != 1).any():  # before the factor: a runtime folds a constant per channel into the quantizer
        x = builder.op("Mul", [x, steps.value(f"ratio{suffix}", encoding.ratio)], name=f"{STEPPED}{suffix}")
    # OpenVINO (2026.4) loses constant bounds between a factor per channel and the quantizer
    early = encoding.container is np.uint8 and encoding.bounds is not None and len(encoding.bounds) == 1
    if early:
        x = _clipped(steps, form, suffix, x, encoding, 1 / encoding.factor.astype(np.float64))
    if (encoding.factor != 1).any():
        factor = steps.value(f"factor{suffix}", encoding.factor[None])
        x = builder.op("Mul", [x, factor], name=f"{SCALED}{suffix}")
    if form.padding:
        sides = (0, 0, *form.padding)
        pads = builder.constant(f"pads{suffix}", np.array([*sides, *sides], np.int64))
        x = builder.op("Pad", [x, pads], name=f"padded{suffix}")
    if encoding.shift.any():
        shift = steps.value(f"shift{suffix}", (encoding.shift * scale).astype(np.float32))
        x = builder.op("Add", [x, shift], name=f"shifted{suffix}")
    if encoding.bounds is not None and not early:
        x = _clipped(steps, form, suffix, x, encoding, np.ones(1))
    qparams = [
        builder.constant(f"scale{suffix}", np.asarray(scale)),
        builder.constant(f"zero_point{suffix}", np.array(encoding.zero_point, encoding.container)),
    ]
    codes = builder.op("QuantizeLinear", [x, *qparams], name=f"{CODES}{suffix}")
    return builder.op("DequantizeLinear", [codes, *qparams], name=f"rounded_input{suffix}")


def _clipped(
    steps: _Steps, form: LayerForm, suffix: str, x: ir.Value, encoding: Encoding, unit: NDArray[np.float64]
) -> ir.Value:
    """``x`` within the bounds, in steps of ``scale * unit``; ``unit`` is ``[C]`` or ``[1]``."""
    assert encoding.bounds is not None
    builder = steps.builder
    ends = [(encoding.bounds[:, side, None] * (float(encoding.scale) * unit)).astype(np.float32) for side in range(2)]
    low, high = (steps.value(f"{name}{suffix}", end) for name, end in zip(("lowest", "highest"), ends, strict=True))
    if encoding.container is np.int8 and len(encoding.bounds) == 1:
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
