"""Moves the LES and PTS factors of the quantized layers into what computes their inputs, wherever that is exact.

A layer needs ``x * 2^k / tau`` where the network computes ``x``. A factor per channel passes every operation that is
linear in that channel (shapes, sums, resizing, the value side of attention and of a gated activation) and ends in an
affine: a norm's, a float layer's rows, or the rows of another quantized layer, whose ``s_w`` and ``b`` it rescales. It
does not pass an activation function or a softmax, nor a value that something else reads too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.graph.fold_rules import BlockedError, FactorPath, factor_path, only_along
from dmq_export.graph.lower import layer_input, layer_nodes
from dmq_export.graph.lowered_layer import along
from dmq_export.layer import Float, QuantizedLayer


@dataclass(frozen=True)
class Folding:
    """What was moved.

    Attributes:
        layers: those of the checkpoint, with ``tau = 2^k`` where the factor left and ``s_w, b`` rescaled where one
            came in.
        input_factor: ``2^k / tau`` of the layers it left, ``[C]``.
        output_factor: what came into a layer, ``[O]``.
        stays: why the others' factors could not move; layers whose factor is one are in neither.
    """

    layers: tuple[QuantizedLayer, ...]
    input_factor: dict[str, Float]
    output_factor: dict[str, Float]
    stays: dict[str, str]


def fold_factors(model: ir.Model, layers: Sequence[QuantizedLayer]) -> Folding:
    """Fold what can be folded into the float part of ``model``, in place, and into ``layers``.

    Precondition: ``model`` has a ``dmq::Layer`` node for each of ``layers``. Postcondition: with every layer replaced
    by that of the result, the network computes what it did, up to float32 rounding.
    """
    by_name = {layer.spec.name: layer for layer in layers}
    nodes = layer_nodes(model)
    folded: dict[str, Float] = {}
    gained: dict[str, Float] = {}
    stays: dict[str, str] = {}
    readers: dict[int, tuple[ir.Value, list[str]]] = {}
    for name, node in nodes.items():
        x = layer_input(node)
        readers.setdefault(id(x), (x, []))[1].append(name)
    for x, names in readers.values():
        factors = [_factor(by_name[name]) for name in names]
        if all((factor == 1).all() for factor in factors):
            continue
        try:
            path = _path(x, [by_name[name] for name in names], factors)
            rows = {name: _rows(by_name[name], factor) for name, factor in path.layers.items()}
        except BlockedError as blocked:
            stays |= dict.fromkeys(names, str(blocked))
            continue
        path.apply()
        folded |= dict.fromkeys(names, factors[0].astype(np.float32))
        for name, factor in rows.items():
            gained[name] = (gained.get(name, np.float64(1)) * factor).astype(np.float32)
    rewritten = (_rewritten(layer, layer.spec.name in folded, gained.get(layer.spec.name)) for layer in layers)
    return Folding(tuple(rewritten), folded, gained, stays)


def _factor(layer: QuantizedLayer) -> NDArray[np.float64]:
    """``2^k / tau``, ``[C]``."""
    return np.ldexp(1 / layer.tau.astype(np.float64), layer.shift.astype(np.int32))


def _path(x: ir.Value, layers: list[QuantizedLayer], factors: list[NDArray[np.float64]]) -> FactorPath:
    """The way of the common factor of all that reads ``x`` into what computes it.

    Raises:
        BlockedError: there is none.
    """
    if any(len(layer.spec.parts) > 1 for layer in layers):
        raise BlockedError("its parts need different factors")
    if len(x.uses()) > len(layers) or x.is_graph_output():
        raise BlockedError("float operations read its input too")
    if any(not np.array_equal(factor, factors[0]) for factor in factors):
        raise BlockedError("layers that share its input have other factors")
    if x.shape is None:
        raise BlockedError("its input has no known rank")
    return factor_path(x, along(factors[0], x.shape.rank(), layers[0].spec.channel_axis))


def _rows(layer: QuantizedLayer, factor: NDArray[np.float64]) -> NDArray[np.float64]:
    """A factor on the layer's output as one per output channel, ``[O]``."""
    channels = only_along(factor, layer.spec.channel_axis, layer.spec.name)
    return np.broadcast_to(channels, layer.spec.out_channels)


def _rewritten(layer: QuantizedLayer, folded: bool, gained: Float | None) -> QuantizedLayer:
    if folded:
        layer = replace(layer, tau=np.exp2(layer.shift).astype(np.float32))
    if gained is not None:
        scale = (layer.weight_scale * gained).astype(np.float32)
        layer = replace(layer, weight_scale=scale, bias=None if layer.bias is None else layer.bias * gained)
    return layer
