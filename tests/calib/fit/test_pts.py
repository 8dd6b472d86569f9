"""The vote on power-of-two steps."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import conv2d, linear, random_layer
from oracle import along, dequantize_input, quantize_input
from torch import Tensor, nn

from calib.fit.pts import best_exponents, count_votes, decide, exponents
from calib.quant.fake_quant import QParams
from calib.record.trajectories import Trajectories
from dmq_export.layer import LayerSpec, QuantizedLayer

SEEDS = st.integers(0, 2**16)


def numpy_errors(x: np.ndarray, scale: np.ndarray, zero_point: np.ndarray, bits: int) -> np.ndarray:
    """Squared errors ``[4, N, C]`` of the steps ``scale * 2^-k``."""
    errors = []
    for k in range(4):
        step = scale / 2**k
        codes = np.clip(np.rint(x / step) + zero_point, 0, 2**bits - 1)
        errors.append(((step * (codes - zero_point) - x) ** 2).sum(-1))
    return np.stack(errors)


def test_every_exponent_fits_the_carrier_and_one_more_would_not() -> None:
    assert [exponents(bits) for bits in range(3, 9)] == [4, 4, 3, 2, 1, 1]
    for bits in range(4, 8):
        assert (2**bits - 1) << (exponents(bits) - 1) <= 127
        assert (2**bits - 1) << exponents(bits) > 127


def test_only_exponents_that_there_is_room_for_are_tried() -> None:
    x = torch.tensor([100.3, 50.3, 25.3, 12.4])[None, :, None]
    qparams = QParams(torch.ones(4, 1), torch.full((4, 1), 128.0))
    assert best_exponents(x, qparams, 8, 2).tolist() == [[0, 1, 1, 1]]


@settings(deadline=None, max_examples=50)
@given(SEEDS, st.integers(3, 8))
def test_the_best_exponent_has_the_least_error(seed: int, bits: int) -> None:
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.uniform(-2, 2, (6, 1)))
    zero_point = rng.integers(0, 2**bits, (6, 1)).astype(float)
    loudness = 2.0 ** rng.uniform(-5, 1, (6, 1))  # of the range: quiet channels want finer steps
    x = rng.standard_normal((3, 6, 8)) * scale * 2 ** (bits - 2) * loudness
    best = best_exponents(torch.from_numpy(x), QParams(torch.from_numpy(scale), torch.from_numpy(zero_point)), bits)
    np.testing.assert_array_equal(best, numpy_errors(x, scale, zero_point, bits).argmin(0))


def test_a_channel_gets_the_finest_step_that_still_reaches_it() -> None:
    # 8 bits around code 128 with step 1: k reaches +-127 / 2^k
    x = torch.tensor([100.3, 50.3, 25.3, 12.4])[None, :, None]
    qparams = QParams(torch.ones(4, 1), torch.full((4, 1), 128.0))
    assert best_exponents(x, qparams, 8).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("values", "expected"), [([0.0, 0.0], 0), ([3.0, -7.0], 0), ([1.5, -2.0], 1), ([0.25, 1.0], 2), ([0.125, 0.5], 3)]
)
def test_of_equally_good_exponents_the_smallest_is_taken(values: list[float], expected: int) -> None:
    # every value is a multiple of the step 2^-expected, so all finer steps are exact too
    qparams = QParams(torch.ones(1, 1), torch.full((1, 1), 128.0))
    assert best_exponents(torch.tensor([[values]]), qparams, 8).item() == expected


@pytest.mark.parametrize(
    ("counts", "kappa", "shift", "share"),
    [
        ([1, 0, 19, 0], 0.85, 2, 0.95),
        ([3, 0, 17, 0], 0.85, 0, 0.85),  # the share must exceed kappa
        ([2, 0, 18, 0], 0.85, 2, 0.9),
        ([20, 0, 0, 0], 0.85, 0, 1.0),
        ([0, 0, 0, 20], 1.0, 0, 1.0),
        ([5, 5, 6, 4], 0.0, 2, 0.3),
        ([0, 10, 0, 10], 0.0, 1, 0.5),  # the smaller of two winners
        ([0, 0, 0, 0], 0.85, 0, 0.0),
    ],
)
def test_the_winner_is_taken_if_its_share_exceeds_kappa(
    counts: list[int], kappa: float, shift: int, share: float
) -> None:
    result = decide(torch.tensor(counts)[:, None], kappa)
    assert result.shift.tolist() == [shift]
    assert result.share.tolist() == pytest.approx([share])


def test_channels_vote_on_their_own() -> None:
    result = decide(torch.tensor([[0, 9, 1], [10, 1, 0], [0, 0, 0], [0, 0, 9]]), 0.8)
    assert result.shift.tolist() == [1, 0, 3]
    assert result.share.tolist() == pytest.approx([1.0, 0.9, 0.9])


class OneLayer(nn.Module):
    """A denoiser that is one layer, ``layer``."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        channels = spec.in_channels, spec.out_channels
        self.layer = nn.Linear(*channels) if spec.kind == "linear" else nn.Conv2d(*channels, 1)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool) -> tuple[Tensor]:
        return (self.layer(sample),)


def numpy_counts(layer: QuantizedLayer, inputs: np.ndarray) -> np.ndarray:
    """Votes ``[4, C]`` of all samples at all steps, through the oracle's quantizer with every channel at ``k``."""
    spec = layer.spec
    counts = np.zeros((4, spec.in_channels), int)
    for step, x in enumerate(inputs.astype(np.float64)):
        errors = []
        for k in range(4):
            layer.shift[:] = k
            row = step % len(layer.scale)
            scaled = x / along(layer.tau.astype(np.float64), x.ndim, spec.channel_axis)
            error = dequantize_input(layer, quantize_input(layer, x, row), row) - scaled
            errors.append(np.moveaxis(error, spec.channel_axis, 1).reshape(len(x), spec.in_channels, -1))
        winners = (np.stack(errors) ** 2).sum(-1).argmin(0)
        counts += np.stack([(winners == k).sum(0) for k in range(4)])
    layer.shift[:] = 0
    return counts


@pytest.mark.parametrize("steps", [1, 3], ids=["static", "per-step"])
@pytest.mark.parametrize(
    "spec",
    [
        conv2d(name="layer", parts=(4, 3), kernel=(1, 1), padding=(0, 0)),
        linear(name="layer"),
        linear(name="layer", parts=(3, 5)),
    ],
    ids=["split conv", "linear", "split linear"],
)
def test_all_samples_at_all_steps_vote(spec: LayerSpec, steps: int) -> None:
    layer = random_layer(spec, steps=steps)
    layer.zero_point[:] = 128
    rng = np.random.default_rng(0)
    shape = (3, 18, 5, spec.in_channels) if spec.kind == "linear" else (3, 18, spec.in_channels, 2, 2)
    # each channel spans about 127 / 2^n of the codes for n in 0..3, so that the winners differ
    loudness = layer.tau * layer.scale.mean() * 40 / 2.0 ** (np.arange(spec.in_channels) % 4)
    inputs = rng.standard_normal(shape) * (loudness if spec.kind == "linear" else loudness[:, None, None])
    inputs = inputs.astype(np.float32)
    tensors = torch.from_numpy(inputs)
    trajectories = Trajectories(torch.tensor([9.0, 5.0, 1.0]), tensors, tensors, {}, tensors[-1])

    counts = numpy_counts(layer, inputs)
    assert counts.sum(0).tolist() == [3 * 18] * spec.in_channels
    counters = [count_votes(OneLayer(spec), trajectories, rows, [layer]) for rows in (range(16), range(16, 18))]
    assert [counter.keys() for counter in counters] == [{"layer"}, {"layer"}]
    counted = counters[0]["layer"] + counters[1]["layer"]
    assert np.array_equal(counted, counts)
    share = counts.max(0) / (3 * 18)
    outcome = decide(counted, 0.5)
    assert outcome.share.tolist() == pytest.approx(share.tolist())
    assert outcome.shift.tolist() == np.where(share > 0.5, counts.argmax(0), 0).tolist()
    assert len(set(counts.argmax(0).tolist())) > 1  # or the test would say little
