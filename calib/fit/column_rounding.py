"""Rounds columns one after another, with feedback of the errors before: the inner loop of second-order rounding.

A column is too little work for a GPU, which spends its time on starting operations; there, one kernel does all columns
(:mod:`calib.fit.column_rounding_triton`), each output's by itself.
"""

from functools import cache

import torch
from torch import Tensor

from calib.quant.fake_quant import QParams, dequantize, quantize


@cache
def why_no_kernel() -> str | None:
    """What keeps the kernel from running on this machine's GPU; None if nothing does, or there is no GPU."""
    if not torch.cuda.is_available():
        return None
    try:
        from calib.fit.column_rounding_triton import run_kernel

        one = torch.ones(1, 1, device="cuda")
        run_kernel(one, one, one, QParams(one, one), 4)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # no Triton, no C compiler for what starts its kernels, a GPU it does not know
        return " ".join(str(error).split()) or type(error).__name__
    return None


def round_columns(
    target: Tensor, reference: Tensor, feedback: Tensor, qparams: QParams, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes ``[n, O]`` of ``target_k + sum_(j < k) error_j feedback_jk``, and ``error_k = reference_k - w^_k``.

    Args:
        target: columns ``[n, O]`` without any feedback.
        reference: a column's error is its distance from here, ``[n, O]``.
        feedback: how much of an error, by row, each later column takes over, ``[n, n]``; what lies on and below the
            diagonal does not count.
        qparams: ``[n, O]``.
    """
    if target.is_cuda and why_no_kernel() is None:
        from calib.fit.column_rounding_triton import run_kernel

        return run_kernel(target, reference, feedback, qparams, bits)
    codes, errors = torch.empty_like(target), torch.empty_like(target)
    for k in range(len(codes)):
        column = QParams(qparams.scale[k], qparams.zero_point[k])
        codes[k] = quantize(torch.addmv(target[k], errors[:k].T, feedback[:k, k]), column, bits)
        errors[k] = reference[k] - dequantize(codes[k], column)
    return codes, errors
