"""Is an exported graph the reference? Proved layer by layer with the reference's own values, then end to end.

A quantized network is chaotic: one code that flips at a rounding tie changes the next layer's input by a whole
step, which flips more codes. Two executions of the same network therefore differ end to end by a sizeable part
of the activations' rounding error, however exact each layer is. So the graph is cut at every layer: its quantizer
is given the reference's input and must produce the reference's codes, its operator is given the reference's
codes and must produce the reference's output, and what lies between two layers must produce the next layer's
input. That proves every node of the graph, and nothing chaotic is left in it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import CheckFailedError
from dmq_export.form import LayerForm, LayerValues, along
from dmq_export.layer import QuantizedLayer

TOLERANCE = 1e-5  # of the largest magnitude of a tensor: float32 sums of some thousand products
TIE_ULPS = 7  # a code may differ where the unrounded value is this close to a tie: the longest path rounds that often
Array = NDArray[np.float32]


@dataclass(frozen=True)
class LayerCheck:
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

    @property
    def failure(self) -> str | None:
        """What is wrong, or None."""
        if self.wrong_codes:
            return f"layer {self.name}: {self.wrong_codes} activation codes differ from the reference"
        if self.output_error > TOLERANCE:
            return f"layer {self.name}: output differs by {self.output_error:.1e} (allowed {TOLERANCE:.0e})"
        if self.input_error > TOLERANCE:
            return f"layer {self.name}: the graph before it differs by {self.input_error:.1e} (allowed {TOLERANCE:.0e})"
        return None


def check_layer(
    layer: QuantizedLayer, form: LayerForm, row: int, reference: LayerValues, graph: LayerValues
) -> LayerCheck:
    """Compare a layer's cut, lowered to ``form``, with the reference, with the tables' ``row``."""
    expected = form.expected(reference, row)
    distance = np.abs(expected.codes - graph.codes.astype(np.int16))
    differ = distance > 0
    ties = (distance == 1) & form.padded(_near_tie(layer, row, reference.input, form.shift_of_channels(row)))
    return LayerCheck(
        name=layer.spec.name,
        ties=int(ties.sum()),
        wrong_codes=int((differ & ~ties).sum()),
        input_error=relative_error(expected.input, graph.input),
        output_error=relative_error(expected.output, graph.output),
    )


def relative_error(reference: Array, other: Array) -> float:
    """Largest difference over the largest magnitude of ``reference``; infinite if anything is not finite."""
    if not (np.isfinite(reference).all() and np.isfinite(other).all()):
        return float("inf")
    return float(np.abs(reference - other).max() / max(float(np.abs(reference).max()), 1e-30))


def rms_ratio(difference: Array, reference: Array) -> float:
    """Root mean square of ``difference`` over that of ``reference``."""
    return float(np.linalg.norm(difference) / max(float(np.linalg.norm(reference)), 1e-30))


def require_equal(checks: Sequence[LayerCheck]) -> None:
    """Raise what is wrong with the first layer that differs.

    Raises:
        CheckFailedError: naming the layer.
    """
    for check in checks:
        if check.failure:
            raise CheckFailedError(check.failure)


def _near_tie(layer: QuantizedLayer, row: int, x: Array, shift: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Where ``x / (tau * s * 2^-k)`` lies within float32 rounding of a half-integer and is not clipped.

    A graph that adds ``shift [C]`` steps before it rounds does so at the precision of the sum.
    """
    spec = layer.spec
    scale = np.repeat(layer.scale[min(row, len(layer.scale) - 1)], spec.parts)
    step = layer.tau.astype(np.float64) * scale * np.exp2(-layer.shift.astype(np.float64))
    value = x / along(step, x.ndim, spec.channel_axis)
    distance = np.abs(value - np.floor(value) - 0.5)
    zero_point = np.repeat(layer.zero_point[min(row, len(layer.scale) - 1)], spec.parts)
    code = value + along(zero_point, x.ndim, spec.channel_axis)
    unclipped = (code > -1) & (code < 2**spec.bits.activation)
    size = np.abs(value) + np.abs(along(shift, x.ndim, spec.channel_axis))
    return np.asarray(unclipped & (distance <= TIE_ULPS * np.spacing(size.astype(np.float32))))
