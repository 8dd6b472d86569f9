"""Channel-wise power-of-two scaling: quiet channels get a step ``2^k`` times finer, if the samples agree on it.

DMQ, section 3.3: per sample the exponent with the least squared error; the mode over samples is taken when its
share exceeds ``kappa``, otherwise ``k = 0``. Votes are counted over samples *and* steps, so that ``k`` does not
depend on the step and can live in the weights.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.quant.fake_quant import QParams, fake_quantize
from calib.quant.patches import expand_parts
from calib.record.layer_inputs import EvaluationIndex, evaluate_recorded
from calib.record.trajectories import Trajectories
from dmq_export.layer import QuantizedLayer

EXPONENTS = 4  # k in 0..3


@dataclass(frozen=True)
class Vote:
    """The outcome for one layer: exponents ``shift [C]`` and the winner's ``share [C]`` of the samples."""

    shift: Tensor
    share: Tensor

    def report(self) -> dict[str, Any]:
        """The vote as JSON values."""
        shares = [round(float(share), 3) for share in self.share]
        return {"pts_channels": int((self.shift > 0).sum()), "pts_share": shares}


def exponents(weight_bits: int) -> int:
    """How many exponents an int8 carrier has room for: 4 for weights of up to 4 bits, 1 (``k = 0``) from 7 on."""
    return max(1, min(EXPONENTS, 8 - weight_bits))


def best_exponents(x: Tensor, qparams: QParams, bits: int, count: int = EXPONENTS) -> Tensor:
    """The exponent in 0..``count - 1`` with the least squared error, per sample and channel.

    Args:
        x: what is quantized, ``[N, C, L]`` with ``L`` positions.
        qparams: of ``k = 0``, ``[C, 1]`` each.
        bits: of ``x``.

    Returns:
        ``[N, C]``, integers; the smaller exponent where two are equally good.
    """
    errors = [
        (fake_quantize(x, QParams(qparams.scale * 2.0**-k, qparams.zero_point), bits) - x).square().sum(-1)
        for k in range(count)
    ]
    return torch.stack(errors).argmin(0)


def decide(counts: Tensor, kappa: float) -> Vote:
    """The vote over ``counts [4, C]``: how many samples preferred each exponent."""
    votes, winner = counts.max(0)
    share = votes / counts.sum(0).clamp(min=1)
    return Vote(torch.where(share > kappa, winner, 0), share)


def count_votes(
    network: nn.Module,
    trajectories: Trajectories,
    rows: range,
    layers: Sequence[QuantizedLayer],
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, Tensor]:
    """How many rows prefer each exponent, by layer ``[4, C]``, on the float network's inputs at all steps."""
    counters = {layer.spec.name: _VoteCounter(layer) for layer in layers}
    evaluate_recorded(network, trajectories, rows, counters, advance=advance)
    return {name: counter.counts for name, counter in counters.items()}


class _VoteCounter:
    """Counts one layer's votes, call by call."""

    def __init__(self, layer: QuantizedLayer) -> None:
        self._layer = layer
        self._tau = torch.from_numpy(layer.tau)
        tables = (layer.scale, layer.zero_point.astype("float32"))
        self._tables = [expand_parts(layer.spec, torch.from_numpy(table.copy())) for table in tables]
        self.counts = torch.zeros(EXPONENTS, layer.spec.in_channels, dtype=torch.int64)

    def __call__(self, x: Tensor, index: EvaluationIndex) -> None:
        spec = self._layer.spec
        channels_first = x.movedim(spec.channel_axis, 1).reshape(len(x), spec.in_channels, -1)
        row = index.step if len(self._tables[0]) > 1 else 0
        qparams = QParams(*(table[row][:, None].to(x.device) for table in self._tables))
        scaled = channels_first / self._tau[:, None].to(x.device)
        best = best_exponents(scaled, qparams, spec.bits.activation, exponents(spec.bits.weight))
        for k in range(EXPONENTS):
            self.counts[k] += (best == k).sum(0).cpu()
