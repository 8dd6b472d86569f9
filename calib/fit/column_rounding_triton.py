"""The kernel of :mod:`calib.fit.column_rounding`, in Triton, which comes with PyTorch's CUDA builds for Linux."""

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
    target: Tensor, reference: Tensor, feedback: Tensor, qparams: QParams, bits: int
) -> tuple[Tensor, Tensor]:
    """As :func:`calib.fit.column_rounding.round_columns`, in float32."""
    rows, outputs = target.shape
    read = [values.contiguous() for values in (target, reference, feedback.T, *qparams)]
    codes, errors = torch.empty_like(read[0]), torch.empty_like(read[0])
    _kernel[(triton.cdiv(outputs, WIDTH),)](
        *read,
        codes,
        errors,
        rows,
        outputs,
        2.0**bits - 1,
        ROWS=triton.next_power_of_2(rows),
        WIDTH=WIDTH,
        num_warps=WARPS,
        enable_fp_fusion=False,  # the default differs between versions of Triton
    )
    return codes, errors


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    target,
    reference,
    feedback,
    scale,
    zero_point,
    codes,
    errors,
    rows,
    outputs,
    top,
    ROWS: tl.constexpr,  # noqa: N803 - Triton's constants are written so
    WIDTH: tl.constexpr,  # noqa: N803
):
    output = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    inside = output < outputs
    row = tl.arange(0, ROWS)
    errors_so_far = tl.zeros([ROWS, WIDTH], tl.float32)
    for k in range(rows):
        at = k * outputs + output
        factors = tl.load(feedback + k * rows + row, mask=row < rows, other=0.0)  # errors_so_far is zero from row k on
        value = tl.load(target + at, mask=inside, other=0.0) + tl.sum(errors_so_far * factors[:, None], 0)
        step = tl.load(scale + at, mask=inside, other=1.0)
        zero = tl.load(zero_point + at, mask=inside, other=0.0)
        code = (tl.math.div_rn(value, step) + ROUNDER) - ROUNDER + zero
        code = tl.minimum(tl.maximum(code, 0.0), top)
        error = tl.load(reference + at, mask=inside, other=0.0) - step * (code - zero)
        tl.store(codes + at, code, mask=inside)
        tl.store(errors + at, error, mask=inside)
        errors_so_far = tl.where((row == k)[:, None], error[None, :], errors_so_far)
