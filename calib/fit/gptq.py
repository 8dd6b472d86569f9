"""Learned rounding in closed form: each weight's rounding error is made up for by the weights still unrounded.

Optimal Brain Surgeon as in GPTQ (Frantar et al. 2023), columns in order of falling activation energy, then
coordinate descent on the same quadratic: seconds where AdaRound takes hours, from the same second moments.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from calib.fit.column_rounding import round_columns
from calib.quant.fake_quant import QParams, dequantize

DAMPING = 0.01  # of the mean diagonal, added to the diagonal
BLOCK = 64  # columns between updates of all the columns to come
SWEEPS = 2  # of coordinate descent


class _Columns(NamedTuple):
    """A weight ``[O, n]`` and the scale and zero point of each of its numbers, column by column: ``[n, O]``."""

    weight: Tensor
    scale: Tensor
    zero_point: Tensor

    def qparams(self, columns: slice = slice(None)) -> QParams:
        """What quantizes these columns."""
        return QParams(self.scale[columns], self.zero_point[columns])

    def ordered(self, order: Tensor) -> "_Columns":
        return _Columns(*(values[order] for values in self))


def gptq_codes(weight: Tensor, qparams: QParams, moments: Tensor, bits: int) -> Tensor:
    """Integer codes ``[O, n]`` that keep ``|| (W - W^) X ||^2`` small.

    Args:
        weight: ``[O, n]``.
        qparams: scale and zero point of every weight, ``[O, n]``.
        moments: ``X X^T``, ``[n, n]``.
    """
    damped, _ = _damped(moments)
    columns = _Columns(*(values.T.contiguous() for values in (weight, *qparams)))
    order = damped.diagonal().argsort(descending=True, stable=True)
    codes = _obs_round(columns.ordered(order), damped[order][:, order], bits)[order.argsort()]
    for _ in range(SWEEPS):
        _sweep(columns, codes, damped, bits)
    return codes.T.contiguous()


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


def _obs_round(columns: _Columns, moments: Tensor, bits: int) -> Tensor:
    """Codes ``[n, O]``: column by column, each moved first to where it best makes up for the errors of those before.

    With ``H = (1 + U) D (1 + U)^T``, ``U`` strictly upper triangular, column ``k`` moves by ``(W - W^) U[:, k]``: what
    Optimal Brain Surgeon does (Chee et al. 2023, QuIP, theorem 6), without the inverse of ``H``.
    """
    feedback = _unit_upper(moments)
    codes, errors = torch.empty_like(columns.weight), torch.empty_like(columns.weight)
    for block in _blocks(len(codes)):
        weight, before = columns.weight[block], slice(block.start)
        moved = weight + feedback[before, block].T @ errors[before]
        codes[block], errors[block] = round_columns(moved, weight, feedback[block, block], columns.qparams(block), bits)
    return codes


def _unit_upper(moments: Tensor) -> Tensor:
    """``1 + U`` of ``H = (1 + U) D (1 + U)^T``: Cholesky's factor of the matrix read backwards."""
    lower: Tensor = torch.linalg.cholesky(moments.flip(0, 1))
    lower /= lower.diagonal().clone()
    return lower.flip(0, 1)


def _sweep(columns: _Columns, codes: Tensor, moments: Tensor, bits: int) -> None:
    """Set each column's ``codes [n, O]`` in turn to the best given all the others; never increases the error.

    The best is where the gradient ``H (W - W^)`` becomes zero. It is kept up to date within a block of columns, and
    over all columns once per block: the same steps, with most of the work in matrix products.
    """
    gradient = moments @ (columns.weight - dequantize(codes, columns.qparams()))
    for block in _blocks(len(codes)):
        current, curvature = dequantize(codes[block], columns.qparams(block)), moments.diagonal()[block]
        codes[block], error = round_columns(
            current + gradient[block] / curvature[:, None],
            current,
            moments[block, block] / curvature,
            columns.qparams(block),
            bits,
        )
        gradient += moments[:, block] @ error


def _blocks(columns: int) -> list[slice]:
    return [slice(start, min(start + BLOCK, columns)) for start in range(0, columns, BLOCK)]


def gptq_nanoseconds(columns: int, outputs: int, chunk: int) -> float:
    """Time of :func:`gptq_codes` for ``columns``, ``chunk`` at a time: one by one, the factors, products with these."""
    return 28e3 * (1 + SWEEPS) * columns + 0.019 * columns * chunk**2 / 3 + 0.25 * columns * chunk * outputs
