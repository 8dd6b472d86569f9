"""Affine quantization on torch tensors: pure functions, all shapes broadcast.

``q = clip(round(x / scale) + zero_point, 0, 2^bits - 1)``, ``x^ = scale * (q - zero_point)``; rounding is half to
even. The independent NumPy statement of the same arithmetic is ``tests/support/oracle.py``.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dmq_export.layer import Scheme

SMALLEST_SCALE = 1e-8  # a range of zero (a dead channel) quantizes to exactly zero with any positive scale


class QParams(NamedTuple):
    """``scale > 0`` and integer ``zero_point`` (kept in a float tensor) of one shape."""

    scale: Tensor
    zero_point: Tensor


class Range(NamedTuple):
    """``low <= 0 <= high`` of one shape: every range includes zero, so that padding stays exact."""

    low: Tensor
    high: Tensor


def round_through(x: Tensor) -> Tensor:
    """Half-to-even rounding whose gradient is the identity (straight-through estimator)."""
    return x + (x.round() - x).detach() if x.requires_grad else x.round()


def choose_qparams(span: Range, bits: int, scheme: Scheme = "asymmetric") -> QParams:
    """The scale and zero point that cover ``span``.

    ``symmetric`` pins the zero point to the middle code ``2^(bits-1)``, so that ``q - zero_point`` is a signed
    integer with zero point 0. Differentiable in ``span``; the zero point's rounding passes gradients straight
    through.
    """
    if scheme == "symmetric":
        middle = 2 ** (bits - 1)
        scale = torch.maximum(-span.low, span.high) / (middle - 1)
        return QParams(scale.clamp(min=SMALLEST_SCALE), torch.full_like(scale, middle))
    levels = 2**bits - 1
    scale = ((span.high - span.low) / levels).clamp(min=SMALLEST_SCALE)
    return QParams(scale, round_through(-span.low / scale).clamp(0, levels))


def quantize(x: Tensor, qparams: QParams, bits: int) -> Tensor:
    """Integer codes ``0..2^bits-1`` (in a float tensor); gradients pass straight through the rounding."""
    scale, zero_point = qparams
    return (round_through(x / scale) + zero_point).clamp(0, 2**bits - 1)


def dequantize(codes: Tensor, qparams: QParams) -> Tensor:
    """What the codes stand for."""
    return qparams.scale * (codes - qparams.zero_point)


def fake_quantize(x: Tensor, qparams: QParams, bits: int) -> Tensor:
    """``x`` as it comes back from its codes."""
    return dequantize(quantize(x, qparams, bits), qparams)
