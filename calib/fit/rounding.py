"""The integer weight codes of one layer, by any rounding that needs no other layer."""

import torch
from torch import Tensor

from calib.device import FLOAT_BYTES
from calib.fit.gptq import compensation, gptq_codes, gptq_nanoseconds
from calib.fit.weight_range import minmax_qparams
from calib.quant.fake_quant import QParams, dequantize, quantize
from calib.quant.patches import weight_columns, weight_matrix
from calib.quant.second_moments import SecondMoments
from calib.record.layer_inputs import columns_of, patch_rows
from dmq_export.layer import LayerSpec

CHUNK = 3456  # 384 channels of a 3x3 convolution: moments of 46 MiB
GAIN_OUTPUTS = 64  # output channels that the gain of learned rounding is estimated on, in each of
GAIN_GROUPS = 8  # groups


def round_weight(
    spec: LayerSpec,
    weight: Tensor,
    qparams: QParams,
    moments: SecondMoments,
    *,
    learned: bool,
    tau: Tensor | None = None,
    chunk: int = CHUNK,
) -> Tensor:
    """Codes of ``weight = W * tau``, in its own shape.

    Args:
        qparams: ``[P, O]``.
        moments: of the layer's patches; they decide only if ``learned``.
        learned: by second moments (:mod:`calib.fit.gptq`) instead of to nearest.
        tau: what the patches are divided by, ``[C]``; None for nothing.
        chunk: columns whose second moments are held at once.
    """
    matrix = weight_matrix(spec, weight)
    columns = _columns(spec, qparams, matrix)
    if not learned:
        return quantize(matrix, columns, spec.bits.weight).view(weight.shape)
    rows, channels = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    codes = []
    for group in range(spec.groups):
        outputs = slice(group * rows, (group + 1) * rows)
        own = QParams(*(values[outputs] for values in columns))
        codes.append(_rounded(matrix[outputs], own, moments, group * channels, tau, spec.bits.weight, chunk))
    return torch.cat(codes).view(weight.shape)


def _rounded(
    matrix: Tensor, qparams: QParams, moments: SecondMoments, first: int, tau: Tensor | None, bits: int, chunk: int
) -> Tensor:
    """Codes ``[O, C, K]``, some channels after the other; each chunk makes up for the errors of those before it.

    The chunk's weights are first moved to where they best cancel the output error so far, ``W_b + H_b^-1 X_b^T R``.

    Args:
        first: which of the layer's channels is the matrix's first.
    """
    width, end = max(1, chunk // matrix.shape[2]), matrix.shape[1]
    codes, residual = torch.empty_like(matrix), None
    for start in range(0, end, width):
        own = slice(start, min(start + width, end))
        channels = slice(first + own.start, first + own.stop)
        part = matrix[:, own].flatten(1)
        columns = QParams(*(values[:, own].flatten(1) for values in qparams))
        of_channels, wanted = moments.of(channels, tau), part
        if residual is not None:
            wanted = part + compensation(of_channels, moments.columns(channels, tau).T @ residual).T
        found = gptq_codes(wanted, columns, of_channels, bits)
        codes[:, own] = found.view_as(codes[:, own])
        if own.stop < end:
            error = moments.columns(channels, tau) @ (part - dequantize(found, columns)).T
            residual = error if residual is None else residual + error
    return codes


def learned_gain(spec: LayerSpec, weight: Tensor, moments: SecondMoments) -> float:
    """Squared output error of learned rounding over that of rounding to nearest, both on min-max ranges, at most 1.

    Estimated on some outputs, of some groups, and on the channels of the first chunk.
    """
    rows, channels = spec.out_channels // spec.groups, spec.in_channels // spec.groups
    matrix = weight_matrix(spec, weight)
    columns = _columns(spec, minmax_qparams(spec, weight), matrix)
    width = min(channels, max(1, CHUNK // matrix.shape[2]))
    learned = nearest = 0.0
    for group in range(0, spec.groups, max(1, spec.groups // GAIN_GROUPS)):
        outputs = slice(group * rows, (group + 1) * rows, max(1, rows // GAIN_OUTPUTS))
        part = matrix[outputs, :width].flatten(1)
        qparams, bits = QParams(*(values[outputs, :width].flatten(1) for values in columns)), spec.bits.weight
        of_channels = moments.of(slice(group * channels, group * channels + width))
        learned += _quadratic(part, gptq_codes(part, qparams, of_channels, bits), qparams, of_channels)
        nearest += _quadratic(part, quantize(part, qparams, bits), qparams, of_channels)
    return min(learned / nearest, 1.0) if nearest > 0 else 1.0


def _columns(spec: LayerSpec, qparams: QParams, matrix: Tensor) -> QParams:
    """``[P, O]`` as one value for each of the matrix ``[O, C / groups, K]``."""
    return QParams(*(weight_columns(spec, values).expand_as(matrix) for values in qparams))


def _quadratic(weight: Tensor, codes: Tensor, qparams: QParams, moments: Tensor) -> float:
    """``|| (W - W^) X ||^2`` of weights ``[O, n]``, from ``X X^T [n, n]``."""
    lost = weight - dequantize(codes, qparams)
    return float((lost @ moments * lost).sum())


def rounding_nanoseconds(spec: LayerSpec) -> float:
    """Time of learned rounding and of its gain: the second moments, then each group, some of them twice."""
    columns, groups, outputs = columns_of(spec), spec.groups, spec.out_channels // spec.groups
    chunk = min(columns, CHUNK)
    return (
        0.025 * groups * patch_rows(spec) * columns * chunk / 2
        + groups * gptq_nanoseconds(columns, outputs, chunk)
        + min(groups, GAIN_GROUPS) * gptq_nanoseconds(columns, min(outputs, GAIN_OUTPUTS), chunk)
    )


def rounding_bytes(spec: LayerSpec) -> int:
    """Memory of learned rounding: a chunk's moments with their factors or its patches, outputs, weights."""
    columns, rows = columns_of(spec), patch_rows(spec)
    chunk = min(columns, CHUNK)
    weights, outputs = spec.out_channels * (5 * columns + 12 * chunk), 2 * rows * spec.out_channels
    # the chunk's patches are gone when its moments are factored
    return FLOAT_BYTES * (max(6 * chunk**2, 2 * chunk**2 + 2 * rows * chunk) + outputs + weights)
