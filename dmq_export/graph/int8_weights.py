"""The int8 carrier of a part's weights: ``(q_w - z_w) << (K - k_c)``, an int8 weight with a scale per output channel.

Section 1 of ``docs/arithmetic.md``: with ``K = max_c k_c`` the power-of-two steps of the activations move into the
weights, and the scale becomes ``s_w * 2^-K``. TensorRT's compiler leaves the raw sum of a matrix product in float16
where a weight has a scale per output channel, and there the sum of some products overflows. Its graph therefore gets
one scale per weight, a power of two ``S``, and ``s_w * 2^-K / S`` as a Mul behind the product.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import ExportError
from dmq_export.graph.activation_codes import collapsed
from dmq_export.graph.float16 import SMALLEST_NORMAL, held
from dmq_export.layer import Float, LayerSpec, QuantizedLayer
from dmq_export.target import FloatType, Target

LARGEST_INT8_WEIGHT = 127  # TensorRT's int8 kernels and oneDNN's both take -127..127


@dataclass(frozen=True)
class Int8Weights:
    """A part's integer weights.

    Attributes:
        codes: ``[O, C_p / groups, *kernel]``.
        scale: of the weight's DequantizeLinear, one number ``[]`` or ``[O]``.
        gain: ``[O]``, or ``[1]`` where the channels agree; ``gain * scale * codes`` is the weight that meets
            ``x / tau * 2^k``, and ``gain`` is multiplied behind the product.
    """

    codes: NDArray[np.int8]
    scale: Float
    gain: Float

    def sums(self) -> NDArray[np.float64]:
        """``[O]``, the sum of each output's weights before the gain."""
        totals = self.codes.reshape(len(self.codes), -1).sum(1, dtype=np.int64)
        return np.asarray(totals * self.scale.astype(np.float64))


def lifted_weights(layer: QuantizedLayer, part: int, target: Target, dtype: FloatType = "float32") -> Int8Weights:
    """The weights of ``layer``'s ``part`` for ``target``, its scales as a graph of ``dtype`` holds them.

    Raises:
        ExportError: ``(2^nw - 1) * 2^(K - k)`` can exceed 127; the layer is named.
    """
    spec = layer.spec
    channels = spec.part_slices()[part]
    lift = layer.shift[channels].max() - layer.shift[channels]
    _require_int8(spec, int(lift.max()))
    columns = channels if len(spec.parts) > 1 else slice(None)
    broadcast = (-1, *[1] * (layer.codes.ndim - 1))
    centred = layer.codes[:, columns].astype(np.int16) - layer.weight_zero_point[part].astype(np.int16).reshape(
        broadcast
    )
    codes = (centred * _columns(spec, np.left_shift(1, lift.astype(np.int16)), centred.ndim)).astype(np.int8)
    scale = np.ldexp(layer.weight_scale[part].astype(np.float64), -int(layer.shift[channels].max()))
    dead = ~codes.reshape(len(codes), -1).any(1)
    scale[dead] = common = _common(scale[~dead])  # their own may be so small that float16 loses it
    codes = np.ascontiguousarray(codes)
    if target == "tensorrt":
        return Int8Weights(codes, held(common, dtype), collapsed(held(scale / common, dtype)))
    return Int8Weights(codes, held(scale, dtype), np.ones(1, np.float32))


def _common(scales: NDArray[np.float64]) -> NDArray[np.float64]:
    """The power of two at or above all of ``scales`` that float16 holds as a normal number, ``[]``.

    A power of two rounds nothing: what float16 takes from a scale it takes from its quotient.
    """
    return np.asarray(np.exp2(np.ceil(np.log2(scales.max(initial=SMALLEST_NORMAL)))))


def _require_int8(spec: LayerSpec, lift: int) -> None:
    bits = spec.bits.weight
    if (2**bits - 1) << lift > LARGEST_INT8_WEIGHT:
        raise ExportError(
            f"layer {spec.name}: {bits}-bit weights shifted by {lift} reach {(2**bits - 1) << lift}, an int8 kernel "
            f"takes {LARGEST_INT8_WEIGHT} at most: calibrate with fewer weight bits, with --pts-layers none, or with "
            f"--float-layer {spec.name}; --target portable has no such limit"
        )


def _columns(spec: LayerSpec, values: NDArray[np.int16], rank: int) -> NDArray[np.int16]:
    """One value per input channel ``[C_p]`` over the weight's columns; output ``o`` of a group reads its own group."""
    per_group = values.reshape(spec.groups, -1)
    rows = per_group.repeat(spec.out_channels // spec.groups, axis=0) if spec.groups > 1 else per_group
    return rows.reshape(*rows.shape, *[1] * (rank - 2))
