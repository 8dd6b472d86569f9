"""Weight codes of one layer, and what they stand for."""

import numpy as np
import pytest
import torch
from layers import SPECS, conv2d, linear, random_layer
from oracle import along, dequantize_weight

import calib.fit.rounding
from calib.fit.gptq import gptq_codes
from calib.fit.rounding import learned_gain, round_weight
from calib.fit.weight_range import minmax_qparams
from calib.quant.fake_quant import QParams
from calib.quant.patches import dequantized_weight, product, weight_columns, weight_matrix
from calib.quant.second_moments import SecondMoments
from dmq_export.layer import LayerSpec


def random_weight(spec: LayerSpec, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(spec.weight_shape))


def correlated_patches(spec: LayerSpec, seed: int = 0, count: int = 300) -> torch.Tensor:
    """``[M, C, K]``; every number shares a part with all the others."""
    rng = np.random.default_rng(seed)
    taps = int(np.prod(spec.kernel))
    x = rng.standard_normal((count, spec.in_channels, taps)) + 2 * rng.standard_normal((count, 1, 1))
    return torch.from_numpy(x)


def output_error(spec: LayerSpec, weight: torch.Tensor, rounded: torch.Tensor, x: torch.Tensor) -> float:
    """Squared, summed over patches and outputs."""
    return float(product(spec, x, weight_matrix(spec, rounded - weight)).square().sum())


def numpy_nearest(spec: LayerSpec, weight: np.ndarray, qparams: QParams) -> np.ndarray:
    codes = np.empty(weight.shape, np.int64)
    parts = spec.part_slices() if len(spec.parts) > 1 else [slice(None)]
    for part, scale, zero_point in zip(parts, qparams.scale.numpy(), qparams.zero_point.numpy(), strict=True):
        scale, zero_point = (along(values, weight.ndim, 0) for values in (scale, zero_point))
        codes[:, part] = np.clip(np.rint(weight[:, part] / scale) + zero_point, 0, 2**spec.bits.weight - 1)
    return codes


@pytest.mark.parametrize("name", SPECS)
def test_nearest_equals_numpy(name: str) -> None:
    spec = SPECS[name]
    weight = random_weight(spec)
    scale, zero_point = minmax_qparams(spec, weight)
    qparams = QParams(scale * 0.7, zero_point)  # some weights are out of reach
    codes = round_weight(spec, weight, qparams, SecondMoments(correlated_patches(spec)), learned=False)
    np.testing.assert_array_equal(codes, numpy_nearest(spec, weight.numpy(), qparams))


@pytest.mark.parametrize("name", SPECS)
def test_learned_codes_are_integers_in_range_and_lose_less_on_the_patches(name: str) -> None:
    spec = SPECS[name]
    weight, x = random_weight(spec), correlated_patches(spec)
    qparams = minmax_qparams(spec, weight)
    learned, nearest = (round_weight(spec, weight, qparams, SecondMoments(x), learned=how) for how in (True, False))
    assert learned.shape == weight.shape
    assert torch.equal(learned, learned.round().clamp(0, 2**spec.bits.weight - 1))
    errors = [output_error(spec, weight, dequantized_weight(spec, codes, qparams), x) for codes in (learned, nearest)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("groups", [2, 3, 6])
def test_each_group_is_rounded_as_a_layer_of_its_own(groups: int) -> None:
    spec = conv2d(parts=(6,), groups=groups)
    alone = conv2d(parts=(6 // groups,), out_channels=6 // groups)
    weight, x = random_weight(spec), correlated_patches(spec)
    qparams = minmax_qparams(spec, weight)
    codes = round_weight(spec, weight, qparams, SecondMoments(x), learned=True)
    for group in range(groups):
        rows = slice(group * (6 // groups), (group + 1) * (6 // groups))
        own = QParams(*(values[:, rows] for values in qparams))
        assert torch.equal(codes[rows], round_weight(alone, weight[rows], own, SecondMoments(x[:, rows]), learned=True))


WIDE = [linear(parts=(64,), out_channels=32), linear(parts=(24, 40), out_channels=16), conv2d(parts=(16,))]


@pytest.mark.parametrize("spec", WIDE, ids=["linear", "linear split", "conv2d"])
def test_rounding_in_chunks_makes_up_for_the_chunks_before(spec: LayerSpec) -> None:
    """Against chunks that know nothing of each other, on inputs that all go together."""
    weight, x = random_weight(spec), correlated_patches(spec, count=1000)
    qparams, taps = minmax_qparams(spec, weight), x.shape[2]
    width = spec.in_channels // 4

    def error(codes: torch.Tensor) -> float:
        return output_error(spec, weight, dequantized_weight(spec, codes, qparams), x)

    whole = error(round_weight(spec, weight, qparams, SecondMoments(x), learned=True))
    chunked = error(round_weight(spec, weight, qparams, SecondMoments(x), learned=True, chunk=width * taps))
    columns = QParams(*(weight_columns(spec, values).expand_as(weight_matrix(spec, weight)) for values in qparams))
    alone = []
    for start in range(0, spec.in_channels, width):
        at = slice(start, start + width)
        flat = x[:, at].flatten(1)
        part = QParams(*(values[:, at].flatten(1) for values in columns))
        codes = gptq_codes(weight_matrix(spec, weight)[:, at].flatten(1), part, flat.T @ flat, spec.bits.weight)
        alone.append(codes.view(spec.out_channels, -1, taps))
    ignorant = error(torch.cat(alone, dim=1).view(weight.shape))
    assert chunked < 0.95 * ignorant
    assert chunked < 1.2 * whole


def test_tau_divides_the_patches() -> None:
    spec = conv2d()
    weight, x = random_weight(spec), correlated_patches(spec)
    tau = torch.tensor([0.5, 2.0, 1.0, 4.0], dtype=x.dtype)
    qparams = minmax_qparams(spec, weight)
    inside = round_weight(spec, weight, qparams, SecondMoments(x), learned=True, tau=tau)
    outside = round_weight(spec, weight, qparams, SecondMoments(x / tau[:, None]), learned=True)
    assert torch.equal(inside, outside)
    assert not torch.equal(inside, round_weight(spec, weight, qparams, SecondMoments(x), learned=True))


def test_a_depthwise_channel_that_is_always_zero_is_rounded_to_nearest() -> None:
    spec = conv2d(parts=(6,), groups=6)
    weight, x = random_weight(spec).float(), correlated_patches(spec).float()
    x[:, 2] = 0
    qparams = minmax_qparams(spec, weight)
    codes = round_weight(spec, weight, qparams, SecondMoments(x), learned=True)
    assert torch.equal(codes[2], round_weight(spec, weight, qparams, SecondMoments(x), learned=False)[2])


@pytest.mark.parametrize("name", SPECS)
def test_dequantized_weights_equal_the_oracle(name: str) -> None:
    layer = random_layer(SPECS[name])
    qparams = QParams(*(torch.from_numpy(v.astype(float)) for v in (layer.weight_scale, layer.weight_zero_point)))
    weight = dequantized_weight(layer.spec, torch.from_numpy(layer.codes.astype(float)), qparams)
    np.testing.assert_array_equal(weight, dequantize_weight(layer))


def rounding_gain(spec: LayerSpec, weight: torch.Tensor, x: torch.Tensor) -> float:
    """Of the layer's whole output."""
    qparams = minmax_qparams(spec, weight)
    learned, nearest = (
        output_error(
            spec,
            weight,
            dequantized_weight(spec, round_weight(spec, weight, qparams, SecondMoments(x), learned=how), qparams),
            x,
        )
        for how in (True, False)
    )
    return learned / nearest


@pytest.mark.parametrize("name", SPECS)
def test_the_gain_is_what_learned_rounding_takes_off_the_output_error(name: str) -> None:
    spec = SPECS[name]
    weight, x = random_weight(spec), correlated_patches(spec)
    gain = learned_gain(spec, weight, SecondMoments(x))
    assert gain == pytest.approx(rounding_gain(spec, weight, x), rel=1e-9)
    assert gain < 0.9


def test_the_gain_of_many_groups_is_that_of_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calib.fit.rounding, "GAIN_GROUPS", 2)
    spec, some = conv2d(parts=(12,), out_channels=12, groups=4), conv2d(parts=(6,), out_channels=6, groups=2)
    weight, x = random_weight(spec), correlated_patches(spec)
    rows = [0, 1, 2, 6, 7, 8]  # of the first and the third group
    expected = learned_gain(some, weight[rows], SecondMoments(x[:, rows]))
    assert learned_gain(spec, weight, SecondMoments(x)) == pytest.approx(expected, rel=1e-9)


def test_the_gain_of_a_wide_layer_is_that_of_some_outputs_and_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calib.fit.rounding, "CHUNK", 20)
    monkeypatch.setattr(calib.fit.rounding, "GAIN_OUTPUTS", 4)
    spec, some = linear(parts=(30,), out_channels=12), linear(parts=(20,), out_channels=4)
    weight, x = random_weight(spec), correlated_patches(spec)
    weight[:, 20:] *= 0.1  # so that the channels left out do not stretch the ranges
    expected = learned_gain(some, weight[::3, :20], SecondMoments(x[:, :20]))
    assert learned_gain(spec, weight, SecondMoments(x)) == pytest.approx(expected, rel=1e-9)


def test_nothing_lost_is_nothing_gained() -> None:
    spec = linear()
    weight, x = random_weight(spec), correlated_patches(spec)
    assert learned_gain(spec, weight, SecondMoments(0 * x)) == 1.0
    assert learned_gain(spec, 0 * weight, SecondMoments(x)) == 1.0
