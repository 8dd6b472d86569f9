"""Activation ranges from extrema, and clipping, against the whole inputs."""

from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SPECS, conv2d, linear, random_layer, specs
from oracle import dequantize_input, operate, quantize_input

from calib.fit.activation_range import activation_range, clip_range, quantized_patches
from calib.quant.fake_quant import QParams, Range, choose_qparams
from calib.record.layer_inputs import Extrema, LayerInputs
from dmq_export.bits import Bits
from dmq_export.layer import LayerSpec, Scheme


def extrema_of(x: np.ndarray) -> Extrema:
    """Of inputs ``[G, T, L, C]``: ``L`` values of every channel in each group of samples, at each step."""
    return Extrema(torch.from_numpy(x.min(2)), torch.from_numpy(x.max(2)))


def numpy_range(spec: LayerSpec, scaled: np.ndarray, static: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of ``x / tau``, whole: per step and part the groups' extrema averaged, then over steps; zero included."""
    parts = [scaled[..., part] for part in spec.part_slices()]
    low = np.stack([part.min((2, 3)).mean(0) for part in parts], -1)
    high = np.stack([part.max((2, 3)).mean(0) for part in parts], -1)
    if static:
        low, high = low.min(0, keepdims=True), high.max(0, keepdims=True)
    return np.minimum(low, 0), np.maximum(high, 0)


@settings(deadline=None, max_examples=50)
@given(specs(), st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_ranges_equal_those_of_the_whole_input_divided_by_tau(
    spec: LayerSpec, seed: int, groups: int, steps: int, static: bool
) -> None:
    rng = np.random.default_rng(seed)
    shape = (groups, steps, 6, spec.in_channels)
    x = rng.standard_normal(shape) + 2 * rng.standard_normal((1, steps, 1, 1))  # some ranges are one-sided
    tau = np.exp(rng.uniform(-2, 2, spec.in_channels))
    low, high = activation_range(spec, extrema_of(x), torch.from_numpy(tau), static=static)
    expected = numpy_range(spec, x / tau, static)
    assert low.shape == (1 if static else steps, len(spec.parts))
    np.testing.assert_allclose(low, expected[0], rtol=1e-12)
    np.testing.assert_allclose(high, expected[1], rtol=1e-12)


def test_each_step_starts_fresh_and_a_static_range_covers_all_steps() -> None:
    x = np.array([[-1.0, 1.0], [-8.0, 2.0], [0.5, 3.0]])[None, :, :, None]
    extrema, tau = extrema_of(x), torch.ones(1, dtype=torch.float64)
    per_step = activation_range(linear(parts=(1,)), extrema, tau, static=False)
    assert [end[:, 0].tolist() for end in per_step] == [[-1, -8, 0], [1, 2, 3]]
    static = activation_range(linear(parts=(1,)), extrema, tau, static=True)
    assert [end[:, 0].tolist() for end in static] == [[-8], [3]]


def test_tau_moves_the_range_by_gradient() -> None:
    tau = torch.tensor([1.0, 2.0], requires_grad=True)
    x = np.array([[-1.0, -9.0], [4.0, 3.0]], np.float32)[None, None]
    span = activation_range(linear(parts=(2,)), extrema_of(x), tau, static=False)
    assert (span.low.item(), span.high.item()) == (-4.5, 4.0)
    (span.high - span.low).sum().backward()
    assert tau.grad is not None
    assert tau.grad.tolist() == [-4.0, -9 / 4]


@pytest.mark.parametrize("steps", [1, 3], ids=["static", "per-step"])
@pytest.mark.parametrize("name", SPECS)
def test_patches_are_quantized_by_the_table_row_of_their_step(name: str, steps: int) -> None:
    layer = random_layer(SPECS[name], steps=steps)
    layer.tau[:], layer.shift[:] = 1, 0
    spec = layer.spec
    taps = int(np.prod(spec.kernel))
    x = np.random.default_rng(0).standard_normal((6, spec.in_channels, taps)) * 20
    step = np.array([0, 2, 1, 1, 0, 2])
    tables = QParams(*(torch.from_numpy(table.astype(float)) for table in (layer.scale, layer.zero_point)))
    rounded = quantized_patches(spec, torch.from_numpy(x), torch.from_numpy(step), tables)
    for patch, row, result in zip(x, step % steps, rounded.numpy(), strict=True):
        whole = patch.T if spec.kind == "linear" else patch[None]
        expected = dequantize_input(layer, quantize_input(layer, whole, row), row)
        np.testing.assert_array_equal(result, expected.T if spec.kind == "linear" else expected[0])


def numpy_loss(spec: LayerSpec, weight: np.ndarray, x: np.ndarray, step: np.ndarray, span: Range) -> float:
    """Squared output error of the rounded ``x / tau [M, C, K]``; a patch is an input that just fits the kernel."""
    levels = 2**spec.bits.activation - 1
    low, high = (np.repeat(end.numpy(), spec.parts, -1)[step][..., None] for end in span)
    if spec.scheme == "symmetric":
        scale = np.maximum(-low, high) / (2 ** (spec.bits.activation - 1) - 1)
        zero_point = 2.0 ** (spec.bits.activation - 1)
    else:
        scale = (high - low) / levels
        zero_point = np.rint(-low / scale)
    error = scale * (np.clip(np.rint(x / scale) + zero_point, 0, levels) - zero_point) - x
    if spec.kind == "linear":
        return float((operate(spec, error[..., 0], weight) ** 2).sum())
    ones = (1,) * len(spec.kernel)
    unpadded = conv2d(**{**vars(spec), "padding": (0,) * len(ones), "stride": ones, "dilation": ones})
    return float((operate(unpadded, error.reshape(len(x), -1, *spec.kernel), weight) ** 2).sum())


def inputs_of(x: np.ndarray, step: np.ndarray) -> LayerInputs:
    """The patches ``[M, C, K]`` are all there is: the extrema are theirs."""
    low, high = (
        np.stack([getattr(x[step == t], end)((0, 2)) for t in range(step.max() + 1)])[None] for end in ("min", "max")
    )
    extrema = Extrema(torch.from_numpy(low), torch.from_numpy(high))
    return LayerInputs(torch.from_numpy(x), torch.from_numpy(step), extrema)


def heavy_tailed_inputs(spec: LayerSpec, *, seed: int = 0, count: int = 200) -> LayerInputs:
    """Outliers that are rare enough to clip, at two steps of different loudness."""
    rng = np.random.default_rng(seed)
    step = np.arange(count) % 2
    x = rng.standard_t(5, (count, spec.in_channels, int(np.prod(spec.kernel))))
    return inputs_of(x * (1 + step[:, None, None]), step)


def clipped_and_whole(spec: LayerSpec, weight: np.ndarray, inputs: LayerInputs) -> tuple[Range, Range]:
    """Under ``tau = 1``."""
    tau = torch.ones(spec.in_channels, dtype=torch.float64)
    span = activation_range(spec, inputs.extrema, tau, static=False)
    return clip_range(spec, torch.from_numpy(weight), inputs, tau, span), span


def numpy_clip(spec: LayerSpec, weight: np.ndarray, x: np.ndarray, step: np.ndarray, span: Range) -> Range:
    """Part by part both ends, the low one, the high one: 5 % at a time, to 40 % or until two in a row lose."""

    def shrunk(factors: np.ndarray) -> Range:
        return Range(*(end * torch.from_numpy(factor) for end, factor in zip(span, factors, strict=True)))

    best = np.ones((2, len(spec.parts)))
    for part, ends in product(range(len(spec.parts)), ([0, 1], [0], [1])):
        start, least, lost = best, numpy_loss(spec, weight, x, step, shrunk(best)), 0
        for percent in range(95, 35, -5):
            tried = start.copy()
            tried[ends, part] *= percent / 100
            loss = numpy_loss(spec, weight, x, step, shrunk(tried))
            if loss < least:
                best, least, lost = tried, loss, 0
            elif lost == 1:
                break
            else:
                lost = 1
    return shrunk(best)


@settings(deadline=None, max_examples=15)
@given(specs(), st.integers(0, 2**16))
def test_clipping_equals_the_search_written_out(spec: LayerSpec, seed: int) -> None:
    inputs = heavy_tailed_inputs(spec, seed=seed)
    rng = np.random.default_rng(seed)
    weight, tau = rng.standard_normal(spec.weight_shape), np.exp(rng.uniform(-1, 1, spec.in_channels))
    span = activation_range(spec, inputs.extrema, torch.from_numpy(tau), static=False)
    clipped = clip_range(spec, torch.from_numpy(weight), inputs, torch.from_numpy(tau), span)
    expected = numpy_clip(spec, weight, inputs.patches.numpy() / tau[:, None], inputs.step.numpy(), span)
    for end, expected_end in zip(clipped, expected, strict=True):
        np.testing.assert_allclose(end, expected_end, rtol=1e-12)


@settings(deadline=None, max_examples=10)
@given(specs(), st.integers(0, 2**16), st.booleans())
def test_clipping_only_shrinks_and_never_increases_the_loss(spec: LayerSpec, seed: int, static: bool) -> None:
    inputs = heavy_tailed_inputs(spec, seed=seed)
    weight, tau = np.random.default_rng(seed).standard_normal(spec.weight_shape), torch.ones(spec.in_channels).double()
    span = activation_range(spec, inputs.extrema, tau, static=static)
    clipped = clip_range(spec, torch.from_numpy(weight), inputs, tau, span)
    assert ((span.low <= clipped.low) & (clipped.low <= 0)).all()
    assert ((span.high >= clipped.high) & (clipped.high >= 0)).all()
    x, step = inputs.patches.numpy(), inputs.step.numpy() * (not static)
    before, after = (numpy_loss(spec, weight, x, step, s) for s in (span, clipped))
    assert after <= before * (1 + 1e-9)


@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
def test_outliers_are_clipped_where_that_pays(scheme: Scheme) -> None:
    spec = linear(bits=Bits(4, 4), scheme=scheme)
    inputs = heavy_tailed_inputs(spec, count=2000)
    weight = np.random.default_rng(0).standard_normal(spec.weight_shape)
    x, step = inputs.patches.numpy(), inputs.step.numpy()
    after, before = (numpy_loss(spec, weight, x, step, span) for span in clipped_and_whole(spec, weight, inputs))
    assert after < 0.5 * before


def test_the_parts_of_a_split_layer_are_clipped_on_their_own() -> None:
    spec = linear(parts=(4, 4), bits=Bits(4, 4))
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-1, 1, (2000, 4, 1)), rng.standard_t(5, (2000, 4, 1))], 1)
    clipped, whole = clipped_and_whole(spec, rng.standard_normal((5, 8)), inputs_of(x, np.zeros(2000, int)))
    first, second = (clipped.high / whole.high)[0]
    assert first > 0.85
    assert second < 0.6


def test_scaling_input_and_tau_together_changes_no_choice() -> None:
    spec = linear()
    inputs = heavy_tailed_inputs(spec)
    tau = torch.exp(torch.linspace(-1, 1, 8, dtype=torch.float64))
    louder = LayerInputs(inputs.patches * 4, inputs.step, Extrema(inputs.extrema.low * 4, inputs.extrema.high * 4))
    weight = torch.from_numpy(np.random.default_rng(0).standard_normal(spec.weight_shape))
    ranges = [
        clip_range(spec, weight, i, t, activation_range(spec, i.extrema, t, static=False))
        for i, t in ((inputs, tau), (louder, tau * 4))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ranges, strict=True))


def test_a_layer_whose_input_is_always_zero_keeps_an_empty_range() -> None:
    inputs = LayerInputs(torch.zeros(4, 8, 1), torch.zeros(4, dtype=torch.long), Extrema(*torch.zeros(2, 1, 1, 8)))
    span = activation_range(linear(), inputs.extrema, torch.ones(8), static=False)
    clipped = clip_range(linear(), torch.ones(5, 8), inputs, torch.ones(8), span)
    assert not torch.cat(clipped).any()
    assert (choose_qparams(clipped, 8).scale > 0).all()
