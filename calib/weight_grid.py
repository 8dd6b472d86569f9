"""Scale and zero point of the weights: the range whose rounding error is least (BRECQ's MSE grid)."""

import torch
from torch import Tensor

from calib.fake_quant import QParams, Range, choose_qparams, fake_quantize
from calib.layer_op import split_parts, weight_columns, weight_matrix
from dmq_export.layer import LayerSpec

CANDIDATES = 80
SHRINK = 0.01  # per candidate
ERROR_EXPONENT = 2.4


def weight_range(spec: LayerSpec, weight: Tensor) -> Range:
    """Smallest and largest weight per part and output channel, zero included, ``[P, O]``.

    Differentiable in ``weight [O, C / groups, *kernel]``.
    """
    matrix = weight_matrix(spec, weight)
    parts = split_parts(spec, matrix)
    low = torch.stack([part.amin((1, 2)) for part in parts])
    high = torch.stack([part.amax((1, 2)) for part in parts])
    return Range(low.clamp(max=0), high.clamp(min=0))


def minmax_qparams(spec: LayerSpec, weight: Tensor) -> QParams:
    """Scale and zero point that cover every weight, ``[P, O]``."""
    return choose_qparams(weight_range(spec, weight), spec.bits.weight)


def grid_qparams(spec: LayerSpec, weight: Tensor) -> QParams:
    """The best of :data:`CANDIDATES` ranges shrunk by 1 % each, per part and output channel, ``[P, O]``.

    The error of a weight is ``|w^ - w|^2.4``, summed over a part's row.
    """
    span = weight_range(spec, weight)
    best = choose_qparams(span, spec.bits.weight)
    least = torch.full_like(span.low, torch.inf)
    for candidate in range(CANDIDATES):
        shrink = 1 - SHRINK * candidate
        qparams = choose_qparams(Range(span.low * shrink, span.high * shrink), spec.bits.weight)
        error = _row_errors(spec, weight, qparams)
        better = error < least
        least = torch.where(better, error, least)
        best = QParams(*(torch.where(better, new, old) for new, old in zip(qparams, best, strict=True)))
    return best


def _row_errors(spec: LayerSpec, weight: Tensor, qparams: QParams) -> Tensor:
    matrix = weight_matrix(spec, weight)
    columns = QParams(*(weight_columns(spec, values) for values in qparams))
    error = (fake_quantize(matrix, columns, spec.bits.weight) - matrix).abs().pow(ERROR_EXPONENT)
    return torch.stack([part.sum((1, 2)) for part in split_parts(spec, error)])
