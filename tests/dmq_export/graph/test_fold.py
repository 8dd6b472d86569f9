"""Factors move where that is exact, stay where it is not, and the network computes what it did."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from layers import conv2d, linear, random_layer
from oracle import layer_output, operate

from dmq_export.graph.export import serialized
from dmq_export.graph.fold import fold_factors
from dmq_export.graph.fold_rules import BlockedError, factor_path, reshaped
from dmq_export.graph.lower import lower
from dmq_export.graph.portable import lower_portable
from dmq_export.layer import QuantizedLayer
from engines.onnxruntime import OnnxSession

Values = dict[str, ir.Value]
RNG = np.random.default_rng(0)
TIMESTEPS = np.array([100], np.float32)


class Network:
    """A graph under construction: ``network("Op", inputs, shape)`` adds a node."""

    def __init__(self, *shape: int | str) -> None:
        self.x = ir.Value(name="sample", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        self.graph = ir.Graph([self.x], [], nodes=[], opset_imports={"": 21, "dmq": 1}, name="network")
        self.count = 0

    def __call__(self, op: str, inputs: list[ir.Value], shape: tuple[int | str, ...], **attributes: object) -> ir.Value:
        self.count += 1
        domain = "dmq" if op == "Layer" else ""
        out = ir.Value(name=f"v{self.count}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))
        node = ir.node(op, inputs, attributes, domain=domain, outputs=[out], name=f"n{self.count}")
        self.graph.append(node)
        return out

    def constant(self, array: np.ndarray) -> ir.Value:
        self.count += 1
        tensor = ir.tensor(array, name=f"c{self.count}")
        value = ir.Value(
            name=f"c{self.count}", shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
        self.graph.register_initializer(value)
        return value

    def floats(self, *shape: int) -> ir.Value:
        return self.constant(RNG.uniform(0.5, 2, shape).astype(np.float32))

    def model(self, y: ir.Value) -> ir.Model:
        self.graph.outputs.append(self("Identity", [y], tuple(y.shape)))
        return ir.Model(self.graph, ir_version=10)


def answer(model: ir.Model, layers: tuple[QuantizedLayer, ...], x: np.ndarray) -> np.ndarray:
    copy = model.clone()
    lower(copy, layers, TIMESTEPS, lower_portable)
    (output,) = OnnxSession(serialized(copy)).run({"sample": x}).values()
    return output


def fold(model: ir.Model, layers: tuple[QuantizedLayer, ...], x: np.ndarray) -> tuple[list[str], list[str]]:
    """Fold, check that the network answers as before but for codes at ties, and say which layers lost and gained."""
    before = answer(model, layers, x)
    folding = fold_factors(model, layers)
    after = answer(model, folding.layers, x)
    assert np.abs(after - before).max() < 1e-5 * np.abs(before).max()
    assert set(folding.stays) | set(folding.input_factor) == {layer.spec.name for layer in layers}
    for layer in folding.layers:
        if layer.spec.name in folding.input_factor:
            assert np.array_equal(layer.tau, np.exp2(layer.shift))
    return sorted(folding.input_factor), sorted(folding.output_factor)


TOKENS = ("batch", 6, 8)
Build = Callable[[Network], ir.Value]


def layer_norm(net: Network) -> ir.Value:
    return net("LayerNormalization", [net.x, net.floats(8), net.floats(8)], TOKENS, axis=-1)


def group_norm(net: Network) -> ir.Value:
    turned = net("Transpose", [net.x], ("batch", 8, 6), perm=[0, 2, 1])
    norm = net("GroupNormalization", [turned, net.floats(8), net.floats(8)], ("batch", 8, 6), num_groups=2)
    return net("Transpose", [norm], TOKENS, perm=[0, 2, 1])


def float_linear(net: Network) -> ir.Value:
    product = net("MatMul", [net.x, net.floats(8, 8)], TOKENS)
    return net("Add", [product, net.floats(8)], TOKENS)


def heads(net: Network) -> ir.Value:
    """The value side of attention: rows of a float linear, split in heads, weighted and joined."""
    values = net("MatMul", [net.x, net.floats(8, 8)], TOKENS)
    split = net("Reshape", [values, net.constant(np.array([-1, 6, 2, 4]))], ("batch", 6, 2, 4))
    split = net("Transpose", [split], ("batch", 2, 6, 4), perm=[0, 2, 1, 3])
    weights = net("Softmax", [net.floats(1, 2, 6, 6)], (1, 2, 6, 6), axis=-1)
    mixed = net("MatMul", [weights, split], ("batch", 2, 6, 4))
    mixed = net("Transpose", [mixed], ("batch", 6, 2, 4), perm=[0, 2, 1, 3])
    return net("Reshape", [mixed, net.constant(np.array([-1, 6, 8]))], TOKENS)


def gated(net: Network) -> ir.Value:
    """GEGLU: the value half takes the factor, the gate does not."""
    both = net("MatMul", [net.x, net.floats(8, 16)], ("batch", 6, 16))
    outputs = [ir.Value(name=f"half{i}", shape=ir.Shape(TOKENS), type=ir.TensorType(ir.DataType.FLOAT)) for i in (0, 1)]
    net.graph.append(ir.node("Split", [both], {"axis": 2, "num_outputs": 2}, outputs=outputs, name="split"))
    gate = net("Gelu", [outputs[1]], TOKENS)
    return net("Mul", [outputs[0], gate], TOKENS)


@pytest.mark.parametrize("build", [layer_norm, group_norm, float_linear, heads, gated], ids=lambda f: f.__name__)
def test_a_factor_moves_into_what_is_linear_in_its_channel(build: Build) -> None:
    net = Network(*TOKENS)
    y = net("Layer", [build(net)], ("batch", 6, 5), layer="proj")
    layer = random_layer(linear())
    layer.shift[:] = 0
    assert fold(net.model(y), (layer,), RNG.standard_normal((2, 6, 8)).astype(np.float32)) == (["proj"], [])


def silu(net: Network) -> ir.Value:
    return net("Mul", [net.x, net("Sigmoid", [net.x], TOKENS)], TOKENS)


def gelu(net: Network) -> ir.Value:
    return net("Gelu", [net.x], TOKENS)


def read_twice(net: Network) -> ir.Value:
    norm = layer_norm(net)
    net.graph.outputs.append(net("Identity", [norm], TOKENS))
    return norm


def tokens_mixed(net: Network) -> ir.Value:
    return net("MatMul", [net("Softmax", [net.floats(1, 6, 6)], (1, 6, 6)), net.x], TOKENS)


def network_input(net: Network) -> ir.Value:
    return net.x


@pytest.mark.parametrize("build", [silu, gelu, read_twice, tokens_mixed, network_input], ids=lambda f: f.__name__)
def test_a_factor_stays_where_it_cannot_pass_and_nothing_changes(build: Build) -> None:
    net = Network(*TOKENS)
    y = net("Layer", [build(net)], ("batch", 6, 5), layer="proj")
    model = net.model(y)
    before = {name: value.const_value.numpy().tobytes() for name, value in model.graph.initializers.items()}
    layer = random_layer(linear())
    folding = fold_factors(model, [layer])
    assert list(folding.stays) == ["proj"]
    assert folding.layers == (layer,)
    assert {name: value.const_value.numpy().tobytes() for name, value in model.graph.initializers.items()} == before


def test_a_factor_moves_into_the_rows_of_the_quantized_layer_before() -> None:
    net = Network(*TOKENS)
    first = net("Layer", [net.x], TOKENS, layer="first")
    y = net("Layer", [first], ("batch", 6, 5), layer="proj")
    layers = (random_layer(linear(name="first", out_channels=8)), random_layer(linear(), seed=1))
    model = net.model(y)
    folding = fold_factors(model, layers)
    assert list(folding.input_factor) == ["proj"]
    assert list(folding.output_factor) == ["first"]
    x = RNG.standard_normal((2, 6, 8)).astype(np.float32)
    factor = np.exp2(layers[1].shift) / layers[1].tau
    np.testing.assert_allclose(layer_output(folding.layers[0], x), layer_output(layers[0], x) * factor, rtol=1e-6)
    np.testing.assert_allclose(folding.output_factor["first"], factor, rtol=1e-6)


@pytest.mark.parametrize("agree", [True, False])
def test_layers_that_share_an_input_must_agree(agree: bool) -> None:
    net = Network(*TOKENS)
    norm = layer_norm(net)
    pair = [net("Layer", [norm], ("batch", 6, 5), layer=name) for name in ("to_q", "to_k")]
    y = net("Add", pair, ("batch", 6, 5))
    layers = [random_layer(linear(name=name), seed=seed) for seed, name in enumerate(("to_q", "to_k"))]
    if agree:
        layers[1] = replace(layers[1], tau=layers[0].tau, shift=layers[0].shift)
    folding = fold_factors(net.model(y), layers)
    assert sorted(folding.input_factor) == (["to_k", "to_q"] if agree else [])
    assert set(folding.stays.values()) == (set() if agree else {"layers that share its input have other factors"})


def test_a_constant_that_others_read_is_copied() -> None:
    net = Network(*TOKENS)
    scale = net.floats(8)
    norms = [net("LayerNormalization", [net.x, scale], TOKENS, axis=-1) for _ in range(2)]
    first = net("Layer", [norms[0]], ("batch", 6, 5), layer="proj")
    second = net("MatMul", [norms[1], net.floats(8, 5)], ("batch", 6, 5))
    before = scale.const_value.numpy().copy()
    model = net.model(net("Add", [first, second], ("batch", 6, 5)))
    assert fold(model, (random_layer(linear()),), RNG.standard_normal((2, 6, 8)).astype(np.float32))[0] == ["proj"]
    assert np.array_equal(norms[1].producer().inputs[1].const_value.numpy(), before)


def test_a_factor_passes_a_resize_and_both_sides_of_a_sum_of_convolutions() -> None:
    net = Network("batch", 4, 3, 3)
    conv = net("Conv", [net.x, net.floats(4, 4, 1, 1), net.floats(4)], ("batch", 4, 3, 3))
    other = net("Layer", [net.x], ("batch", 4, 3, 3), layer="other")
    total = net("Add", [conv, other], ("batch", 4, 3, 3))
    scales = net.constant(np.array([1, 1, 2, 2], np.float32))
    large = net("Resize", [total, None, scales], ("batch", 4, 6, 6), mode="nearest")
    y = net("Layer", [large], ("batch", 6, 6, 6), layer="conv")
    layers = (random_layer(conv2d(name="other", out_channels=4)), random_layer(conv2d(), seed=1))
    folding = fold_factors(net.model(y), layers)
    assert list(folding.input_factor) == ["conv"]
    assert list(folding.output_factor) == ["other"]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_a_reshaped_factor_multiplies_the_same_elements(new: list[int], data: st.DataObject) -> None:
    size = int(np.prod(new))
    first = data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    second = data.draw(st.sampled_from([n for n in range(1, size // first + 1) if (size // first) % n == 0]))
    old = [first, second, size // first // second]
    shape = [data.draw(st.sampled_from([1, n])) for n in new]
    factor = np.arange(1.0, 1 + np.prod(shape)).reshape(shape)
    whole = np.broadcast_to(factor, new).reshape(old)
    got = reshaped(factor, list(new), list(old))
    assert np.array_equal(np.broadcast_to(got, old), whole)


def test_a_reshape_that_mixes_the_batch_blocks() -> None:
    with pytest.raises(BlockedError, match="Reshape"):
        reshaped(np.ones((1, 8)) * 2, [ir.SymbolicDim("n"), 8], [8, ir.SymbolicDim("n")])


def test_a_float_convolution_takes_the_factor_in_its_rows() -> None:
    net = Network("batch", 4, 3, 3)
    conv = net("Conv", [net.x, net.floats(5, 4, 1, 1), net.floats(5)], ("batch", 5, 3, 3))
    net.graph.outputs.append(conv)
    weight, bias = (value.const_value.numpy().copy() for value in conv.producer().inputs[1:])
    factor = np.arange(1.0, 6)
    factor_path(conv, factor.reshape(1, 5, 1, 1)).apply()
    after = [value.const_value.numpy() for value in conv.producer().inputs[1:]]
    x = RNG.standard_normal((2, 4, 3, 3))
    spec = conv2d(parts=(4,), out_channels=5, kernel=(1, 1), padding=(0, 0))
    np.testing.assert_allclose(
        operate(spec, x, after[0]), operate(spec, x, weight) * factor.reshape(1, 5, 1, 1), rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(after[1], bias * factor, rtol=1e-6)
