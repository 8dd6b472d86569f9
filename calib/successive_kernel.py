"""The kernel of :mod:`calib.successive` for GPUs, in Triton, which comes with PyTorch's CUDA builds for Linux."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from calib.quant.fake_quant import QParams

WIDTH = 16  # outputs of one program: many small programs, since each is a chain as long as there are columns
WARPS = 2
# added and taken away again, it rounds a float32 half to even; what is too large for that is clipped anyway
ROUNDER = tl.constexpr(1.5 * 2.0**23)


def run_kernel(
    wanted: Tensor, reference: Tensor, coupling: Tensor, qparams: QParams, bits: int
) -> tuple[Tensor, Tensor]:
    """As :func:`calib.successive.round_successively`, in float32."""
    rows, outputs = wanted.shape
    read = [values.contiguous() for values in (wanted, reference, coupling.T, *qparams)]
    codes, lost = torch.empty_like(read[0]), torch.empty_like(read[0])
    _round_columns[(triton.cdiv(outputs, WIDTH),)](
        *read,
        codes,
        lost,
        rows,
        outputs,
        2.0**bits - 1,
        ROWS=triton.next_power_of_2(rows),
        WIDTH=WIDTH,
        num_warps=WARPS,
        enable_fp_fusion=False,  # the default differs between versions of Triton
    )
    return codes, lost


@triton.jit  # type: ignore[untyped-decorator]
def _round_columns(  # type: ignore[no-untyped-def]
    wanted,
    reference,
    coupling,
    scale,
    zero_point,
    codes,
    lost,
    rows,
    outputs,
    top,
    ROWS: tl.constexpr,  # noqa: N803 - Triton's constants are written so
    WIDTH: tl.constexpr,  # noqa: N803
):
    output = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = output < outputs
    row = tl.arange(0, ROWS)
    lost_so_far = tl.zeros([ROWS, WIDTH], tl.float32)
    for k in range(rows):
        at = k * outputs + output
        factors = tl.load(coupling + k * rows + row, mask=row < rows, other=0.0)  # lost_so_far is zero from row k on
        value = tl.load(wanted + at, mask=inside, other=0.0) + tl.sum(lost_so_far * factors[:, None], 0)
        step = tl.load(scale + at, mask=inside, other=1.0)
        zero = tl.load(zero_point + at, mask=inside, other=0.0)
        code = (tl.math.div_rn(value, step) + ROUNDER) - ROUNDER + zero
        code = tl.minimum(tl.maximum(code, 0.0), top)
        error = tl.load(reference + at, mask=inside, other=0.0) - step * (code - zero)
        tl.store(codes + at, code, mask=inside)
        tl.store(lost + at, error, mask=inside)
        lost_so_far = tl.where((row == k)[:, None], error[None, :], lost_so_far)
