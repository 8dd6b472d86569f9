"""Learned equivalent scaling: what it minimizes, and where it goes."""

import importlib

import numpy as np
import pytest
import torch
from graphs import Emulated, Recording
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SPECS, linear, specs
from oracle import shift_of_columns

import calib.fit.les
from calib.fit.les import LesResult, LesSettings, fit_les
from calib.record.layer_inputs import Extrema, LayerInputs
from dmq_export.layer import LayerSpec


def random_weight(spec: LayerSpec, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(spec.weight_shape).astype(np.float32))


def inputs_of(patches: np.ndarray, step: np.ndarray) -> LayerInputs:
    """The patches ``[M, C, K]`` are all there is: the extrema are theirs."""
    x = patches.astype(np.float32)
    low, high = (
        np.stack([getattr(x[step == t], end)((0, 2)) for t in range(step.max() + 1)])[None] for end in ("min", "max")
    )
    return LayerInputs(
        torch.from_numpy(x), torch.from_numpy(step), Extrema(torch.from_numpy(low), torch.from_numpy(high))
    )


def random_inputs(spec: LayerSpec, *, count: int = 256, steps: int = 1, seed: int = 0) -> LayerInputs:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, spec.in_channels, int(np.prod(spec.kernel))))
    return inputs_of(x, np.arange(count) % steps)


def fit(
    spec: LayerSpec,
    weight: torch.Tensor,
    inputs: LayerInputs,
    *,
    iterations: int = 150,
    learning_rate: float = 0.03,
    alpha: float = 0.0,
    static: bool = False,
    rounding_gain: float = 1.0,
    seed: int = 0,
) -> LesResult:
    hyper = LesSettings(iterations=iterations, learning_rate=learning_rate, batch=64, alpha=alpha)
    return fit_les(spec, weight, inputs, hyper, static=static, rounding_gain=rounding_gain, seed=seed)


def fake_quantized(x: np.ndarray, low: np.ndarray, high: np.ndarray, bits: int) -> np.ndarray:
    """In ``x``'s own precision, so that float32 falls on the same side of a tie as torch."""
    low, high = np.minimum(low, x.dtype.type(0)), np.maximum(high, x.dtype.type(0))
    scale = np.maximum((high - low) / (2**bits - 1), x.dtype.type(1e-8))
    zero_point = np.rint(-low / scale)
    return scale * (np.clip(np.rint(x / scale) + zero_point, 0, 2**bits - 1) - zero_point)


def rounding_errors(
    spec: LayerSpec, weight: np.ndarray, patches: np.ndarray, span: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Errors of patches ``[M, C, K]`` under ranges ``span [2, M, P]``, and of the weight under min-max ranges."""
    sizes = spec.parts
    low, high = np.repeat(span, sizes, -1)[..., None]
    x_error = fake_quantized(patches, low, high, spec.bits.activation) - patches
    w_error = np.empty_like(weight)
    for part in spec.part_slices() if len(sizes) > 1 else [slice(None)]:
        rows = weight[:, part].reshape(spec.out_channels, -1)
        rounded = fake_quantized(rows, rows.min(1, keepdims=True), rows.max(1, keepdims=True), spec.bits.weight)
        w_error[:, part] = (rounded - rows).reshape(weight[:, part].shape)
    return x_error, w_error


def outputs(spec: LayerSpec, patches: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """``[M, C, K]`` times ``[O, C / groups, *kernel]`` in float64, output by output."""
    x, w = patches.astype(np.float64), weight.astype(np.float64).reshape(spec.out_channels, -1)
    size, rows = spec.in_channels // spec.groups, spec.out_channels // spec.groups
    groups = [x[:, o // rows * size : (o // rows + 1) * size].reshape(len(x), -1) for o in range(spec.out_channels)]
    return np.stack([group @ w[o] for o, group in enumerate(groups)], -1)


def output_error(spec: LayerSpec, weight: torch.Tensor, inputs: LayerInputs, tau: torch.Tensor) -> float:
    """``|| X W - Q(X / tau) Q(W tau) ||^2`` with dynamic min-max ranges, of a layer with one step."""
    x, w, factors = inputs.patches.double().numpy(), weight.double().numpy(), tau.double().numpy()
    x_scaled, w_scaled = x / factors[:, None], w * shift_of_columns(spec, factors, w.ndim)
    parts = [x_scaled[:, part] for part in spec.part_slices()]
    span = np.array([[[part.min() for part in parts]], [[part.max() for part in parts]]])
    x_error, w_error = rounding_errors(spec, w_scaled, x_scaled, span)
    quantized = outputs(spec, x_scaled + x_error, w_scaled + w_error)
    return float(((quantized - outputs(spec, x, w)) ** 2).sum())


@pytest.mark.parametrize("static", [False, True], ids=["per-step", "static"])
@pytest.mark.parametrize("name", SPECS)
def test_the_loss_is_the_two_squared_output_errors(name: str, static: bool) -> None:
    """At tau = 1, where one iteration leaves it if the learning rate is 0; one patch per step makes means exact."""
    spec, gain = SPECS[name], 0.25
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((3, spec.in_channels, int(np.prod(spec.kernel)))) * [[[1]], [[2]], [[5]]]).astype("f4")
    inputs, weight = inputs_of(x, np.arange(3)), random_weight(spec)
    result = fit(spec, weight, inputs, iterations=1, learning_rate=0.0, static=static, rounding_gain=gain)

    span = np.array([[[end(patch[part]) for part in spec.part_slices()] for patch in x] for end in (np.min, np.max)])
    if static:
        ends = span[0].min(0), span[1].max(0)
        span = np.stack([np.broadcast_to(end, span[0].shape) for end in ends])
    x_error, w_error = rounding_errors(spec, weight.numpy(), x, span)
    expected = (outputs(spec, x_error, weight.numpy()) ** 2).mean(1) + gain * (outputs(spec, x, w_error) ** 2).mean(1)
    np.testing.assert_allclose(result.step_loss, expected, rtol=1e-4)  # sums of float32
    assert result.tau.tolist() == [1] * spec.in_channels


@pytest.mark.parametrize("name", ["linear", "conv2d", "conv2d grouped", "conv2d split"])
def test_tau_takes_an_outlier_channel_from_the_input_to_the_weight(name: str) -> None:
    spec = SPECS[name]
    inputs, weight = random_inputs(spec), random_weight(spec)
    inputs.patches[:, 1] *= 40
    inputs.extrema.low[..., 1] *= 40
    inputs.extrema.high[..., 1] *= 40
    tau = fit(spec, weight, inputs).tau
    assert tau[1] > 1.5 * torch.cat([tau[:1], tau[2:]]).max()
    before, after = (output_error(spec, weight, inputs, t) for t in (torch.ones_like(tau), tau))
    assert after < 0.8 * before


def test_tau_takes_an_outlier_column_from_the_weight_to_the_input() -> None:
    spec = linear()
    inputs, weight = random_inputs(spec), random_weight(spec)
    weight[:, 3] *= 20
    inputs.patches[:, 3] /= 20
    inputs.extrema.low[..., 3] /= 20
    inputs.extrema.high[..., 3] /= 20
    tau = fit(spec, weight, inputs).tau
    assert tau[3] < 0.5 * torch.cat([tau[:3], tau[4:]]).min()
    before, after = (output_error(spec, weight, inputs, t) for t in (torch.ones_like(tau), tau))
    assert after < 0.5 * before


def test_the_cheaper_the_rounding_of_weights_the_more_difficulty_they_take() -> None:
    spec = linear()
    inputs, weight = random_inputs(spec), random_weight(spec)
    inputs.patches[:, 1] *= 40
    inputs.extrema.low[..., 1] *= 40
    inputs.extrema.high[..., 1] *= 40
    costly, cheap = (fit(spec, weight, inputs, rounding_gain=gain).tau for gain in (1.0, 0.05))
    assert cheap[1] / cheap.median() > 1.2 * costly[1] / costly.median()


@settings(deadline=None, max_examples=20)
@given(specs(), st.integers(0, 2**16))
def test_tau_stays_positive_even_under_a_large_learning_rate(spec: LayerSpec, seed: int) -> None:
    inputs, weight = random_inputs(spec, count=20, steps=2, seed=seed), random_weight(spec, seed)
    tau = fit(spec, weight, inputs, iterations=5, learning_rate=2.0, alpha=20.0).tau
    assert tau.shape == (spec.in_channels,)
    assert tau.isfinite().all()
    assert (tau > 0).all()


def test_dead_channels_and_dead_columns_leave_tau_finite() -> None:
    inputs, weight = random_inputs(linear()), random_weight(linear())
    inputs.patches[:, 0] = inputs.extrema.low[..., 0] = inputs.extrema.high[..., 0] = 0
    weight[:, 1], weight[2] = 0, 0
    assert fit(linear(), weight, inputs, iterations=5).tau.isfinite().all()


def test_a_layer_whose_input_is_always_zero_keeps_tau_finite() -> None:
    inputs = inputs_of(np.zeros((8, 8, 1)), np.arange(8) % 2)
    assert fit(linear(), random_weight(linear()), inputs, iterations=5, alpha=20.0).tau.isfinite().all()


class Capturable(torch.optim.Adam):
    """As on a GPU, where it keeps its count of steps in a tensor."""

    def __init__(self, parameters: list[torch.Tensor], *, capturable: bool) -> None:
        super().__init__(parameters, capturable=True)


@pytest.mark.parametrize("static", [False, True], ids=["per-step", "static"])
@pytest.mark.parametrize("name", SPECS)
def test_a_recorded_iteration_does_what_its_calls_would(
    name: str, static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is made anew that must be kept, and no number that changes is Python's: a CUDA graph would freeze it."""
    module = importlib.import_module(torch.optim.Adam.__module__)  # torch.optim hides it behind the class
    monkeypatch.setattr(module, "_get_capturable_supported_devices", lambda: ["cpu"])
    monkeypatch.setattr(torch.optim, "Adam", Capturable)
    layer = SPECS[name], random_weight(SPECS[name]), random_inputs(SPECS[name], steps=100)  # of which few come first
    expected = fit(*layer, iterations=12, alpha=20.0, static=static)
    monkeypatch.setattr(calib.fit.les, "CudaGraph", Emulated)
    before = Emulated.calls
    replayed = fit(*layer, iterations=12, alpha=20.0, static=static)
    assert Emulated.calls == before + 12
    for one, other in zip(vars(replayed).values(), vars(expected).values(), strict=True):
        assert torch.equal(one, other)


def test_what_cannot_be_recorded_is_noticed() -> None:
    x = torch.ones(2)
    for slip in (lambda: x.max().item(), lambda: torch.tensor([1.0, 2.0]), lambda: x[x > 0]):
        with pytest.raises(AssertionError), Recording():
            slip()


def test_what_a_replay_would_freeze_is_noticed() -> None:
    """The emulation itself: a tensor that a call rebinds, and a number that changes, stay as they were recorded."""
    total, numbers = [torch.zeros(())], iter(range(10))

    def rebind(x: torch.Tensor) -> None:
        total[0] = total[0] + x * next(numbers)

    emulated = Emulated(rebind, torch.device("cpu"))
    for _ in range(6):
        emulated(torch.ones(()))
    assert total[0] == 0 + 1 + 2 + 3  # as the recording left it: neither 4 nor 5 came


def test_no_iterations_give_factors_of_one() -> None:
    result = fit(linear(), random_weight(linear()), random_inputs(linear()), iterations=0)
    assert result.tau.tolist() == [1] * 8


def test_the_fit_repeats_for_a_seed_and_varies_with_it() -> None:
    inputs, weight = random_inputs(linear()), random_weight(linear())
    first, again, other = (fit(linear(), weight, inputs, iterations=5, seed=seed).tau for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_the_learning_rate_falls_to_zero() -> None:
    """The last of many steps moves tau far less than the first, though Adam's steps do not shrink by themselves."""
    inputs, weight = random_inputs(linear(), count=1), random_weight(linear())
    whole = fit(linear(), weight, inputs, iterations=30, learning_rate=0.01, rounding_gain=0.0).tau.log().abs().max()
    # thirty full steps of 0.01 would reach 0.3; half of a cosine's area is half of that
    assert whole < 0.16


def test_the_reported_step_weights_follow_the_reported_losses() -> None:
    inputs = random_inputs(linear(), steps=3)
    inputs.patches[inputs.step == 1] *= 3
    inputs.extrema.low[:, 1] *= 3
    inputs.extrema.high[:, 1] *= 3
    result = fit(linear(), random_weight(linear()), inputs, iterations=10, alpha=20.0)
    loss = result.step_loss.double().numpy()
    assert loss.argmax() == 1
    np.testing.assert_allclose(result.step_weight, (1 - loss / loss.sum()) ** 20, rtol=1e-3)


def test_steps_that_lose_much_are_drowned_out_by_the_adaptive_weight() -> None:
    """Step 0 is loud in channel 0, step 1 quiet in all but channel 5: the weight decides whose outlier is served."""
    spec = linear()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((256, 8, 1))
    step = np.arange(256) % 2
    x[step == 0, 0] *= 400
    x[step == 1, 5] *= 40
    inputs, weight = inputs_of(x, step), random_weight(spec)
    uniform, adaptive = (fit(spec, weight, inputs, alpha=alpha).tau for alpha in (0.0, 20.0))
    assert adaptive[5] / adaptive[0] > uniform[5] / uniform[0]
