"""AdaRound: where it starts, what it may change, and that the block's output gets better for it."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import conv2d, linear, random_input, random_layer, specs
from oracle import add_bias, along, dequantize_weight, operate, shift_of_columns
from torch import Tensor, nn

from calib.fit.adaround import SoftLayer, adaround, squared_error
from calib.model.fake_quantized import quantized
from calib.model.layers import Block
from calib.record.block_inputs import BlockRecorder
from calib.record.trajectories import Trajectories
from dmq_export.bits import Bits
from dmq_export.layer import LayerSpec, QuantizedLayer


def any_weight(spec: LayerSpec, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(spec.weight_shape).astype(np.float32))


def nearest(layer: QuantizedLayer, weight: np.ndarray) -> QuantizedLayer:
    """``layer`` with codes rounded to nearest, and no tau."""
    plain = replace(layer, tau=np.ones_like(layer.tau), bias=None)
    rank, levels = weight.ndim, 2**layer.spec.bits.weight - 1
    scale, zero_point = along(plain.weight_scale[0], rank, 0), along(plain.weight_zero_point[0].astype(int), rank, 0)
    codes = (np.rint(weight / scale) + zero_point).clip(0, levels)
    return replace(plain, codes=codes.astype(np.uint8))


def changed(old: QuantizedLayer, new: QuantizedLayer) -> set[str]:
    """Which of the layer's numbers differ."""
    tensors = new.tensors()
    assert new.spec == old.spec
    assert tensors.keys() == old.tensors().keys()
    return {name for name, value in old.tensors().items() if not np.array_equal(value, tensors[name])}


def ideal_codes(layer: QuantizedLayer, weight: np.ndarray) -> np.ndarray:
    """``W tau / s_w + z_w``, unrounded and unclipped, by part."""
    spec = layer.spec
    columns = np.ones((1, spec.in_channels)) * layer.tau
    if spec.groups > 1:
        columns = shift_of_columns(spec, layer.tau.astype(np.float64), 2)
    scaled = weight.astype(np.float64) * columns.reshape(*columns.shape, *[1] * (weight.ndim - 2))
    result, start = np.empty_like(scaled), 0
    for part, size in enumerate(spec.parts):
        at = slice(start, start + size) if len(spec.parts) > 1 else slice(None)
        start += size
        scale = along(layer.weight_scale[part].astype(np.float64), weight.ndim, 0)
        result[:, at] = scaled[:, at] / scale + along(layer.weight_zero_point[part].astype(float), weight.ndim, 0)
    return result


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(0, 2**16))
def test_a_soft_layer_starts_on_the_side_of_the_codes_it_has(spec: LayerSpec, seed: int) -> None:
    layer = random_layer(spec, seed=seed)
    soft = SoftLayer(layer, any_weight(spec, seed))
    assert np.array_equal(soft.hardened().codes, layer.codes)
    up = soft.up().detach()
    assert ((up >= 0) & (up <= 1)).all()


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(0, 2**16))
def test_codes_rounded_up_or_down_stay_up_or_down_whatever_is_learned(spec: LayerSpec, seed: int) -> None:
    weight, rng = any_weight(spec, seed), np.random.default_rng(seed)
    layer = random_layer(spec, seed=seed)
    ideal, levels = ideal_codes(layer, weight.numpy()), 2**spec.bits.weight - 1
    down, up = np.floor(ideal).clip(0, levels), np.ceil(ideal).clip(0, levels)
    start = np.where(rng.random(ideal.shape) < 0.5, down, up)
    soft = SoftLayer(replace(layer, codes=start.astype(np.uint8)), weight)
    with torch.no_grad():
        soft.logit += torch.from_numpy(rng.normal(0, 10, ideal.shape).astype(np.float32)).view_as(soft.logit)
    codes = soft.hardened().codes
    # float32 may see a weight that is a whole number of steps on its other side
    near_whole = np.abs(ideal - np.rint(ideal)) < 1e-4
    assert ((codes == down) | (codes == up) | near_whole).all()
    assert codes.max() <= levels


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(0, 2**16))
def test_codes_move_by_at_most_one_and_stay_in_range(spec: LayerSpec, seed: int) -> None:
    layer = random_layer(spec, seed=seed)
    soft = SoftLayer(layer, any_weight(spec, seed))
    with torch.no_grad():
        soft.logit.copy_(torch.where(torch.rand(soft.logit.shape) < 0.5, -50.0, 50.0))
    hard = soft.hardened()
    assert np.abs(hard.codes.astype(int) - layer.codes.astype(int)).max() <= 1
    assert hard.codes.max() < 2**spec.bits.weight
    assert changed(layer, hard) <= {"codes"}


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(0, 2**16))
def test_a_decided_soft_layer_computes_with_its_codes(spec: LayerSpec, seed: int) -> None:
    layer, x = random_layer(spec, seed=seed), random_input(spec, seed=seed)
    soft = SoftLayer(layer, any_weight(spec, seed))
    with torch.no_grad():
        soft.logit.copy_(torch.where(torch.rand(soft.logit.shape) < 0.5, -50.0, 50.0))
        output = soft(torch.from_numpy(x)).numpy()
    hard = soft.hardened()
    scaled = x / along(layer.tau.astype(np.float64), x.ndim, spec.channel_axis)
    product = operate(spec, scaled, dequantize_weight(hard))
    # float32 sums of a few dozen products
    np.testing.assert_allclose(output, add_bias(layer, product), rtol=0, atol=1e-5 * np.abs(product).max() + 1e-6)


def test_soft_weights_start_between_the_float_weight_and_its_code() -> None:
    spec = linear(parts=(40,), out_channels=30)
    weight = any_weight(spec, 0).numpy()
    layer = nearest(random_layer(spec), weight)
    soft = SoftLayer(layer, torch.from_numpy(weight))(torch.eye(40)).detach().numpy().T
    rounded = dequantize_weight(layer)
    assert ((np.minimum(weight, rounded) - 1e-6 <= soft) & (soft <= np.maximum(weight, rounded) + 1e-6)).all()
    assert (soft != rounded).mean() > 0.5


class Block2(nn.Module):
    """Two convolutions with something between them, and an argument that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(4, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 4, 3, padding=1)

    def forward(self, x: Tensor, gain: float, shift: Tensor | None = None) -> Tensor:
        return x + self.conv2(torch.tanh(self.conv1(x * gain)) + shift)


class Network(nn.Module):
    """Two blocks and a layer of its own between them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.proj, self.second = Block2(), nn.Linear(4, 4), Block2()

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        shift = (timestep / 100).expand(len(sample)).view(-1, 1, 1, 1)
        x = self.first(sample, 0.5, shift=shift)
        return (self.second(self.proj(x.movedim(1, -1)).movedim(-1, 1), 0.5, shift=shift),)


NAMES = ("first.conv1", "first.conv2", "proj", "second.conv1", "second.conv2")
BLOCKS = (Block("first", NAMES[:2]), Block("proj", ("proj",)), Block("second", NAMES[3:]))


def minmax_layer(name: str, module: nn.Module) -> QuantizedLayer:
    """A layer of 3-bit weights rounded to nearest on their min-max range."""
    weight = module.get_parameter("weight").detach().numpy()
    shape = {"name": name, "parts": (weight.shape[1],), "out_channels": len(weight), "bits": Bits(3, 8)}
    spec = linear(**shape) if isinstance(module, nn.Linear) else conv2d(**shape)
    flat = weight.reshape(len(weight), -1)
    low, high = np.minimum(flat.min(1), 0), np.maximum(flat.max(1), 0)
    scale = (high - low) / 7
    grid = replace(
        random_layer(spec, largest_shift=0),
        weight_scale=scale[None].astype(np.float32),
        weight_zero_point=np.rint(-low / scale)[None].astype(np.uint8),
    )
    return replace(nearest(grid, weight), bias=module.get_parameter("bias").detach().numpy())


@pytest.fixture(scope="module")
def network() -> Network:
    return Network().requires_grad_(False)


@pytest.fixture(scope="module")
def layers(network: Network) -> list[QuantizedLayer]:
    return [minmax_layer(name, network.get_submodule(name)) for name in NAMES]


@pytest.fixture(scope="module")
def trajectories(network: Network) -> Trajectories:
    generator = torch.Generator().manual_seed(3)
    # a common mean, so that the errors of neighbouring weights add up and nearest is far from best
    inputs = 1 + 0.5 * torch.randn(2, 12, 4, 5, 5, generator=generator)
    timesteps = torch.tensor([80.0, 20.0])
    predictions = torch.stack([network(x, t)[0] for t, x in zip(timesteps, inputs, strict=True)])
    return Trajectories(timesteps, inputs, predictions, {}, inputs[0])


def error(network: nn.Module, layers: Sequence[QuantizedLayer], trajectories: Trajectories) -> float:
    """Squared error of the prediction with rounded weights."""
    with quantized(network, layers, trajectories.timesteps, activations=False) as reference:
        outputs = [reference(x, t) for t, x in zip(trajectories.timesteps, trajectories.inputs, strict=True)]
    return float((torch.stack(outputs) - trajectories.predictions).square().sum())


def refined(
    network: nn.Module,
    layers: Sequence[QuantizedLayer],
    trajectories: Trajectories,
    blocks: Sequence[Block] = BLOCKS,
    iterations: int = 300,
    evaluations: int = 24,
    seed: int = 0,
) -> list[QuantizedLayer]:
    """Every block from where all layers are; what no block holds stays."""
    done = {layer.spec.name: layer for layer in layers}
    names = [block.name for block in blocks]
    recorder = BlockRecorder(network, names, trajectories, evaluations=evaluations, batch=4)
    for block in blocks:
        for layer in adaround(network, block, layers, recorder.take(block.name), iterations=iterations, seed=seed):
            done[layer.spec.name] = layer
    return [done[layer.spec.name] for layer in layers]


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_blocks_output_gets_better(
    network: Network, layers: list[QuantizedLayer], trajectories: Trajectories, block: Block
) -> None:
    chosen = [layer for layer in layers if layer.spec.name in block.layers]
    after = refined(network, chosen, trajectories, [block])
    assert error(network, after, trajectories) < 0.9 * error(network, chosen, trajectories)


def test_the_whole_network_gets_better_and_only_codes_change(
    network: Network, layers: list[QuantizedLayer], trajectories: Trajectories
) -> None:
    before = {name: value.clone() for name, value in network.state_dict().items()}
    modules = dict(network.named_modules())
    after = refined(network, layers[::-1], trajectories)
    assert error(network, after, trajectories) < 0.5 * error(network, layers, trajectories)
    assert [layer.spec.name for layer in after] == list(NAMES[::-1])
    for old, new in zip(layers[::-1], after, strict=True):
        assert changed(old, new) == {"codes"}
        assert np.abs(new.codes.astype(int) - old.codes.astype(int)).max() == 1
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert dict(network.named_modules()) == modules
    assert not any(module._forward_hooks for module in network.modules())


def test_the_same_seed_rounds_the_same_way_whatever_was_drawn_before(
    network: Network, layers: list[QuantizedLayer], trajectories: Trajectories
) -> None:
    def codes(seed: int) -> np.ndarray:
        chosen = refined(network, layers[:2], trajectories, BLOCKS[:1], iterations=150, seed=seed)
        return np.concatenate([layer.codes.ravel() for layer in chosen])

    one = codes(1)
    torch.manual_seed(11)
    again, other = codes(1), codes(2)
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)


def test_no_iterations_leave_the_codes(
    network: Network, layers: list[QuantizedLayer], trajectories: Trajectories
) -> None:
    after = refined(network, layers, trajectories, iterations=0)
    assert all(np.array_equal(new.codes, old.codes) for new, old in zip(after, layers, strict=True))


def test_only_as_many_evaluations_as_asked_for_count(
    network: Network, layers: list[QuantizedLayer], trajectories: Trajectories
) -> None:
    def codes(count: int, evaluations: int) -> list[np.ndarray]:
        """Fitted on trajectories of which only the first ``count`` samples are as they were."""
        inputs = trajectories.inputs.clone()
        inputs[:, count:] = -inputs[:, count:]
        changed = replace(trajectories, inputs=inputs)
        fitted = refined(network, layers[:2], changed, BLOCKS[:1], iterations=150, evaluations=evaluations)
        return [layer.codes for layer in fitted]

    # two steps: twelve evaluations are six samples
    assert all(np.array_equal(a, b) for a, b in zip(codes(12, 12), codes(6, 12), strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(codes(12, 12), codes(5, 12), strict=True))


class Chain(nn.Module):
    """``x -> 1 x -> 0.55 x``."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.a.weight, 1.0)
        nn.init.constant_(self.b.weight, 0.55)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        return (self.b(self.a(sample)),)


@pytest.mark.parametrize(("gain", "start"), [(1.1, 6), (0.9, 5)])
def test_a_block_does_not_make_up_for_the_rounding_of_those_before_it(gain: float, start: int) -> None:
    def layer(name: str, step: float, code: int) -> QuantizedLayer:
        spec = linear(name=name, parts=(1,), out_channels=1)
        return replace(
            random_layer(spec, largest_shift=0, bias=False),
            codes=np.array([[code]], np.uint8),
            weight_scale=np.array([[step]], np.float32),
            weight_zero_point=np.zeros((1, 1), np.uint8),
            tau=np.ones(1, np.float32),
        )

    # a rounds to gain (its other code, 0 or 2 gain, is worse), which b's other code would make up for; by itself b has
    # no reason to move, since 0.55 lies in the middle of two codes
    layers = [layer("a", gain, 1), layer("b", 0.1, start)]
    inputs = torch.randn(1, 64, 1, generator=torch.Generator().manual_seed(0)) * 10
    trajectories = Trajectories(torch.tensor([5.0]), inputs, inputs, {}, inputs[0])
    blocks = [Block("a", ("a",)), Block("b", ("b",))]
    after = refined(Chain().requires_grad_(False), layers, trajectories, blocks, iterations=200, evaluations=64)
    assert [int(layer.codes[0, 0]) for layer in after] == [1, start]


@pytest.mark.parametrize(("iterations", "told"), [(0, []), (7, [7]), (20, [20]), (45, [20, 20, 5])])
def test_every_iteration_is_told_once(
    network: Network, layers: list[QuantizedLayer], trajectories: Trajectories, iterations: int, told: list[int]
) -> None:
    calls = BlockRecorder(network, ["proj"], trajectories, evaluations=24, batch=4).take("proj")
    heard: list[int] = []
    adaround(network, BLOCKS[1], layers, calls, iterations=iterations, seed=0, advance=heard.append)
    assert heard == told


def test_the_error_of_a_feature_map_is_that_of_its_pixels_as_tokens() -> None:
    feature_map = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    expected = (feature_map.numpy() ** 2).sum(1).mean()
    assert squared_error(feature_map).item() == pytest.approx(expected, rel=1e-6)
    assert squared_error(feature_map.flatten(2).mT).item() == pytest.approx(expected, rel=1e-6)
