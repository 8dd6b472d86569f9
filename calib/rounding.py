"""The integer weight codes of one layer, by any rounding that needs no other layer."""

import torch
from torch import Tensor

from calib.fake_quant import QParams, dequantize, quantize
from calib.gptq import gptq_codes
from calib.layer_op import product, weight_columns, weight_matrix
from dmq_export.layer import LayerSpec


def round_weight(spec: LayerSpec, weight: Tensor, qparams: QParams, x: Tensor, *, learned: bool) -> Tensor:
    """Codes of ``weight = W * tau``, in its own shape.

    Args:
        qparams: ``[P, O]``.
        x: patches of ``x / tau``, ``[M, C, K]``; they decide only if ``learned``.
        learned: by second moments (:mod:`calib.gptq`) instead of to nearest.
    """
    matrix = weight_matrix(spec, weight)
    columns = QParams(*(weight_columns(spec, values).expand_as(matrix) for values in qparams))
    if not learned:
        return quantize(matrix, columns, spec.bits.weight).view(weight.shape)
    rows = spec.out_channels // spec.groups
    codes = []
    for group, patches in enumerate(x.chunk(spec.groups, dim=1)):
        outputs = slice(group * rows, (group + 1) * rows)
        flat = patches.flatten(1)
        flat_columns = QParams(*(values[outputs].flatten(1) for values in columns))
        codes.append(gptq_codes(matrix[outputs].flatten(1), flat_columns, flat.T @ flat, spec.bits.weight))
    return torch.cat(codes).view(weight.shape)


def dequantized_weight(spec: LayerSpec, codes: Tensor, qparams: QParams) -> Tensor:
    """``w^ = s_w * (q_w - z_w)`` in the shape of ``codes [O, C / groups, *kernel]``."""
    columns = QParams(*(weight_columns(spec, values) for values in qparams))
    return dequantize(weight_matrix(spec, codes), columns).view(codes.shape)


def output_error(spec: LayerSpec, weight: Tensor, rounded: Tensor, x: Tensor) -> float:
    """Squared output error of ``rounded`` against ``weight`` over the patches ``x``, as a share of the output's."""
    target = product(spec, x, weight_matrix(spec, weight))
    error = product(spec, x, weight_matrix(spec, rounded - weight))
    return float(error.square().sum() / target.square().sum().clamp(min=torch.finfo(x.dtype).tiny))
