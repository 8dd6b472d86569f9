"""Is an exported graph the reference? Proved layer by layer with the reference's own values, then end to end.

A quantized network is chaotic: one code that flips at a rounding tie changes the next layer's input by a whole
step, which flips more codes. Two executions of the same network therefore differ end to end by a sizeable part
of the activations' rounding error, however exact each layer is. So the graph is cut at every layer: its quantizer
is given the reference's input and must produce the reference's codes, its operator is given the reference's
codes and must produce the reference's output, and what lies between two layers is given the reference's outputs
and must produce the next layer's input. That proves every node of the graph, and nothing chaotic is left in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import CheckFailedError
from dmq_export.graph.lowered_layer import LayerValues, LoweredLayer, along
from dmq_export.layer import QuantizedLayer

TOLERANCE = 1e-5  # of the largest magnitude of a tensor: float32 sums of some thousand products
LARGEST_CODE = 1024.0  # no code lies further out; float16 holds it
ROUNDINGS = 7  # on the longest path through a layer; a code may differ where they can turn a tie
Array = NDArray[np.float32]


@dataclass(frozen=True)
class Precision:
    """What a graph's float type can keep: the spacing of ``dtype`` at ties, the ``tolerance`` of values."""

    dtype: type[np.float32] | type[np.float16]
    tolerance: float


FLOAT32 = Precision(np.float32, TOLERANCE)
FLOAT16 = Precision(np.float16, ROUNDINGS * 2.0**-11)  # each by half a unit in the last place


@dataclass(frozen=True)
class LayerComparison:
    """How one layer's cut compares with the reference.

    Attributes:
        ties: codes that differ because the unrounded value is a tie.
        wrong_codes: codes that differ for any other reason.
        input_error: of what the graph before the layer computes, relative to the largest magnitude.
        output_error: of the layer itself, likewise.
    """

    name: str
    ties: int
    wrong_codes: int
    input_error: float
    output_error: float
    tolerance: float = TOLERANCE

    @property
    def failure(self) -> str | None:
        """What is wrong, or None."""
        if self.wrong_codes:
            return f"layer {self.name}: {self.wrong_codes} activation codes differ from the reference"
        if self.output_error == float("inf"):
            return f"layer {self.name}: its output is not finite: a sum overflows, or is no number"
        allowed = f"(allowed {self.tolerance:.0e})"
        if self.output_error > self.tolerance:
            return f"layer {self.name}: output differs by {self.output_error:.1e} {allowed}"
        if self.input_error > self.tolerance:
            return f"layer {self.name}: the graph before it differs by {self.input_error:.1e} {allowed}"
        return None


def compare_layer(
    layer: QuantizedLayer,
    lowered: LoweredLayer,
    row: int,
    reference: LayerValues,
    graph: LayerValues,
    precision: Precision = FLOAT32,
) -> LayerComparison:
    """Compare a layer's cut, as ``lowered`` describes it, with the reference, with the tables' ``row``."""
    expected = lowered.expected(reference, row)
    codes = graph.codes.astype(np.int16)
    differ = expected.codes != codes
    ties = differ
    for either in (expected.codes.astype(np.int16), codes):
        ties = ties & _within_rounding(layer, lowered, row, reference.input, either, precision)
    return LayerComparison(
        name=layer.spec.name,
        ties=int(ties.sum()),
        wrong_codes=int((differ & ~ties).sum()),
        input_error=relative_error(expected.input, graph.input),
        output_error=relative_error(expected.output, graph.output, _unseen(lowered, row, precision)),
        tolerance=precision.tolerance,
    )


def _unseen(lowered: LoweredLayer, row: int, precision: Precision) -> float:
    """The largest magnitude that was rounded on the way to a layer's output and that the output no longer shows.

    A kernel sums in float32 at least, so what its own bias takes out was rounded no worse than that.
    """
    return max(lowered.left_at(row), lowered.cancelled_at(row) * TOLERANCE / precision.tolerance)


def relative_error(reference: Array, other: Array, cancelled: float = 0.0) -> float:
    """Largest difference over the largest magnitude; infinite if anything is not finite.

    Args:
        cancelled: the largest magnitude among terms of the sum that is no longer seen in ``reference``.
    """
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return float("inf")
    size = max(float(np.abs(reference).max()), cancelled, 1e-30)
    return float(np.abs(reference - other.astype(np.float32)).max() / size)


def rms_ratio(difference: Array, reference: Array) -> float:
    """Root mean square of ``difference`` over that of ``reference``."""
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(reference)), 1e-30))


def require_equal(checks: Sequence[LayerComparison], runtime: str) -> None:
    """Raise what is wrong with the first layer that differs in ``runtime``.

    Raises:
        CheckFailedError: naming the layer and the runtime.
    """
    for check in checks:
        if check.failure:
            raise CheckFailedError(f"{check.failure}, executed by {runtime}")


def _within_rounding(
    layer: QuantizedLayer, lowered: LoweredLayer, row: int, x: Array, codes: NDArray[np.int16], precision: Precision
) -> NDArray[np.bool_]:
    """Where a code is what ``x / (tau * s * 2^-k)`` rounds to but for the rounding errors on the way to it.

    A graph that adds ``shift`` steps before it rounds does so at the precision of the sum.
    """
    spec = layer.spec
    current = min(row, len(layer.scale) - 1)
    scale = np.repeat(layer.scale[current], spec.parts)
    step = layer.tau.astype(np.float64) * scale * np.exp2(-layer.shift.astype(np.float64))
    value = lowered.padded(x / along(step, x.ndim, spec.channel_axis))
    size = np.abs(value) + np.abs(along(lowered.shift_of_channels(row), x.ndim, spec.channel_axis))
    zero_point = np.repeat(layer.zero_point[current].astype(np.int16), spec.parts)
    unrounded = value + along(zero_point, x.ndim, spec.channel_axis)
    distance = np.abs(codes - unrounded.clip(0, 2**spec.bits.activation - 1))
    errors = ROUNDINGS * np.spacing(np.minimum(size, LARGEST_CODE).astype(precision.dtype)).astype(np.float64)
    return np.asarray(distance <= 0.5 + errors)
