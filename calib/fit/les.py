"""Learned Equivalent Scaling: per input channel, how much of the difficulty moves from activation to weight.

DMQ, section 3.1: ``Y = (X / tau)(tau^T * W)``; ``tau`` is learned layer by layer on the float inputs so that the
quantized product stays close to the float one. ``tau = exp(theta)`` keeps it positive.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from calib.device import FLOAT_BYTES
from calib.fit.activation_range import activation_range, quantized_patches
from calib.fit.cuda_graph import CudaGraph
from calib.fit.weight_range import minmax_qparams
from calib.fit.weighting import TimestepWeights
from calib.quant.fake_quant import QParams, choose_qparams, fake_quantize
from calib.quant.patches import product, tau_columns, weight_columns, weight_matrix
from calib.record.layer_inputs import LayerInputs, columns_of
from dmq_export.layer import LayerSpec

LES_OUTPUTS = 128  # output channels that an iteration looks at


@dataclass(frozen=True)
class LesSettings:
    """Hyper-parameters of the fit; Adam with a cosine decay to zero.

    Attributes:
        batch: patches per iteration.
        alpha: exponent of the adaptive timestep weight; 0 weighs all steps alike.
        momentum: of the moving average of each step's loss.
    """

    iterations: int
    learning_rate: float
    batch: int
    alpha: float
    momentum: float = 0.95


@dataclass(frozen=True)
class LesResult:
    """What the fit found.

    Attributes:
        tau: ``[C]``.
        step_loss: ``Lambda [T]`` at the end.
        step_weight: ``lambda [T]`` at the end.
    """

    tau: Tensor
    step_loss: Tensor
    step_weight: Tensor


def fit_les(
    spec: LayerSpec,
    weight: Tensor,
    inputs: LayerInputs,
    settings: LesSettings,
    *,
    static: bool,
    rounding_gain: float,
    seed: int,
) -> LesResult:
    """Learn ``tau [C]`` of one layer.

    The loss of a patch is ``|| (x^ - x / tau) W tau ||^2 + g || x / tau (w^ - W tau) ||^2``: the paper's squared
    output error without the product of the two errors, which averages out, and with the weight's share scaled
    by ``g`` = ``rounding_gain``, because the weights will not be rounded to nearest as the fit assumes
    but by a learned rounding that loses ``g`` times as much. ``g = 1`` is the paper's balance.

    Args:
        weight: ``W``, ``[O, C / groups, *kernel]``.
        static: one activation range for all steps.
        rounding_gain: squared output error of the rounding to come over that of rounding to nearest.
        seed: of the batches.
    """
    device = weight.device
    steps = inputs.extrema.low.shape[1]
    step_weights = TimestepWeights(steps, alpha=settings.alpha, momentum=settings.momentum, device=device)
    theta = torch.zeros(spec.in_channels, device=device, requires_grad=True)
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.Adam([theta], capturable=device.type == "cuda")
    optimizer.param_groups[0]["lr"] = rate  # a tensor, since a replay does not see a number change

    def improve(pick: Tensor, outputs: Tensor) -> None:
        part = replace(spec, out_channels=len(outputs))
        loss = _row_losses(part, weight[outputs], inputs, pick, theta.exp(), static, rounding_gain)
        weighted = (loss * step_weights.update(loss, inputs.step[pick])).mean()
        optimizer.zero_grad()
        weighted.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    iteration = CudaGraph(improve, device)
    for number, (pick, outputs) in enumerate(_draws(spec, len(inputs.patches), settings, seed)):
        rate.fill_(settings.learning_rate * (1 + math.cos(math.pi * number / settings.iterations)) / 2)
        iteration(pick.to(device, non_blocking=True), outputs.to(device, non_blocking=True))
    return LesResult(theta.detach().exp(), step_weights.average, step_weights.weights())


def _draws(spec: LayerSpec, patches: int, settings: LesSettings, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each iteration, the patches and the output channels that it looks at.

    Of many outputs, :data:`LES_OUTPUTS` are drawn: each has its own range, and the loss is their mean.
    """
    generator = torch.Generator().manual_seed(seed)
    every = torch.arange(spec.out_channels)
    for _ in range(settings.iterations):
        pick = torch.randint(patches, (settings.batch,), generator=generator)
        if spec.groups > 1 or spec.out_channels <= LES_OUTPUTS:
            yield pick, every
        else:
            yield pick, torch.randperm(spec.out_channels, generator=generator)[:LES_OUTPUTS]


def _row_losses(
    spec: LayerSpec,
    weight: Tensor,
    inputs: LayerInputs,
    pick: Tensor,
    tau: Tensor,
    static: bool,
    rounding_gain: float,
) -> Tensor:
    """Squared output errors ``[B]`` of the picked patches under ``tau``."""
    x = inputs.patches[pick] / tau[:, None]
    span = activation_range(spec, inputs.extrema, tau, static=static)
    qparams = choose_qparams(span, spec.bits.activation, spec.scheme)
    rounded = quantized_patches(spec, x, inputs.step[pick], qparams)
    scaled = weight_matrix(spec, weight) * tau_columns(spec, tau)
    weight_qparams = minmax_qparams(spec, scaled)
    columns = QParams(*(weight_columns(spec, values) for values in weight_qparams))
    weight_error = fake_quantize(scaled, columns, spec.bits.weight) - scaled
    activation_loss = product(spec, rounded - x, scaled).square().mean(1)
    return activation_loss + rounding_gain * product(spec, x, weight_error).square().mean(1)


def les_numbers(spec: LayerSpec, batch: int) -> int:
    """What an iteration goes through and takes time in proportion to: numbers of patches and of weights."""
    return columns_of(spec) * (spec.groups * batch + min(spec.out_channels, LES_OUTPUTS))


def les_bytes(spec: LayerSpec, batch: int) -> int:
    """Memory of an iteration: some of the patches and of the weights, what is made of these, and gradients."""
    return FLOAT_BYTES * 14 * columns_of(spec) * (batch + min(spec.out_channels, LES_OUTPUTS))
