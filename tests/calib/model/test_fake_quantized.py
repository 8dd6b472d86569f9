"""The fake-quantized PyTorch model against the NumPy oracle, and as a stand-in for the float model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SPECS, conv2d, linear, random_input, random_layer, specs
from oracle import add_bias, along, dequantize_input, dequantize_weight, layer_output, operate, quantize_input
from torch import Tensor, nn

from calib.model.fake_quantized import (
    FakeQuantizedLayer,
    FakeQuantizedModel,
    load_fake_quantized,
    perturbed,
    quantized,
)
from calib.model.fake_quantized import record_layers as record
from calib.model.load import SourceModel, load_model
from dmq_export.checkpoint import Checkpoint
from dmq_export.layer import LayerSpec, QuantizedLayer

TIMESTEPS = torch.tensor([900.0, 500.0, 100.0])


def at_row(layer: QuantizedLayer, row: int) -> FakeQuantizedLayer:
    module = FakeQuantizedLayer(layer)
    module.row = row
    return module


def run(module: FakeQuantizedLayer, x: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return module(torch.from_numpy(x)).numpy()


def assert_close(output: np.ndarray, expected: np.ndarray) -> None:
    # float32 sums of a few dozen products
    np.testing.assert_allclose(output, expected, rtol=0, atol=2e-6 * np.abs(expected).max())


def assert_layer_equal(layer: QuantizedLayer, x: np.ndarray, row: int) -> None:
    module = at_row(layer, row)
    codes = module.codes(torch.from_numpy(x)).numpy()
    expected = quantize_input(layer, x, row)
    assert np.array_equal(codes, codes.astype(np.uint8))
    # float32 division may fall on the other side of a tie than float64; random inputs hit few ties
    assert (codes != expected).mean() < 0.01
    assert np.abs(codes - expected).max(initial=0) <= 1
    rounded = dequantize_input(layer, codes.astype(np.int64), row)
    assert_close(run(module, x), add_bias(layer, operate(layer.spec, rounded, dequantize_weight(layer))))


@pytest.mark.parametrize("name", SPECS)
def test_static_layer_equals_the_oracle(name: str) -> None:
    layer = random_layer(SPECS[name])
    assert_layer_equal(layer, random_input(layer.spec), 0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("row", [0, 1, 2])
def test_per_step_layer_uses_the_current_row(name: str, row: int) -> None:
    layer = random_layer(SPECS[name], steps=3)
    assert_layer_equal(layer, random_input(layer.spec), row)


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(1, 3), st.integers(0, 2**16), st.booleans())
def test_any_layer_equals_the_oracle(spec: LayerSpec, steps: int, seed: int, bias: bool) -> None:
    layer = random_layer(spec, steps=steps, seed=seed, bias=bias)
    assert_layer_equal(layer, random_input(spec, seed=seed), steps - 1)


def test_a_static_layer_is_the_same_at_every_step() -> None:
    layer = random_layer(conv2d())
    x = random_input(layer.spec)
    assert np.array_equal(run(at_row(layer, 2), x), run(at_row(layer, 0), x))


def float_weight(spec: LayerSpec) -> np.ndarray:
    return np.random.default_rng(7).standard_normal(spec.weight_shape).astype(np.float32)


@pytest.mark.parametrize("name", SPECS)
def test_float_activations_leave_only_the_weights_error(name: str) -> None:
    layer = random_layer(SPECS[name])
    spec, x = layer.spec, random_input(layer.spec)
    scaled = x / along(layer.tau.astype(np.float64), x.ndim, spec.channel_axis)
    expected = add_bias(layer, operate(spec, scaled, dequantize_weight(layer)))
    assert_close(run(FakeQuantizedLayer(layer, activations=False), x), expected)


@pytest.mark.parametrize("name", SPECS)
def test_float_weights_leave_only_the_activations_error(name: str) -> None:
    layer = random_layer(SPECS[name])
    spec, x, weight = layer.spec, random_input(layer.spec), float_weight(layer.spec)
    module = FakeQuantizedLayer(layer, weights=False, weight=torch.from_numpy(weight))
    codes = module.codes(torch.from_numpy(x)).numpy().astype(np.int64)
    # tau multiplies the activation instead of the weight, so that the oracle needs no columns of groups
    tau = along(layer.tau.astype(np.float64), x.ndim, spec.channel_axis)
    assert_close(run(module, x), add_bias(layer, operate(spec, dequantize_input(layer, codes) * tau, weight)))


@pytest.mark.parametrize("name", SPECS)
def test_float_weights_and_activations_are_the_float_layer(name: str) -> None:
    layer = random_layer(SPECS[name])
    x, weight = random_input(layer.spec), float_weight(layer.spec)
    module = FakeQuantizedLayer(
        layer, weights=False, activations=False, weight=torch.from_numpy(weight).requires_grad_()
    )
    assert_close(run(module, x), add_bias(layer, operate(layer.spec, x.astype(np.float64), weight)))


def test_float_weights_must_be_given() -> None:
    with pytest.raises(ValueError, match="layer conv: the float weight is needed"):
        FakeQuantizedLayer(random_layer(conv2d()), weights=False)


class TwoLayers(nn.Module):
    """A convolution and a linear layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.proj = nn.Linear(8, 5)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.proj(self.conv(sample).flatten(2).mT),)


def two_layers(steps: int = 3) -> list[QuantizedLayer]:
    return [
        random_layer(conv2d(out_channels=8), steps=steps),
        replace(random_layer(linear(), steps=steps), bias=None),
    ]


@pytest.mark.parametrize(
    ("timestep", "row"), [(1000, 0), (900, 0), (701, 0), (700, 0), (699.9, 1), (500, 1), (300, 1), (299, 2), (0, 2)]
)
def test_the_row_is_that_of_the_nearest_timestep_the_first_of_two(timestep: float, row: int) -> None:
    layers = two_layers()
    x = random_input(layers[0].spec, size=3)
    with quantized(TwoLayers(), layers, TIMESTEPS) as reference:
        output = reference(torch.from_numpy(x), torch.tensor(timestep)).numpy()
        assert reference.row_of(timestep) == row
        values, _ = record(reference, torch.from_numpy(x), timestep, {})
    hidden = dequantize_input(layers[1], values["proj"].codes.astype(np.int64), row)
    assert_close(output, operate(layers[1].spec, hidden, dequantize_weight(layers[1])))


def test_quantized_puts_the_float_layers_back() -> None:
    network, x = TwoLayers(), torch.randn(1, 4, 3, 3)
    modules, before = dict(network.named_modules()), network(x, None)[0]
    with quantized(network, two_layers(), TIMESTEPS) as reference:
        assert not torch.allclose(reference(x, 500), before)
        assert isinstance(network.conv, FakeQuantizedLayer)
    assert all(network.get_submodule(name) is module for name, module in modules.items() if name)
    assert torch.equal(network(x, None)[0], before)


def fail_inside(network: nn.Module) -> None:
    with quantized(network, two_layers(), TIMESTEPS):
        raise KeyboardInterrupt


def test_quantized_puts_the_float_layers_back_whatever_happens() -> None:
    network = TwoLayers()
    with pytest.raises(KeyboardInterrupt):
        fail_inside(network)
    assert isinstance(network.conv, nn.Conv2d)
    assert isinstance(network.proj, nn.Linear)


def test_quantized_without_either_is_the_float_network() -> None:
    network, x = TwoLayers(), torch.randn(1, 4, 3, 3)
    layers = [replace(layer, bias=None) for layer in two_layers()]
    for module, layer in ((network.conv, layers[0]), (network.proj, layers[1])):
        module.bias = None
        assert module.weight.shape == layer.spec.weight_shape
    expected = network(x, None)[0]
    with quantized(network, layers, TIMESTEPS, weights=False, activations=False) as reference:
        torch.testing.assert_close(reference(x, 500), expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> SourceModel:
    return load_model(tiny_model, torch.device("cpu"))


def probe_inputs(checkpoint: Checkpoint, step: int) -> tuple[Tensor, float, dict[str, Tensor]]:
    probe = checkpoint.probe
    conditioning = {name: torch.from_numpy(value) for name, value in probe.conditioning.items()}
    return torch.from_numpy(probe.sample[step]), float(probe.timesteps[step]), conditioning


def test_the_reference_of_a_checkpoint_is_the_quantized_network_bit_for_bit(
    tiny: SourceModel, tiny_checkpoint: Checkpoint
) -> None:
    loaded = load_fake_quantized(tiny_checkpoint, torch.device("cpu"))
    with quantized(tiny.network, tiny_checkpoint.layers, torch.from_numpy(tiny_checkpoint.timesteps)) as in_memory:
        for step in range(len(tiny_checkpoint.probe.timesteps)):
            x, timestep, conditioning = probe_inputs(tiny_checkpoint, step)
            assert torch.equal(loaded(x, timestep, **conditioning), in_memory(x, timestep, **conditioning))


def test_recorded_layers_follow_from_their_own_inputs(tiny_checkpoint: Checkpoint) -> None:
    reference = load_fake_quantized(tiny_checkpoint, torch.device("cpu"))
    x, timestep, conditioning = probe_inputs(tiny_checkpoint, 1)
    values, prediction = record(reference, x, timestep, conditioning)
    assert list(values) == [layer.spec.name for layer in tiny_checkpoint.layers]
    for layer in tiny_checkpoint.layers:
        seen = values[layer.spec.name]
        codes = quantize_input(layer, seen.input, 1)
        assert seen.codes.dtype == np.uint8
        assert (seen.codes != codes).mean() < 0.01
        if np.array_equal(seen.codes, codes):
            # float32 sums of up to 300 products
            np.testing.assert_allclose(
                seen.output, layer_output(layer, seen.input, 1), rtol=0, atol=1e-5 * np.abs(seen.output).max()
            )
    assert torch.equal(prediction, reference(x, timestep, **conditioning))
    assert not any(module._forward_hooks for module in reference.network.modules())


def test_perturbed_changes_every_layers_input_by_as_much_as_was_said() -> None:
    network, x = TwoLayers(), torch.randn(2, 4, 5, 5)
    with quantized(network, two_layers(), TIMESTEPS) as reference:
        plain, before = record(reference, x, 500, {})
        with perturbed(reference, 2.0**-7, seed=1):
            changed, during = record(reference, x, 500, {})
            again = reference(x, 500)
        after = reference(x, 500)
        with perturbed(reference, 2.0**-7, seed=1):
            repeated = reference(x, 500)
    ratio = changed["conv"].input / plain["conv"].input
    # 1 +- 2^-7 is exact in float32, the two products round once each
    np.testing.assert_allclose(np.abs(ratio - 1), 2.0**-7, rtol=1e-4)
    assert 0.3 < (ratio > 1).mean() < 0.7
    assert not torch.equal(during, before)
    assert not torch.equal(during, again)
    assert torch.equal(after, before)
    assert torch.equal(during, repeated)


def test_perturbed_reaches_the_second_layer_too() -> None:
    network, x = TwoLayers(), torch.zeros(2, 4, 5, 5)
    with quantized(network, two_layers(), TIMESTEPS) as reference:
        plain, _ = record(reference, x, 500, {})
        with perturbed(reference, 2.0**-7, seed=1):
            changed, _ = record(reference, x, 500, {})
    assert np.array_equal(changed["conv"].output, plain["conv"].output)
    np.testing.assert_allclose(np.abs(changed["proj"].input / plain["proj"].input - 1), 2.0**-7, rtol=1e-4)


def test_a_model_of_reference_layers_needs_no_source(tiny_checkpoint: Checkpoint) -> None:
    reference = load_fake_quantized(tiny_checkpoint, torch.device("cpu"))
    assert isinstance(reference, FakeQuantizedModel)
    assert not any(parameter.requires_grad for parameter in reference.network.parameters())
    names = {name for name, module in reference.network.named_modules() if isinstance(module, FakeQuantizedLayer)}
    assert names == {layer.spec.name for layer in tiny_checkpoint.layers}


@pytest.mark.parametrize("name", ["conv2d split", "conv2d grouped", "linear"])
@pytest.mark.parametrize("weights", [True, False])
def test_weights_made_for_every_evaluation_are_those_that_are_kept(name: str, weights: bool) -> None:
    layer = random_layer(SPECS[name])
    x = torch.from_numpy(random_input(layer.spec))
    weight = torch.randn(layer.spec.weight_shape, generator=torch.Generator().manual_seed(0))
    kept, made = (FakeQuantizedLayer(layer, weights=weights, weight=weight, keep=keep) for keep in (True, False))
    assert made.weight is None
    assert torch.equal(made(x), kept(x))
