"""Rounds columns one after another, each told what those before it lost: the inner loop of second-order rounding.

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
    wanted: Tensor, reference: Tensor, coupling: Tensor, qparams: QParams, bits: int
) -> tuple[Tensor, Tensor]:
    """Codes ``[n, O]`` of ``wanted_k + sum_(j < k) lost_j coupling_jk``, and ``lost_k = reference_k - w^_k``.

    Args:
        wanted: columns ``[n, O]`` before anything is lost.
        reference: what a column loses is counted from here, ``[n, O]``.
        coupling: ``[n, n]``, of which only what lies above the diagonal counts.
        qparams: ``[n, O]``.
    """
    if wanted.is_cuda and why_no_kernel() is None:
        from calib.fit.column_rounding_triton import run_kernel

        return run_kernel(wanted, reference, coupling, qparams, bits)
    codes, lost = torch.empty_like(wanted), torch.empty_like(wanted)
    for k in range(len(codes)):
        column = QParams(qparams.scale[k], qparams.zero_point[k])
        codes[k] = quantize(torch.addmv(wanted[k], lost[:k].T, coupling[:k, k]), column, bits)
        lost[k] = reference[k] - dequantize(codes[k], column)
    return codes, lost
