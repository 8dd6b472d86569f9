"""A Conv or Linear as a matrix product, so that every fit below works on one shape.

An output position of a convolution sees one *patch* of the input, ``[C, K]`` with ``K`` kernel taps; a linear
layer is the case ``K = 1``. Patches taken at a few random positions estimate any squared output error without
the whole feature map, and zero padding needs no care because quantization keeps zero exact.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calib.quant.fake_quant import QParams, dequantize
from dmq_export.layer import LayerSpec


def weight_matrix(spec: LayerSpec, weight: Tensor) -> Tensor:
    """``[O, C / groups, *kernel]`` to ``[O, C / groups, K]``."""
    return weight.reshape(spec.out_channels, spec.in_channels // spec.groups, -1)


def apply_op(spec: LayerSpec, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The float operator: ``x [N, C, ...]`` or ``[..., C]``, ``weight [O, C / groups, *kernel]``."""
    if spec.kind == "linear":
        return F.linear(x, weight, bias)
    convolve = F.conv1d if spec.kind == "conv1d" else F.conv2d
    return convolve(x, weight, bias, spec.stride, spec.padding, spec.dilation, spec.groups)


def product(spec: LayerSpec, patches: Tensor, weight: Tensor) -> Tensor:
    """Outputs without bias: ``patches [M, C, K]`` times ``weight [O, C / groups, K]`` to ``[M, O]``."""
    if spec.groups == 1:
        return patches.flatten(1) @ weight.flatten(1).T
    grouped = patches.reshape(len(patches), spec.groups, -1)
    rows = weight.reshape(spec.groups, spec.out_channels // spec.groups, -1)
    return torch.einsum("mgk,gok->mgo", grouped, rows).flatten(1)


def draw_positions(spec: LayerSpec, shape: Sequence[int], count: int, generator: torch.Generator) -> Tensor:
    """``count`` random output positions of every sample, ``[N, count, axes]``; a linear layer's are token numbers.

    Args:
        shape: of the layer's input, ``[N, C, ...]`` or ``[N, ..., C]``.
        generator: on the CPU, so that the positions do not depend on the device.
    """
    if spec.kind == "linear":
        outputs = [math.prod(shape[1:-1])]
    else:
        reaches = [d * (k - 1) for d, k in zip(spec.dilation, spec.kernel, strict=True)]
        room = zip(shape[2:], spec.padding, reaches, spec.stride, strict=True)
        outputs = [(size + 2 * pad - reach - 1) // stride + 1 for size, pad, reach, stride in room]
    return torch.stack([torch.randint(n, (shape[0], count), generator=generator) for n in outputs], dim=-1)


def take_patches(spec: LayerSpec, x: Tensor, positions: Tensor) -> Tensor:
    """The patches under ``positions [N, count, axes]``, ``[N * count, C, K]``.

    Args:
        x: the layer's input, ``[N, C, ...]`` or ``[N, ..., C]``.
    """
    positions = positions.to(x.device, non_blocking=True)  # so that a GPU need not come to rest
    samples = torch.arange(len(x), device=x.device)
    if spec.kind == "linear":
        tokens = x.reshape(len(x), -1, spec.in_channels)
        return tokens[samples[:, None], positions[..., 0]].reshape(-1, spec.in_channels, 1)
    axes, count = len(spec.kernel), positions.shape[1]
    sides = [(p, p) for p in reversed(spec.padding)]
    padded = F.pad(x, [pad for pair in sides for pad in pair])
    index: list[Tensor | slice] = [samples.view(-1, 1, *[1] * axes), slice(None)]
    for axis in range(axes):
        start = positions[..., axis] * spec.stride[axis]
        taps = torch.arange(spec.kernel[axis], device=x.device) * spec.dilation[axis]
        shape = [1] * axes
        shape[axis] = -1
        index.append(start.view(len(x), count, *[1] * axes) + taps.view(shape))
    patches = padded[tuple(index)]  # [N, count, *kernel, C]: the channel slice goes last
    return patches.movedim(-1, 2).reshape(len(x) * count, spec.in_channels, -1)


def expand_parts(spec: LayerSpec, values: Tensor) -> Tensor:
    """One value per part to one per input channel, along the last axis: ``[..., P]`` to ``[..., C]``."""
    parts = zip(torch.split(values, 1, dim=-1), spec.parts, strict=True)
    return torch.cat([value.expand(*value.shape[:-1], size) for value, size in parts], dim=-1)


def split_parts(spec: LayerSpec, matrix: Tensor) -> tuple[Tensor, ...]:
    """The columns of each part: ``[O, C / groups, K]`` to ``P`` times ``[O, C_p / groups, K]``."""
    return torch.split(matrix, list(spec.parts), dim=1) if len(spec.parts) > 1 else (matrix,)


def weight_columns(spec: LayerSpec, values: Tensor) -> Tensor:
    """Values per part and output ``[P, O]`` so that they broadcast over ``[O, C / groups, K]``."""
    if len(spec.parts) == 1:
        return values[0][:, None, None]
    return expand_parts(spec, values.T)[:, :, None]


def tau_columns(spec: LayerSpec, tau: Tensor) -> Tensor:
    """LES factors ``[C]`` so that they broadcast over the weight ``[O, C / groups, K]``.

    Output ``o`` of a grouped convolution reads only the channels of its group.
    """
    if spec.groups == 1:
        return tau[None, :, None]
    per_group = tau.view(spec.groups, -1)
    return per_group.repeat_interleave(spec.out_channels // spec.groups, dim=0)[:, :, None]


def scaled_weight(spec: LayerSpec, weight: Tensor, tau: Tensor) -> Tensor:
    """``W * tau`` in the weight's own shape."""
    return (weight_matrix(spec, weight) * tau_columns(spec, tau)).view(weight.shape)


def dequantized_weight(spec: LayerSpec, codes: Tensor, qparams: QParams) -> Tensor:
    """``w^ = s_w * (q_w - z_w)`` in the shape of ``codes [O, C / groups, *kernel]``."""
    columns = QParams(*(weight_columns(spec, values) for values in qparams))
    return dequantize(weight_matrix(spec, codes), columns).view(codes.shape)


def weight_of(module: nn.Module) -> Tensor:
    """The weight of a Conv or Linear, detached and contiguous."""
    weight: Tensor = module.get_parameter("weight")
    return weight.detach().contiguous()
