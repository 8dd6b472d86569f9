"""The integer weight codes of one layer, by any rounding that needs no other layer."""

import torch
from torch import Tensor

from calib.fake_quant import QParams, dequantize, quantize
from calib.gptq import compensation, gptq_codes
from calib.layer_op import product, weight_columns, weight_matrix
from dmq_export.layer import LayerSpec

CHUNK = 3456  # 384 channels of a 3x3 convolution: moments of 46 MiB


def round_weight(
    spec: LayerSpec,
    weight: Tensor,
    qparams: QParams,
    patches: Tensor,
    *,
    learned: bool,
    tau: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Codes of ``weight = W * tau``, in its own shape.

    Args:
        qparams: ``[P, O]``.
        patches: of ``x``, ``[M, C, K]``; they decide only if ``learned``.
        learned: by second moments (:mod:`calib.gptq`) instead of to nearest.
        tau: what ``x`` is divided by, ``[C]``; None for nothing.
        chunk: columns whose second moments are held at once.
    """
    matrix = weight_matrix(spec, weight)
    columns = QParams(*(weight_columns(spec, values).expand_as(matrix) for values in qparams))
    if not learned:
        return quantize(matrix, columns, spec.bits.weight).view(weight.shape)
    rows, channels = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    codes = []
    for group in range(spec.groups):
        outputs, inputs = slice(group * rows, (group + 1) * rows), slice(group * channels, (group + 1) * channels)
        own = QParams(*(values[outputs] for values in columns))
        x = patches[:, inputs]
        divisor = None if tau is None else tau[inputs]
        codes.append(_rounded(matrix[outputs], own, x, divisor, spec.bits.weight, chunk))
    return torch.cat(codes).view(weight.shape)


def _rounded(matrix: Tensor, qparams: QParams, x: Tensor, tau: Tensor | None, bits: int, chunk: int) -> Tensor:
    """Codes ``[O, C, K]``, some channels after the other; each chunk makes up for the errors of those before it.

    The chunk's weights are first moved to where they best cancel the output error so far, ``W_b + H_b^-1 X_b^T R``.
    """
    width = max(1, chunk // matrix.shape[2])
    codes, residual = torch.empty_like(matrix), None
    for start in range(0, matrix.shape[1], width):
        channels = slice(start, start + width)
        flat = (x[:, channels] if tau is None else x[:, channels] / tau[channels, None]).flatten(1)
        part = matrix[:, channels].flatten(1)
        columns = QParams(*(values[:, channels].flatten(1) for values in qparams))
        moments = flat.T @ flat
        wanted = part if residual is None else part + compensation(moments, flat.T @ residual).T
        found = gptq_codes(wanted, columns, moments, bits)
        codes[:, channels] = found.view_as(codes[:, channels])
        if start + width < matrix.shape[1]:
            error = flat @ (part - dequantize(found, columns)).T
            residual = error if residual is None else residual + error
    return codes


def dequantized_weight(spec: LayerSpec, codes: Tensor, qparams: QParams) -> Tensor:
    """``w^ = s_w * (q_w - z_w)`` in the shape of ``codes [O, C / groups, *kernel]``."""
    columns = QParams(*(weight_columns(spec, values) for values in qparams))
    return dequantize(weight_matrix(spec, codes), columns).view(codes.shape)


def output_error(spec: LayerSpec, weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    """Squared output error of ``rounded`` against ``weight`` over the patches ``x``, as a share of the output's."""
    target = product(spec, x, weight_matrix(spec, weight))
    error = product(spec, x, weight_matrix(spec, rounded - weight))
    return float(error.square().sum() / target.square().sum().clamp(min=torch.finfo(x.dtype).tiny))
