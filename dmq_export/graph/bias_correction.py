"""What the shifts of a layer's codes add to its products, and where that is taken out again.

A part rounded ``shift_t`` steps off gives ``gain_t * (op(x^, w) + s * shift_t * sum(w))``, where ``gain_t [O]`` is the
gain of its codes (:mod:`dmq_export.graph.activation_codes`) times that of its weights
(:mod:`dmq_export.graph.int8_weights`). The second term is often several times the first, so whatever rounds the sum of
both loses as many times more of the first than it should: in float16 that is seen. A convolution adds its bias before
it rounds. It therefore takes out the middle of the term's range over the steps; only what varies around that, and what
rounding took from that constant itself, is left to the addition behind the gain.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmq_export.graph.activation_codes import ActivationCodes, collapsed
from dmq_export.graph.float16 import held
from dmq_export.graph.int8_weights import Int8Weights
from dmq_export.layer import Float, QuantizedLayer
from dmq_export.target import FloatType


@dataclass(frozen=True)
class BiasCorrection:
    """Two additions; ``O`` outputs, ``T`` steps (1 where nothing varies).

    Attributes:
        inner: by part, added to its product before the gains, ``[O]``; None for nothing.
        outer: added to the sum of the parts, ``[T, O]``; None for nothing.
        added: largest magnitude of what the shifts add to the sum, ``[T]``.
        left: largest magnitude of what ``outer`` takes out because of them, ``[T]``.
    """

    inner: tuple[Float | None, ...]
    outer: Float | None
    added: NDArray[np.float64]
    left: NDArray[np.float64]


def bias_correction(
    layer: QuantizedLayer, activations: Sequence[ActivationCodes], part_weights: Sequence[Int8Weights], dtype: FloatType
) -> BiasCorrection:
    """The additions that make the sum of the parts' products the layer's output, bias included.

    Args:
        activations: of the parts, with the numbers that a graph of ``dtype`` holds, as the ``part_weights``.
    """
    terms = [_term(activation, weights) for activation, weights in zip(activations, part_weights, strict=True)]
    gains = [
        activation.gain.astype(np.float64)[:, None] * weights.gain
        for activation, weights in zip(activations, part_weights, strict=True)
    ]
    total = _sum(gains, terms)
    bias = np.zeros(layer.spec.out_channels) if layer.bias is None else layer.bias.astype(np.float64)
    inner = [np.zeros_like(bias) for _ in terms]
    if layer.spec.kind != "linear":  # MatMul has no bias
        inner = [held(-(term.min(0) + term.max(0)) / 2, dtype).astype(np.float64) for term in terms]
    left = total + _sum(gains, inner)
    static = len(total) == 1 and all((gain == 1).all() for gain in gains)
    exact = dtype == "float32" or not total.any()
    if layer.spec.kind != "linear" and static and exact:  # one addition is enough
        inner[-1], bias, left = inner[-1] - left[0] + bias, np.zeros_like(bias), np.zeros_like(left)
    outer = collapsed((bias - left).astype(np.float32))
    return BiasCorrection(
        inner=tuple(values.astype(np.float32) if values.any() else None for values in inner),
        outer=outer if outer.any() else None,
        added=np.abs(total).max(axis=1),
        left=np.abs(left).max(axis=1),
    )


def _sum(gains: Sequence[NDArray[np.float64]], values: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """``sum_p gain_p * values_p``, ``[T, O]``."""
    products = [gain * value for gain, value in zip(gains, values, strict=True)]
    return np.asarray(np.sum(np.stack(np.broadcast_arrays(*products)), axis=0))


def _term(activation: ActivationCodes, weights: Int8Weights) -> NDArray[np.float64]:
    """``s * shift_t * sum(w)`` before the gains, ``[T, O]``."""
    return float(activation.scale) * activation.shift[:, None] * weights.sums()
