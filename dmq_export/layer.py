"""A quantized layer: what is known of it before calibration, and the numbers calibration gives it.

The arithmetic is that of ``docs/arithmetic.md``. For input channels ``c``, output channels ``o``, step ``t``::

    q_x = clip(round(x / (tau_c * s_t * 2^-k_c)) + z_t, 0, 2^na - 1)     x^ = s_t * 2^-k_c * (q_x - z_t)
    w^  = s_w * (q_w - z_w)                                              y  = op(x^, w^) + b
"""

import math
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dmq_export.bits import Bits
from dmq_export.errors import CheckpointError

Kind = Literal["conv1d", "conv2d", "linear"]
Scheme = Literal["asymmetric", "symmetric"]
Float = NDArray[np.float32]
Integer = NDArray[np.uint8]


@dataclass(frozen=True)
class LayerSpec:
    """The shape of a quantized layer.

    Attributes:
        name: module name in the diffusers model.
        kind: which operator it is.
        out_channels: ``O``.
        parts: input channels of each independently quantized part; their sum is ``C``. A shortcut that reads
            ``concat(h, skip)`` has two, everything else one.
        kernel: spatial extent of the weight, empty for a linear layer.
        stride, padding, dilation: one number per spatial axis, empty for a linear layer.
        groups: of a convolution; 1 where there are two parts.
        bits: of weights and activations.
        scheme: ``symmetric`` pins the activation zero point to the middle code ``2^(na-1)``.
    """

    name: str
    kind: Kind
    out_channels: int
    parts: tuple[int, ...]
    bits: Bits
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    scheme: Scheme = "asymmetric"

    def __post_init__(self) -> None:
        if self.groups < 1 or self.in_channels % self.groups or self.out_channels % self.groups:
            raise CheckpointError(
                f"layer {self.name}: {self.in_channels} inputs and {self.out_channels} outputs do not make "
                f"{self.groups} groups"
            )

    @property
    def in_channels(self) -> int:
        return sum(self.parts)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """``[O, C / groups, *kernel]``."""
        return (self.out_channels, self.in_channels // self.groups, *self.kernel)

    @property
    def weight_count(self) -> int:
        return math.prod(self.weight_shape)

    @property
    def channel_axis(self) -> int:
        """Axis of the input's channels: 1 for ``[N, C, ...]``, last for ``[..., C]``."""
        return -1 if self.kind == "linear" else 1

    def part_slices(self) -> list[slice]:
        """Where each part lies along the input channels."""
        ends = list(accumulate(self.parts))
        return [slice(end - size, end) for end, size in zip(ends, self.parts, strict=True)]


@dataclass(frozen=True)
class QuantizedLayer:
    """The fitted numbers of one layer; ``P`` parts, ``T`` steps (1 if static).

    Attributes:
        spec: its shape.
        codes: ``q_w``, ``[O, C / groups, *kernel]``.
        weight_scale: ``s_w > 0``, ``[P, O]``.
        weight_zero_point: ``z_w``, ``[P, O]``.
        tau: LES factors ``> 0``, ``[C]``.
        shift: PTS exponents ``k`` in 0..3, ``[C]``.
        scale: activation scales ``s > 0``, ``[T, P]``.
        zero_point: activation zero points ``z``, ``[T, P]``.
        bias: ``b``, ``[O]``, or None.

    Raises:
        CheckpointError: a shape or a value is outside what is stated here.
    """

    spec: LayerSpec
    codes: Integer
    weight_scale: Float
    weight_zero_point: Integer
    tau: Float
    shift: Integer
    scale: Float
    zero_point: Integer
    bias: Float | None

    def __post_init__(self) -> None:
        self._check_shapes()
        spec = self.spec
        for name in ("weight_scale", "tau", "scale"):
            value = getattr(self, name)
            if not (np.isfinite(value) & (value > 0)).all():
                raise CheckpointError(f"layer {spec.name}: {name} must be finite and positive everywhere")
        limits = {
            "codes": 2**spec.bits.weight - 1,
            "weight_zero_point": 2**spec.bits.weight - 1,
            "zero_point": 2**spec.bits.activation - 1,
            "shift": 3,
        }
        for name, limit in limits.items():
            largest = int(getattr(self, name).max())
            if largest > limit:
                raise CheckpointError(f"layer {spec.name}: {name} is {largest}, at most {limit} is allowed")

        middle = 2 ** (spec.bits.activation - 1)
        if spec.scheme == "symmetric" and (self.zero_point != middle).any():
            raise CheckpointError(f"layer {spec.name}: a symmetric layer's zero points must be {middle}")
        if self.bias is not None and not np.isfinite(self.bias).all():
            raise CheckpointError(f"layer {spec.name}: bias must be finite")

    def _check_shapes(self) -> None:
        spec, parts, steps = self.spec, len(self.spec.parts), len(self.scale)
        expected: dict[str, tuple[tuple[int, ...], type]] = {
            "codes": (spec.weight_shape, np.uint8),
            "weight_scale": ((parts, spec.out_channels), np.float32),
            "weight_zero_point": ((parts, spec.out_channels), np.uint8),
            "tau": ((spec.in_channels,), np.float32),
            "shift": ((spec.in_channels,), np.uint8),
            "scale": ((steps, parts), np.float32),
            "zero_point": ((steps, parts), np.uint8),
        }
        if self.bias is not None:
            expected["bias"] = ((spec.out_channels,), np.float32)
        for name, (shape, dtype) in expected.items():
            value = getattr(self, name)
            if value.shape != shape or value.dtype != dtype:
                raise CheckpointError(
                    f"layer {spec.name}: {name} is {value.dtype} {list(value.shape)}, "
                    f"{np.dtype(dtype)} {list(shape)} was expected"
                )

    def tensors(self) -> dict[str, NDArray[np.generic]]:
        """The arrays by attribute name, without those that are None."""
        arrays = {field.name: getattr(self, field.name) for field in fields(self)[1:]}
        return {name: value for name, value in arrays.items() if value is not None}
