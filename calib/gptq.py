"""Learned rounding in closed form: each weight's rounding error is made up for by the weights still unrounded.

Optimal Brain Surgeon as in GPTQ (Frantar et al. 2023), columns in order of falling activation energy, then
coordinate descent on the same quadratic: seconds where AdaRound takes hours, from the same second moments.
"""

import torch
from torch import Tensor

from calib.fake_quant import QParams, quantize

DAMPING = 0.01  # of the mean diagonal, added to the diagonal
BLOCK = 64  # columns between updates of all the columns to come
SWEEPS = 2  # of coordinate descent


def gptq_codes(weight: Tensor, qparams: QParams, moments: Tensor, bits: int) -> Tensor:
    """Integer codes ``[O, n]`` that keep ``|| (W - W^) X ||^2`` small.

    Args:
        weight: ``[O, n]``.
        qparams: scale and zero point of every weight, ``[O, n]``.
        moments: ``X X^T``, ``[n, n]``.
    """
    damped, _ = _damped(moments)
    order = damped.diagonal().argsort(descending=True, stable=True)
    back = order.argsort()
    ordered = QParams(qparams.scale[:, order], qparams.zero_point[:, order])
    codes = _surgeon(weight[:, order], ordered, damped[order][:, order], bits)[:, back]
    for _ in range(SWEEPS):
        codes = _sweep(weight, codes, qparams, damped, bits)
    return codes


def compensation(moments: Tensor, correlation: Tensor) -> Tensor:
    """The change of weights ``[n, O]`` that best makes an output error vanish: ``(X X^T)^-1 X R``.

    Args:
        moments: ``X X^T``, ``[n, n]``.
        correlation: ``X R``, ``[n, O]``, of the inputs with the error.
    """
    damped, unit = _damped(moments)
    return torch.cholesky_solve(correlation / unit, torch.linalg.cholesky(damped))


def _damped(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Moments over their mean diagonal, damped, and that mean; inputs that are always zero leave the damping alone."""
    unit = moments.diagonal().mean().clamp(min=torch.finfo(moments.dtype).tiny)
    damped = moments / unit
    damped.diagonal().add_(DAMPING)
    return damped, unit


def _surgeon(weight: Tensor, qparams: QParams, moments: Tensor, bits: int) -> Tensor:
    """Round column by column, spreading each column's error over the columns to its right."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments))
    upper = torch.linalg.cholesky(inverse, upper=True)
    rest, codes = weight.clone(), torch.empty_like(weight)
    columns = weight.shape[1]
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        errors = torch.empty_like(rest[:, start:stop])
        for i in range(start, stop):
            scale, zero_point = qparams.scale[:, i], qparams.zero_point[:, i]
            codes[:, i] = quantize(rest[:, i], QParams(scale, zero_point), bits)
            error = (rest[:, i] - scale * (codes[:, i] - zero_point)) / upper[i, i]
            rest[:, i:stop] -= error[:, None] * upper[i, i:stop]
            errors[:, i - start] = error
        rest[:, stop:] -= errors @ upper[start:stop, stop:]
    return codes


def _sweep(weight: Tensor, codes: Tensor, qparams: QParams, moments: Tensor, bits: int) -> Tensor:
    """Set each column in turn to its best codes given all the others; never increases the error.

    The gradient is kept up to date within a block of columns, and over all columns once per block: the same steps,
    with most of the work in matrix products.
    """
    codes = codes.clone()
    gradient = (weight - qparams.scale * (codes - qparams.zero_point)) @ moments
    for start in range(0, weight.shape[1], BLOCK):
        block = slice(start, min(start + BLOCK, weight.shape[1]))
        own = QParams(*(values[:, block] for values in qparams))
        changes = _sweep_block(codes[:, block], gradient[:, block].clone(), own, moments[block, block], bits)
        gradient -= changes @ moments[block]
    return codes


def _sweep_block(codes: Tensor, gradient: Tensor, qparams: QParams, moments: Tensor, bits: int) -> Tensor:
    """Sweep some columns, changing their ``codes [O, b]`` in place; returns the changes of the weights."""
    changes = torch.empty_like(gradient)
    for i in range(codes.shape[1]):
        column = QParams(qparams.scale[:, i], qparams.zero_point[:, i])
        current = column.scale * (codes[:, i] - column.zero_point)
        best = quantize(current + gradient[:, i] / moments[i, i], column, bits)
        changes[:, i] = column.scale * (best - codes[:, i])
        codes[:, i] = best
        gradient -= changes[:, i, None] * moments[i]
    return changes
