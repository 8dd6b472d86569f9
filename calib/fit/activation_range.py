"""From a layer's extrema to the range its activation quantizer covers, step by step."""

import torch
from torch import Tensor

from calib.quant.fake_quant import QParams, Range, choose_qparams, fake_quantize
from calib.quant.patches import expand_parts, product, weight_matrix
from calib.record.layer_inputs import Extrema, LayerInputs
from dmq_export.layer import LayerSpec

CLIP_FACTORS = tuple(1 - 0.05 * step for step in range(1, 13))  # 0.95 .. 0.40
CLIP_PATIENCE = 2


def activation_range(spec: LayerSpec, extrema: Extrema, tau: Tensor, *, static: bool) -> Range:
    """The range of ``x / tau`` per step and part, ``[T, P]``, or over all steps, ``[1, P]``.

    Each step's range starts fresh and averages the extrema of small groups of samples: like a moving average
    it does not follow a single outlier, but it does not depend on the order of the samples. Exact for any
    ``tau``, since the extrema are kept per channel. Differentiable in ``tau``.
    """
    low = torch.split(extrema.low / tau, list(spec.parts), dim=-1)
    high = torch.split(extrema.high / tau, list(spec.parts), dim=-1)
    lows = torch.stack([part.amin(-1).mean(0) for part in low], dim=-1)
    highs = torch.stack([part.amax(-1).mean(0) for part in high], dim=-1)
    if static:
        lows, highs = lows.amin(0, keepdim=True), highs.amax(0, keepdim=True)
    return Range(lows.clamp(max=0), highs.clamp(min=0))


def clip_range(spec: LayerSpec, weight: Tensor, inputs: LayerInputs, tau: Tensor, span: Range) -> Range:
    """``span`` shrunk by the factors that lose least of the layer's output, one pair per part.

    Both ends are shrunk together first, then each on its own, in steps of 5 % until :data:`CLIP_PATIENCE` in a row
    do not help. One factor serves all steps: there are too few patches of a single step to choose for it alone.

    Args:
        weight: ``W * tau``, ``[O, C / groups, *kernel]``.
    """
    x, step = inputs.patches / tau[:, None], inputs.step
    matrix = weight_matrix(spec, weight)

    def loss(candidate: Range) -> Tensor:
        qparams = choose_qparams(candidate, spec.bits.activation, spec.scheme)
        rounded = quantized_patches(spec, x, step, qparams)
        return product(spec, rounded - x, matrix).square().sum()

    best, least = span, loss(span).item()
    for part in range(len(spec.parts)):
        for ends in ((True, True), (True, False), (False, True)):
            start, in_vain = best, 0
            for factor in CLIP_FACTORS:
                candidate = _shrunk(start, part, factor, ends)
                error = loss(candidate).item()
                best, least, in_vain = (candidate, error, 0) if error < least else (best, least, in_vain + 1)
                if in_vain == CLIP_PATIENCE:
                    break
    return best


def quantized_patches(spec: LayerSpec, x: Tensor, step: Tensor, qparams: QParams) -> Tensor:
    """``x / tau`` patches ``[M, C, K]`` of rows at ``step [M]`` after fake quantization by tables ``[T, P]``."""
    rows = step if len(qparams.scale) > 1 else torch.zeros_like(step)
    scale, zero_point = (expand_parts(spec, table)[rows] for table in qparams)
    return fake_quantize(x, QParams(scale[..., None], zero_point[..., None]), spec.bits.activation)


def _shrunk(span: Range, part: int, factor: float, ends: tuple[bool, bool]) -> Range:
    low, high = span.low.clone(), span.high.clone()
    if ends[0]:
        low[:, part] *= factor
    if ends[1]:
        high[:, part] *= factor
    return Range(low, high)
