"""The integer graphs against the NumPy oracle: every kind of layer, both targets, every form of activation range."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SPECS, TIMESTEPS, conv2d, linear, marked_model, random_input, random_layer, specs
from oracle import layer_output, quantize_input

from dmq_export.bits import Bits
from dmq_export.errors import ExportError
from dmq_export.graph.compare import LayerComparison, compare_layer
from dmq_export.graph.export import serialized
from dmq_export.graph.integer import lower_integer
from dmq_export.graph.isolate import isolate_layers, isolated_inputs, isolated_outputs
from dmq_export.graph.lower import lower
from dmq_export.graph.lowered_layer import LayerValues
from dmq_export.layer import LayerSpec, QuantizedLayer
from dmq_export.target import Target
from engines.onnxruntime import OnnxSession

TARGETS: tuple[Target, ...] = ("tensorrt", "openvino")
FITTING = {name: spec for name, spec in SPECS.items() if spec.bits.weight < 8}


def lowered(layer: QuantizedLayer, x: np.ndarray, target: Target) -> ir.Model:
    model = marked_model(layer.spec, x)
    lower(model, (layer,), TIMESTEPS, lower_integer(target))
    return model


def checked(layer: QuantizedLayer, x: np.ndarray, target: Target, row: int) -> LayerComparison:
    """The lowered layer's pieces, each given the oracle's values, compared with the oracle."""
    spec = layer.spec
    model = marked_model(spec, x)
    lowered_layers = lower(model, (layer,), TIMESTEPS, lower_integer(target))
    isolate_layers(model, lowered_layers)
    codes = quantize_input(layer, x, row)
    oracle = {spec.name: LayerValues(x, codes, layer_output(layer, x, row).astype(np.float32))}
    inputs = {"sample": x, "timestep": TIMESTEPS[row], **isolated_inputs(lowered_layers, oracle, row)}
    outputs = isolated_outputs(lowered_layers, OnnxSession(serialized(model)).run(inputs), row)
    return compare_layer(layer, lowered_layers[spec.name], row, oracle[spec.name], outputs[spec.name])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("activation", [8, 6])
@pytest.mark.parametrize("name", FITTING)
def test_codes_and_outputs_are_the_oracles(name: str, activation: int, scheme: str, steps: int, target: Target) -> None:
    spec = replace(FITTING[name], bits=Bits(FITTING[name].bits.weight, activation), scheme=scheme)
    layer = random_layer(spec, steps=steps)
    check = checked(layer, random_input(spec), target, steps - 1)
    assert check.failure is None
    assert check.ties <= 1


@settings(max_examples=80, deadline=None)
@given(specs(), st.sampled_from(TARGETS), st.integers(1, 3), st.integers(0, 2**16), st.booleans(), st.integers(0, 3))
def test_any_layer_is_the_oracles_or_is_refused_by_name(
    spec: LayerSpec, target: Target, steps: int, seed: int, bias: bool, largest_shift: int
) -> None:
    layer = random_layer(spec, steps=steps, seed=seed, bias=bias, largest_shift=largest_shift)
    x = random_input(spec, seed=seed)
    lift = max(int(np.ptp(layer.shift[channels])) for channels in spec.part_slices())
    if (2**spec.bits.weight - 1) << lift > 127:
        with pytest.raises(ExportError, match=f"^layer {spec.name}: {spec.bits.weight}-bit weights shifted by"):
            checked(layer, x, target, steps - 1)
    else:
        assert checked(layer, x, target, steps - 1).failure is None


@pytest.mark.parametrize("target", TARGETS)
def test_the_whole_graph_is_its_pieces_joined(target: Target) -> None:
    layer, x = random_layer(conv2d(), steps=3), random_input(conv2d())
    answer = OnnxSession(serialized(lowered(layer, x, target))).run({"sample": x, "timestep": np.float32(520)})
    expected = layer_output(layer, x, 1)
    np.testing.assert_allclose(answer["out_sample"], expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_a_static_symmetric_layer_without_factors_is_the_plain_pattern() -> None:
    layer = random_layer(conv2d(scheme="symmetric"), largest_shift=0)
    layer.tau[:] = 1
    layer.weight_scale[:] = 0.5
    model = lowered(layer, random_input(conv2d()), "tensorrt")
    assert sorted(ops(model)) == ["Conv", "DequantizeLinear", "DequantizeLinear", "Identity", "QuantizeLinear"]


@pytest.mark.parametrize(
    ("spec", "steps", "target", "expected"),
    [
        (conv2d(), 1, "tensorrt", {"Mul", "Pad", "Add"}),
        (conv2d(padding=(0, 0)), 1, "tensorrt", {"Mul", "Add"}),
        (conv2d(bits=Bits(4, 6)), 1, "tensorrt", {"Mul", "Clip", "Add"}),
        (conv2d(), 1, "openvino", {"Mul"}),
        (linear(), 1, "tensorrt", {"Mul", "Add"}),
        (linear(scheme="symmetric"), 3, "tensorrt", {"Mul", "Gather", "Split", "Squeeze", "Add"}),
    ],
)
def test_only_what_a_layer_needs_is_there(spec: LayerSpec, steps: int, target: Target, expected: set[str]) -> None:
    plain = {"QuantizeLinear", "DequantizeLinear", "Conv", "MatMul", "Identity", "Sub", "Abs", "ArgMin"}
    model = lowered(random_layer(spec, steps=steps), random_input(spec), target)
    assert set(ops(model)) - plain == expected | ({"Add"} if spec.kind == "linear" else set())


@pytest.mark.parametrize("name", FITTING)
@pytest.mark.parametrize("bits", [6, 8])
def test_tensorrt_gets_one_constant_scale_per_tensor_and_dq_next_to_the_operator(name: str, bits: int) -> None:
    spec = replace(FITTING[name], bits=Bits(4, bits))
    model = lowered(random_layer(spec, steps=3), random_input(spec), "tensorrt")
    for node in model.graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            scale = node.inputs[1].const_value.numpy()
            assert (scale > 0).all()
            assert scale.ndim == 0
            assert len(node.inputs) < 3 or (
                node.inputs[2].dtype == ir.DataType.INT8 and not node.inputs[2].const_value.numpy().any()
            )
        if node.op_type in ("Conv", "MatMul"):
            assert [value.producer().op_type for value in node.inputs[:2]] == ["DequantizeLinear"] * 2
        if node.op_type == "Pad":
            assert len(node.inputs) == 2  # zeros


def test_the_halves_of_a_shortcut_read_what_was_concatenated() -> None:
    spec = conv2d(parts=(4, 3), kernel=(1, 1), padding=(0, 0))
    x = random_input(spec)
    model = marked_model(spec, x)
    node = model.graph[0]
    halves = [ir.Value(name=f"half{i}", shape=ir.Shape(["batch", size, 5, 5])) for i, size in enumerate((4, 3))]
    for half in halves:
        half.type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.inputs.extend(halves)
    concat = ir.node("Concat", halves, {"axis": 1}, num_outputs=1)
    concat.outputs[0].shape = ir.Shape(["batch", 7, 5, 5])
    concat.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    model.graph.insert_before(node, concat)
    node.replace_input_with(0, concat.outputs[0])
    layer = random_layer(spec)
    lower(model, (layer,), TIMESTEPS, lower_integer("tensorrt"))
    assert "Slice" not in ops(model)
    inputs = {"sample": x, "timestep": np.float32(100), "half0": x[:, :4], "half1": x[:, 4:]}
    expected = layer_output(layer, x)
    answer = OnnxSession(serialized(model)).run(inputs)["out_sample"]
    np.testing.assert_allclose(answer, expected, rtol=0, atol=1e-5 * np.abs(expected).max())
