"""Scale and zero point of the weights: the range whose rounding error is least (BRECQ's MSE grid)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from calib.quant.fake_quant import QParams, Range, choose_qparams, fake_quantize
from calib.quant.patches import split_parts, weight_matrix
from calib.record.layer_inputs import columns_of
from dmq_export.layer import LayerSpec

CANDIDATES = 80
SHRINK = 0.01  # per candidate
ERROR_EXPONENT = 2.4
COARSE_COLUMNS = 2304  # weights of a row: 256 channels of a 3x3 convolution
NEAR = 4  # candidates on either side of the best


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

    The error of a weight is ``|w^ - w|^2.4``, summed over a part's row. Of long rows evenly spaced channels are looked
    at first, and all of them only under the ranges next to the best of these.
    """
    span, parts = weight_range(spec, weight), split_parts(spec, weight_matrix(spec, weight))
    strides = [max(1, round(part[0].numel() / COARSE_COLUMNS)) for part in parts]
    few = [part[:, ::stride].contiguous() for part, stride in zip(parts, strides, strict=True)]
    every = [torch.full_like(span.low, candidate, dtype=torch.int64) for candidate in range(CANDIDATES)]
    best = _best(spec, span, few, every)
    if max(strides) > 1:
        near = [(best + step).clamp(0, CANDIDATES - 1) for step in range(-NEAR, NEAR + 1)]
        best = _best(spec, span, parts, near)
    return _shrunk(spec, span, best)


def _best(spec: LayerSpec, span: Range, parts: Sequence[Tensor], candidates: Sequence[Tensor]) -> Tensor:
    """The first candidate ``[P, O]`` of the least error of the parts ``[O, C, K]``."""
    best, least = candidates[0], torch.full_like(span.low, torch.inf)
    for candidate in candidates:
        qparams = _shrunk(spec, span, candidate)
        error = torch.stack(
            [_row_errors(part, QParams(*own), spec.bits.weight) for part, *own in zip(parts, *qparams, strict=True)]
        )
        best = torch.where(error < least, candidate, best)
        least = torch.minimum(error, least)
    return best


def _shrunk(spec: LayerSpec, span: Range, candidate: Tensor) -> QParams:
    shrinks = torch.tensor([1 - SHRINK * number for number in range(CANDIDATES)], dtype=torch.float64)
    shrink = shrinks.to(span.low)[candidate]
    return choose_qparams(Range(span.low * shrink, span.high * shrink), spec.bits.weight)


def _row_errors(part: Tensor, qparams: QParams, bits: int) -> Tensor:
    """``[O]`` of a part ``[O, C, K]`` under scales and zero points ``[O]``."""
    of_rows = QParams(*(values[:, None, None] for values in qparams))
    return (fake_quantize(part, of_rows, bits) - part).abs().pow(ERROR_EXPONENT).sum((1, 2))


def grid_nanoseconds(spec: LayerSpec) -> float:
    """Time of :func:`grid_qparams`, on the core that :func:`calib.fit.layer.fit_nanoseconds` was measured on."""
    columns = columns_of(spec)
    candidates = CANDIDATES * min(columns, COARSE_COLUMNS) + (2 * NEAR + 1) * max(columns - COARSE_COLUMNS, 0)
    return 5 * spec.out_channels * candidates
