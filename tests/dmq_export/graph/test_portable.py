"""The portable graph against the NumPy oracle, for every kind of layer."""

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SPECS, TIMESTEPS, conv2d, marked_model, random_input, random_layer, specs
from oracle import integer_output, layer_output, quantize_input

from dmq_export.errors import ExportError
from dmq_export.graph.export import serialized
from dmq_export.graph.lower import lower
from dmq_export.graph.portable import lower_portable
from dmq_export.layer import LayerSpec, QuantizedLayer
from engines.onnxruntime import OnnxSession


def run_portable(layer: QuantizedLayer, x: np.ndarray, timestep: float) -> tuple[np.ndarray, np.ndarray]:
    """Codes and output of the lowered layer in ONNX Runtime."""
    model = marked_model(layer.spec, x)
    lower(model, (layer,), TIMESTEPS, lower_portable)
    codes = next(v for v in ir.convenience.create_value_mapping(model.graph).values() if v.name.endswith("/codes"))
    codes.type = ir.TensorType(ir.DataType.UINT8)
    model.graph.outputs.append(codes)
    outputs = OnnxSession(serialized(model)).run({"sample": x, "timestep": np.float32(timestep)})
    return outputs[codes.name], outputs["out_sample"]


def assert_layer_equal(layer: QuantizedLayer, x: np.ndarray, timestep: float, row: int) -> None:
    codes, output = run_portable(layer, x, timestep)
    expected_codes = quantize_input(layer, x, row)
    expected = layer_output(layer, x, row)
    # float32 division may fall on the other side of a tie than float64; random inputs hit few ties
    differ = codes != expected_codes
    assert differ.mean() < 0.01
    assert np.abs(codes.astype(int) - expected_codes).max(initial=0) <= 1
    if not differ.any():
        np.testing.assert_allclose(output, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_static_layer_equals_the_oracle(name: str) -> None:
    layer = random_layer(SPECS[name])
    assert_layer_equal(layer, random_input(layer.spec), 100.0, 0)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize(("timestep", "row"), [(1000, 0), (520, 1), (700.0, 0), (699.0, 1), (0, 2)])
def test_per_step_layer_uses_the_nearest_calibrated_step(name: str, timestep: float, row: int) -> None:
    layer = random_layer(SPECS[name], steps=3)
    assert_layer_equal(layer, random_input(layer.spec), timestep, row)


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(1, 3), st.integers(0, 2**16), st.booleans())
def test_any_layer_equals_the_oracle(spec: LayerSpec, steps: int, seed: int, bias: bool) -> None:
    layer = random_layer(spec, steps=steps, seed=seed, bias=bias)
    row = steps - 1
    assert_layer_equal(layer, random_input(spec, seed=seed), float(TIMESTEPS[row]), row)


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(0, 2**16))
def test_the_integer_form_is_the_float_form(spec: LayerSpec, seed: int) -> None:
    """Section 1 of ``docs/arithmetic.md``: one integer product with shifted weights gives the same output."""
    layer, x = random_layer(spec, seed=seed), random_input(spec, seed=seed)
    expected = layer_output(layer, x)
    np.testing.assert_allclose(integer_output(layer, x), expected, rtol=0, atol=1e-12 * np.abs(expected).max())


def test_the_shifted_weights_of_four_bits_fit_int8() -> None:
    layer = random_layer(conv2d(), largest_shift=3)
    centred = layer.codes.astype(int) - layer.weight_zero_point[0].astype(int)[:, None, None, None]
    assert np.abs(centred << 3).max() <= 127


def test_four_bit_weights_take_four_bits() -> None:
    layer = random_layer(conv2d(parts=(64,), out_channels=64))
    model = marked_model(layer.spec, random_input(layer.spec))
    lower(model, (layer,), TIMESTEPS, lower_portable)
    codes = model.graph.initializers["conv/weight_codes"].const_value
    assert codes is not None
    assert codes.nbytes == layer.codes.size // 2


def test_a_layer_the_checkpoint_lacks_is_named() -> None:
    layer = random_layer(conv2d(name="other"))
    with pytest.raises(ExportError, match="layer conv: the traced graph and the checkpoint disagree"):
        lower(marked_model(conv2d(), random_input(conv2d())), (layer,), TIMESTEPS, lower_portable)
