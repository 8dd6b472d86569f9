"""Fitting one layer: every kind is fitted, the numbers are valid, and what the report says of them is true."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layers import SPECS, conv2d, linear
from oracle import dequantize_input, dequantize_weight, operate, quantize_input
from torch import nn

import calib.fit.layer
from calib.fit.layer import LayerFit, LayerWeights, equivalent_scaling, fit_layer, load_fit
from calib.fit.les import LES_OUTPUTS
from calib.quant.patches import weight_of
from calib.record.layer_inputs import Extrema, LayerInputs
from calib.record.work_folder import WorkFolder
from dmq_export.layer import LayerSpec
from dmq_export.recipe import Recipe

STEPS = 3
RECIPE = Recipe(les_iterations=5, les_batch=32)


def module_of(spec: LayerSpec, *, bias: bool = True) -> nn.Module:
    """A layer of that shape, with one output channel far louder than the others."""
    torch.manual_seed(1)
    if spec.kind == "linear":
        module: nn.Module = nn.Linear(spec.in_channels, spec.out_channels, bias=bias)
    else:
        kind = nn.Conv1d if spec.kind == "conv1d" else nn.Conv2d
        shape = (spec.kernel, spec.stride, spec.padding, spec.dilation, spec.groups)
        module = kind(spec.in_channels, spec.out_channels, *shape, bias=bias)
    with torch.no_grad():
        module.get_parameter("weight")[0] *= 5
    return module


def inputs_of(spec: LayerSpec, *, rows: int = 300) -> LayerInputs:
    """Patches and their extrema: channels of very different size, later steps quieter, off zero."""
    generator = torch.Generator().manual_seed(2)
    taps = int(np.prod(spec.kernel))
    step = torch.arange(rows) % STEPS
    loud = torch.logspace(-1, 1, spec.in_channels)[:, None]
    quieter = (0.5**step)[:, None, None]
    patches = (torch.randn(rows, spec.in_channels, taps, generator=generator) + 0.5) * loud * quieter
    by_step = torch.stack([patches[step == t].movedim(1, 0).flatten(1) for t in range(STEPS)])  # [T, C, M * K]
    return LayerInputs(patches, step, Extrema(by_step.amin(2)[None], by_step.amax(2)[None]))


def fit(spec: LayerSpec, module: nn.Module, inputs: LayerInputs, recipe: Recipe) -> LayerFit:
    bias = module.bias if isinstance(module.bias, torch.Tensor) else None
    layer = LayerWeights(spec, weight_of(module), None if bias is None else bias.detach())
    return fit_layer(layer, inputs, recipe, equivalent_scaling([layer], inputs, recipe))


def sqnr(fit: LayerFit, module: nn.Module, inputs: LayerInputs, *, weights: bool, activations: bool) -> float:
    """In dB, by the oracle, over the patches: each is the whole input of a layer with a single output position."""
    spec, axes = fit.layer.spec, len(fit.layer.spec.kernel)
    if spec.kind != "linear":
        spec = replace(spec, stride=(1,) * axes, padding=(0,) * axes, dilation=(1,) * axes)
    layer = replace(fit.layer, spec=spec)
    weight = module.get_parameter("weight").detach().numpy().astype(np.float64)
    tau = layer.tau.astype(np.float64).reshape(-1, *[1] * axes)
    signal = noise = 0.0
    for step in range(STEPS):
        patches = inputs.patches[inputs.step == step].numpy()
        x = patches.reshape(len(patches), spec.in_channels, *spec.kernel)
        row = step if len(layer.scale) > 1 else 0
        rounded = dequantize_input(layer, quantize_input(layer, x, row), row) if activations else x / tau
        # a float weight takes tau on the side of the activation: the oracle then needs no columns of groups
        output = operate(spec, rounded, dequantize_weight(layer)) if weights else operate(spec, rounded * tau, weight)
        target = operate(spec, x.astype(np.float64), weight)
        signal, noise = signal + (target**2).sum(), noise + ((output - target) ** 2).sum()
    return float(10 * np.log10(signal / noise))


@pytest.mark.parametrize("name", SPECS)
def test_every_kind_of_layer_is_fitted_and_reported_truly(name: str) -> None:
    spec = SPECS[name]
    module, inputs = module_of(spec), inputs_of(spec)
    fitted = fit(spec, module, inputs, RECIPE)
    layer = fitted.layer
    assert layer.spec == spec
    assert layer.scale.shape == (STEPS, len(spec.parts))
    assert layer.bias is not None
    assert np.array_equal(layer.bias, module.get_parameter("bias").detach().numpy())
    assert not layer.shift.any()
    # reported to two decimals; a code at a tie may fall on either side
    expected = {
        "weights_db": sqnr(fitted, module, inputs, weights=True, activations=False),
        "activations_db": sqnr(fitted, module, inputs, weights=False, activations=True),
        "output_db": sqnr(fitted, module, inputs, weights=True, activations=True),
    }
    assert {key: fitted.report[key] for key in expected} == pytest.approx(expected, abs=0.1)


@pytest.mark.parametrize("name", ["conv2d", "conv2d split", "conv2d grouped", "conv1d", "linear"])
def test_four_bit_weights_keep_the_output_and_eight_bits_keep_more(name: str) -> None:
    four, eight = (replace(SPECS[name], bits=replace(SPECS[name].bits, weight=weight)) for weight in (4, 8))
    reports = [fit(spec, module_of(spec), inputs_of(spec), RECIPE).report for spec in (four, eight)]
    assert reports[0]["output_db"] > 15
    assert reports[1]["weights_db"] > reports[0]["weights_db"] + 15
    assert reports[1]["output_db"] > 30


@pytest.mark.parametrize("spec", [conv2d(), linear(parts=(3, 5))], ids=["conv2d", "linear split"])
def test_the_report_is_json_and_says_what_each_step_lost(spec: LayerSpec) -> None:
    fitted = fit(spec, module_of(spec), inputs_of(spec), replace(RECIPE, timestep_alpha=20.0))
    report = json.loads(json.dumps(fitted.report, allow_nan=False))
    assert report == fitted.report
    assert len(report["step_loss"]) == len(report["step_weight"]) == STEPS
    assert all(loss > 0 for loss in report["step_loss"])
    assert all(0 <= weight <= 1 for weight in report["step_weight"])
    low, high = report["tau"]
    assert (low, high) == (float(fitted.layer.tau.min()), float(fitted.layer.tau.max()))


def test_a_layer_without_bias_has_none() -> None:
    assert fit(linear(), module_of(linear(), bias=False), inputs_of(linear()), RECIPE).layer.bias is None


def test_no_equivalent_scaling_leaves_every_channel_alone() -> None:
    spec = conv2d()
    plain = fit(spec, module_of(spec), inputs_of(spec), replace(RECIPE, les_iterations=0)).layer
    learned = fit(spec, module_of(spec), inputs_of(spec), RECIPE).layer
    assert (plain.tau == 1).all()
    assert (learned.tau != 1).all()


def test_a_static_recipe_has_one_range_that_covers_every_step() -> None:
    spec = linear(parts=(3, 5))
    recipe = replace(RECIPE, clip=False, les_iterations=0)
    static, stepwise = (
        fit(spec, module_of(spec), inputs_of(spec), replace(recipe, scales=scales)).layer
        for scales in ("static", "per-step")
    )
    assert static.scale.shape == static.zero_point.shape == (1, 2)
    # the first step is the loudest at both ends
    assert np.array_equal(static.scale[0], stepwise.scale[0])
    assert (stepwise.scale[1:] < stepwise.scale[:-1]).all()


def test_a_symmetric_recipe_pins_the_zero_point_to_the_middle() -> None:
    spec = conv2d(scheme="symmetric")
    layer = fit(spec, module_of(spec), inputs_of(spec), RECIPE).layer
    assert (layer.zero_point == 128).all()


def test_without_clipping_the_range_is_that_of_the_scaled_inputs() -> None:
    spec, inputs = linear(), inputs_of(linear())
    recipe = replace(RECIPE, clip=False, les_learning_rate=0.2)
    layer = fit(spec, module_of(spec), inputs, recipe).layer
    assert np.abs(np.log(layer.tau)).max() > 0.1
    low, high = ((values[0].numpy() / layer.tau) for values in (inputs.extrema.low, inputs.extrema.high))
    np.testing.assert_allclose(layer.scale[:, 0], (high.max(1) - low.min(1)) / 255, rtol=1e-6)
    np.testing.assert_allclose(layer.zero_point[:, 0], -low.min(1) / layer.scale[:, 0], atol=0.501)


def test_rounding_to_nearest_on_min_max_is_what_it_says() -> None:
    spec = linear()
    module = module_of(spec)
    recipe = replace(RECIPE, rounding="nearest", weight_grid=False, les_iterations=0)
    layer = fit(spec, module, inputs_of(spec), recipe).layer
    weight = module.get_parameter("weight").detach().numpy()
    low, high = np.minimum(weight.min(1), 0), np.maximum(weight.max(1), 0)
    np.testing.assert_allclose(layer.weight_scale[0], (high - low) / 15, rtol=1e-6)
    codes = np.rint(weight / layer.weight_scale[0][:, None]) + layer.weight_zero_point[0][:, None]
    assert np.array_equal(layer.codes, codes.clip(0, 15))


def test_learned_rounding_loses_less_than_nearest() -> None:
    spec = conv2d()
    nearest, gptq = (
        fit(spec, module_of(spec), inputs_of(spec), replace(RECIPE, rounding=rounding, les_iterations=0)).report
        for rounding in ("nearest", "gptq")
    )
    assert gptq["weights_db"] > nearest["weights_db"] + 1


@pytest.mark.parametrize("name", ["conv2d", "linear split"])
@pytest.mark.parametrize("what", ["weight", "input"])
def test_a_dead_layer_is_fitted_all_the_same(name: str, what: str) -> None:
    spec = SPECS[name]
    module, inputs = module_of(spec), inputs_of(spec)
    if what == "weight":
        nn.init.zeros_(module.get_parameter("weight"))
    else:
        zero = torch.zeros_like(inputs.extrema.low)
        inputs = LayerInputs(torch.zeros_like(inputs.patches), inputs.step, Extrema(zero, zero))
    fitted = fit(spec, module, inputs, RECIPE)
    json.dumps(fitted.report, allow_nan=False)
    if what == "weight":
        assert not dequantize_weight(fitted.layer).any()


def test_a_fit_is_the_same_for_the_same_seed_and_differs_for_another() -> None:
    spec = conv2d()
    one, again, other = (
        fit(spec, module_of(spec), inputs_of(spec), replace(RECIPE, seed=seed)).layer.tensors() for seed in (1, 1, 2)
    )
    assert all(np.array_equal(one[name], again[name]) for name in one)
    assert not np.array_equal(one["tau"], other["tau"])


def test_a_fit_does_not_change_the_float_layer() -> None:
    spec = conv2d()
    module = module_of(spec)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    fit(spec, module, inputs_of(spec), RECIPE)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", ["conv2d split", "linear"])
def test_a_fit_that_was_kept_comes_back_as_it_was(name: str, bias: bool, tmp_path: Path) -> None:
    spec, work = SPECS[name], WorkFolder(tmp_path)
    fitted = fit(spec, module_of(spec, bias=bias), inputs_of(spec), RECIPE)
    fitted.save(work)
    again = load_fit(spec, work)
    assert again.report == fitted.report
    tensors = fitted.layer.tensors()
    assert again.layer.tensors().keys() == tensors.keys()
    assert all(np.array_equal(value, again.layer.tensors()[key]) for key, value in tensors.items())


def test_a_layer_of_many_outputs_is_fitted_on_some_of_them_at_a_time() -> None:
    spec = conv2d(out_channels=2 * LES_OUTPUTS)
    module, inputs = module_of(spec), inputs_of(spec)
    few, many = (fit(spec, module, inputs, replace(RECIPE, les_iterations=n, seed=1)).layer.tau for n in (1, 60))
    assert not np.array_equal(few, many)
    whole = fit(conv2d(out_channels=LES_OUTPUTS), module_of(conv2d(out_channels=LES_OUTPUTS)), inputs, RECIPE)
    assert whole.report["output_db"] == pytest.approx(fit(spec, module, inputs, RECIPE).report["output_db"], abs=2)


def test_layers_of_one_input_share_a_scaling_that_serves_both() -> None:
    """Against each one's own: the shared factors lie between, and neither layer loses much."""
    quiet, loud = (linear(name=name, parts=(16,), out_channels=24) for name in ("quiet", "loud"))
    modules = [module_of(quiet), module_of(loud)]
    with torch.no_grad():
        modules[1].get_parameter("weight").mul_(torch.logspace(-1, 1, 16))
    inputs, recipe = inputs_of(quiet, rows=900), replace(RECIPE, les_iterations=200, les_batch=64)
    layers = [LayerWeights(spec, weight_of(module), None) for spec, module in zip((quiet, loud), modules, strict=True)]
    own = [equivalent_scaling([layer], inputs, recipe).tau.log() for layer in layers]
    shared = equivalent_scaling(layers, inputs, recipe)
    together = shared.tau.log()
    assert all(float((together - tau).std()) < float((own[0] - own[1]).std()) for tau in own)
    fits = [fit_layer(layer, inputs, recipe, shared) for layer in layers]
    assert np.array_equal(fits[0].layer.tau, fits[1].layer.tau)
    assert not np.array_equal(fits[0].layer.codes, fits[1].layer.codes)


def test_clipping_and_the_report_look_at_some_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calib.fit.layer, "EVALUATED_OUTPUTS", 4)
    spec, alone = linear(parts=(16,), out_channels=8), linear(parts=(16,), out_channels=4)
    inputs, weight = inputs_of(spec), weight_of(module_of(spec))
    recipe = Recipe(les_iterations=0, rounding="nearest")
    whole, half = (
        fit_layer(layer, inputs, recipe, equivalent_scaling([layer], inputs, recipe))
        for layer in (LayerWeights(spec, weight, None), LayerWeights(alone, weight[::2], None))
    )
    assert np.array_equal(whole.layer.scale, half.layer.scale)
    assert np.array_equal(whole.layer.zero_point, half.layer.zero_point)
    assert whole.report["output_db"] == half.report["output_db"]
    assert whole.layer.codes.shape == (8, 16)
