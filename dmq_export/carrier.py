"""The int8 carrier of a part's weights: ``(q_w - z_w) << (K - k_c)``, an int8 weight with a scale per output channel.

Section 1 of ``docs/arithmetic.md``: with ``K = max_c k_c`` the power-of-two steps of the activations move into the
weights, and the scale becomes ``s_w * 2^-K``.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import ExportError
from dmq_export.half import held
from dmq_export.layer import Float, LayerSpec, QuantizedLayer
from dmq_export.target import FloatType

LARGEST = 127  # TensorRT's int8 kernels and oneDNN's both take -127..127


@dataclass(frozen=True)
class Carrier:
    """A part's integer weights.

    Attributes:
        codes: ``[O, C_p / groups, *kernel]``.
        scale: ``[O]``; ``scale * codes`` is the weight that meets ``x / tau * 2^k``. A row of zeros has scale 1, so
            that a dead channel's tiny scale cannot vanish in float16.
    """

    codes: NDArray[np.int8]
    scale: Float

    def sums(self) -> NDArray[np.float64]:
        """``[O]``, the sum of each output's weights."""
        totals = self.codes.reshape(len(self.codes), -1).sum(1, dtype=np.int64)
        return np.asarray(totals * self.scale.astype(np.float64))


def part_carrier(layer: QuantizedLayer, part: int, dtype: FloatType = "float32") -> Carrier:
    """The carrier of ``layer``'s ``part``, its scale as a graph of ``dtype`` holds it.

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
    scale = np.ldexp(layer.weight_scale[part], -int(layer.shift[channels].max())).astype(np.float32)
    dead = ~codes.reshape(len(codes), -1).any(1)
    return Carrier(np.ascontiguousarray(codes), held(np.where(dead, np.float32(1), scale), dtype))


def _require_int8(spec: LayerSpec, lift: int) -> None:
    bits = spec.bits.weight
    if (2**bits - 1) << lift > LARGEST:
        raise ExportError(
            f"layer {spec.name}: {bits}-bit weights shifted by {lift} reach {(2**bits - 1) << lift}, an int8 kernel "
            f"takes {LARGEST} at most: calibrate with fewer weight bits, with --pts-layers none, or with "
            f"--float-layer {spec.name}; --target portable has no such limit"
        )


def _columns(spec: LayerSpec, values: NDArray[np.int16], rank: int) -> NDArray[np.int16]:
    """One value per input channel ``[C_p]`` over the weight's columns; output ``o`` of a group reads its own group."""
    per_group = values.reshape(spec.groups, -1)
    rows = per_group.repeat(spec.out_channels // spec.groups, axis=0) if spec.groups > 1 else per_group
    return rows.reshape(*rows.shape, *[1] * (rank - 2))
