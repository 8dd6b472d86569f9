"""How a lowered layer's values differ from the reference's, so that one can be compared with the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dmq_export.layer import Float, LayerSpec, QuantizedLayer

Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class LayerValues:
    """One layer in one evaluation: its input, the input's codes ``q_x``, its output."""

    input: NDArray[np.float32]
    codes: NDArray[np.integer]
    output: NDArray[np.float32]


class PartValues(NamedTuple):
    """What one quantizer of a lowered graph takes and gives."""

    input: NDArray[np.float32]
    codes: NDArray[np.integer]


@dataclass(frozen=True)
class LoweredLayer:
    """What a lowering made of a layer; ``T`` steps (1 where they agree), ``P`` parts.

    Attributes:
        spec: the layer.
        suffixes: of the names of its quantizers' values, one per quantizer: ``("",)``, or ``("_0", "_1")`` where the
            parts are quantized apart.
        container: type of the codes.
        zero_point: ``q_x`` of zero, ``[T, P]``.
        offset: ``q_x - code``, ``[T, P]``.
        shift: steps added before rounding, ``[T, P]``.
        cancelled: largest magnitude of what the shift adds to the layer's products, ``[T]``.
        left: largest magnitude of what of that is still there behind the operator, ``[T]``.
        padding: what the quantizer adds on every side of its input, one number per spatial axis, or none.
        input_factor: ``[C]``; the graph computes the layer's input times this. None: times one.
        output_factor: ``[O]``, likewise of its output.
        scaled: why the LES and PTS factors are a Mul before the quantizer; empty where there is none.
    """

    spec: LayerSpec
    suffixes: tuple[str, ...]
    container: type[np.int8] | type[np.uint8]
    zero_point: NDArray[np.int32]
    offset: NDArray[np.int32]
    shift: NDArray[np.int32]
    cancelled: NDArray[np.float64]
    left: NDArray[np.float64]
    padding: tuple[int, ...] = ()
    input_factor: Float | None = None
    output_factor: Float | None = None
    scaled: str = ""

    def expected(self, reference: LayerValues, row: int) -> LayerValues:
        """What the graph must say, in the reference's codes, where the reference says ``reference``."""
        axis = self.spec.channel_axis
        fill = along(self._channels(self.zero_point, row), reference.codes.ndim, axis)
        centred = reference.codes.astype(np.int16) - fill.astype(np.int16)
        return LayerValues(
            input=_times(reference.input, self.input_factor, axis),
            codes=self.padded(centred) + fill.astype(np.int16),
            output=_times(reference.output, self.output_factor, axis),
        )

    def given(self, reference: LayerValues, row: int) -> dict[str, PartValues]:
        """The same in the graph's own codes, by suffix."""
        values = self.expected(reference, row)
        axis = self.spec.channel_axis
        offset = along(self._channels(self.offset, row), values.codes.ndim, axis)
        codes = (values.codes - offset).astype(self.container)
        if len(self.suffixes) == 1:
            return {self.suffixes[0]: PartValues(values.input, codes)}
        cuts = np.cumsum(self.spec.parts)[:-1]
        parts = zip(np.split(values.input, cuts, axis), np.split(codes, cuts, axis), strict=True)
        return {suffix: PartValues(*part) for suffix, part in zip(self.suffixes, parts, strict=True)}

    def seen(self, parts: Sequence[PartValues], output: NDArray[np.float32], row: int) -> LayerValues:
        """What the graph said, in the reference's codes."""
        axis = self.spec.channel_axis
        codes = np.concatenate([part.codes.astype(np.int16) for part in parts], axis)
        offset = along(self._channels(self.offset, row), codes.ndim, axis).astype(np.int16)
        return LayerValues(np.concatenate([part.input for part in parts], axis), codes + offset, output)

    def zero_point_added(self) -> LoweredLayer:
        """The form of a kernel that adds its zero point before it rounds: at the precision of that sum."""
        return replace(self, shift=self.zero_point - self.offset)

    def padded(self, values: NDArray[Number]) -> NDArray[Number]:
        """``values`` of the input's shape, zeros around them where the quantizer pads."""
        return np.pad(values, [(0, 0), (0, 0), *((p, p) for p in self.padding)]) if any(self.padding) else values

    def shift_of_channels(self, row: int) -> NDArray[np.int32]:
        """The current shift, ``[C]``."""
        return self._channels(self.shift, row)

    def cancelled_at(self, row: int) -> float:
        """The current :attr:`cancelled`."""
        return float(self.cancelled[min(row, len(self.cancelled) - 1)])

    def left_at(self, row: int) -> float:
        """The current :attr:`left`."""
        return float(self.left[min(row, len(self.left) - 1)])

    def _channels(self, table: NDArray[np.int32], row: int) -> NDArray[np.int32]:
        return np.repeat(table[min(row, len(table) - 1)], self.spec.parts)


def plainly_lowered(layer: QuantizedLayer) -> LoweredLayer:
    """One quantizer whose codes are ``q_x`` itself."""
    zero_point = layer.zero_point.astype(np.int32)
    none = np.zeros_like(zero_point)
    return LoweredLayer(layer.spec, ("",), np.uint8, zero_point, none, none, np.zeros(1), np.zeros(1))


def along(values: NDArray[Number], rank: int, axis: int) -> NDArray[Number]:
    """``values [C]`` shaped to broadcast along ``axis`` of an array of ``rank``."""
    shape = [1] * rank
    shape[axis] = -1
    return values.reshape(shape)


def _times(values: NDArray[np.float32], factor: Float | None, axis: int) -> NDArray[np.float32]:
    return values if factor is None else np.asarray(values * along(factor, values.ndim, axis), np.float32)
