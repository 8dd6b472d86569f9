"""What overflows in the compiler's float16 overflows where a float16 graph is verified."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from hypothesis import given
from hypothesis import strategies as st
from layers import TIMESTEPS, conv2d, linear, marked_model, random_input, random_layer
from oracle import layer_output, quantize_input

from dmq_export.graph.compare import FLOAT16, LayerComparison, compare_layer
from dmq_export.graph.export import serialized
from dmq_export.graph.float16 import to_float16
from dmq_export.graph.float16_sums import float16_rounded, keep_float16_sums
from dmq_export.graph.integer import lower_integer
from dmq_export.graph.isolate import isolate_layers, isolated_inputs, isolated_outputs
from dmq_export.graph.lower import lower
from dmq_export.graph.lowered_layer import LayerValues, LoweredLayer
from dmq_export.graph.node_builder import NodeBuilder
from dmq_export.layer import LayerSpec, QuantizedLayer
from engines.onnxruntime import OnnxSession
from engines.tensorrt.compiler import Compiled, Request, compile_onnx
from engines.tensorrt.profile import ShapeRange

WIDE = linear(parts=(512,), scheme="symmetric")


def lowered(layer: QuantizedLayer, x: np.ndarray) -> tuple[ir.Model, dict[str, LoweredLayer]]:
    model = marked_model(layer.spec, x)
    lowered_layers = lower(model, (layer,), TIMESTEPS, lower_integer("tensorrt", "float16"))
    to_float16(model)
    return model, lowered_layers


def scaled_per_channel(model: ir.Model, layer: QuantizedLayer) -> None:
    """Put the weight's scale per channel back where one scale and a Mul stand for it."""
    name = layer.spec.name
    node = next(node for node in model.graph if node.name == f"{name}/weight")
    scale, rest = (model.graph.initializers[f"{name}/{each}/float16"] for each in ("weight_scale", "rest"))
    whole = (scale.const_value.numpy() * rest.const_value.numpy().ravel()).astype(np.float16)
    for value, array in ((scale, whole), (rest, np.ones_like(rest.const_value.numpy()))):
        value.const_value = ir.tensor(array, name=value.name)
        value.shape = ir.Shape(array.shape)
    node.attributes["axis"] = ir.AttrInt64("axis", int(layer.spec.kind == "linear"))


def checked(layer: QuantizedLayer, *, per_channel: bool) -> LayerComparison:
    x = random_input(layer.spec)
    model, lowered_layers = lowered(layer, x)
    if per_channel:
        scaled_per_channel(model, layer)
    isolate_layers(model, lowered_layers)
    keep_float16_sums(model)
    output = layer_output(layer, x).astype(np.float32)
    oracle = {layer.spec.name: LayerValues(x, quantize_input(layer, x), output)}
    inputs = {"sample": x, "timestep": TIMESTEPS[0], **isolated_inputs(lowered_layers, oracle, 0)}
    said = isolated_outputs(lowered_layers, OnnxSession(serialized(model)).run(inputs), 0)
    (name,) = lowered_layers
    return compare_layer(layer, lowered_layers[name], 0, oracle[name], said[name], FLOAT16)


def large_sums(spec: LayerSpec) -> QuantizedLayer:
    """A layer whose integer sums exceed 65504 and whose outputs do not."""
    layer = random_layer(spec, largest_shift=0)
    layer.codes[:] = 15
    layer.weight_zero_point[:] = 0
    layer.scale[:] = 1 / 128
    layer.tau[:] = 1
    return replace(layer, weight_scale=layer.weight_scale / 16)


def test_a_scale_per_channel_overflows_behind_a_matrix_product_and_the_layer_is_named() -> None:
    layer = large_sums(WIDE)
    assert checked(layer, per_channel=False).failure is None
    failure = checked(layer, per_channel=True).failure
    assert failure == "layer proj: its output is not finite: a sum overflows, or is no number"


def test_a_convolution_with_a_scale_per_channel_keeps_its_sums_in_float32() -> None:
    layer = large_sums(conv2d(parts=(128,), scheme="symmetric"))
    assert checked(layer, per_channel=True).failure is None


def test_sums_that_fit_are_rounded_and_no_more() -> None:
    layer = random_layer(WIDE, largest_shift=0)
    layer.codes[:, 4:] = layer.weight_zero_point[0][:, None]
    check = checked(layer, per_channel=True)
    assert check.failure is None
    assert check.output_error > 2.0**-14


@given(st.lists(st.floats(-7e4, 7e4, width=32), min_size=1, max_size=20))
def test_rounding_is_that_of_float16(values: list[float]) -> None:
    """Of every value above the subnormal numbers; what overflows is infinite, whatever its sign."""
    numbers = np.array([value if abs(value) > 2.0**-14 else 0 for value in values], np.float32)
    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(numbers.shape)
    x = ir.Value(name="x", shape=shape, type=kind)
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="rounding")
    builder = NodeBuilder(graph, "y")
    rounded = float16_rounded(builder, x)
    rounded.shape, rounded.type = shape, kind
    graph.extend(builder.nodes)
    graph.outputs.append(rounded)
    (answer,) = OnnxSession(serialized(ir.Model(graph, ir_version=10))).run({"x": numbers}).values()
    with np.errstate(over="ignore"):
        expected = numbers.astype(np.float16).astype(np.float32)
    expected = np.where(np.isinf(expected), np.inf, expected)
    np.testing.assert_array_equal(answer, expected)


def test_the_compiler_scales_a_sum_before_it_writes_it_where_a_weight_has_one_scale(tmp_path: Path) -> None:
    """``s_x * s_w`` is a constant of the engine, in float32, and what the product writes is float16."""
    layer = random_layer(linear(parts=(64,), out_channels=32, scheme="symmetric"), largest_shift=0)
    x = random_input(layer.spec, batch=1, size=128)
    model, _ = lowered(layer, x)
    ir.save(model, tmp_path / "model.onnx")
    shapes = {"sample": ShapeRange(x.shape, x.shape, x.shape)}
    compiled = compile_onnx(Request(tmp_path / "model.onnx", shapes, ((8, 9),)))
    assert isinstance(compiled, Compiled)
    (product,) = (kernel for kernel in compiled.table.kernels if kernel.integer)
    assert [tensor.type for tensor in product.outputs] == ["Half"]
    s_x, s_w = (
        model.graph.initializers[f"proj/{name}/float16"].const_value.numpy() for name in ("scale", "weight_scale")
    )
    assert struct.pack("<f", np.float32(s_x) * np.float32(s_w)) in compiled.engine
