"""What the shifts add is taken out again, exactly in the numbers that the graph holds."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import conv2d, linear, random_layer, specs
from oracle import dequantize_weight, shift_of_columns

from dmq_export.graph.activation_codes import ActivationCodes, part_activation_codes
from dmq_export.graph.bias_correction import BiasCorrection, bias_correction
from dmq_export.graph.int8_weights import lifted_weights
from dmq_export.layer import LayerSpec, QuantizedLayer
from dmq_export.target import FloatType, Target

DTYPES = ("float32", "float16")
TARGETS = ("tensorrt", "openvino")


def corrected(layer: QuantizedLayer, target: Target, dtype: FloatType) -> tuple[list[ActivationCodes], BiasCorrection]:
    parts = range(len(layer.spec.parts))
    activations = [part_activation_codes(layer, part, target, dtype) for part in parts]
    part_weights = [lifted_weights(layer, part, target, dtype) for part in parts]
    return activations, bias_correction(layer, activations, part_weights, dtype)


def gains(layer: QuantizedLayer, part: int, target: Target, dtype: FloatType) -> np.ndarray:
    """``[O]``: what is multiplied behind a part's product."""
    return np.broadcast_to(lifted_weights(layer, part, target, dtype).gain, layer.spec.out_channels).astype(np.float64)


def weight_sums(layer: QuantizedLayer, part: int, target: Target, dtype: FloatType) -> np.ndarray:
    """``[O]``: the sum of a part's weights that meet the unshifted input, their scale as ``dtype`` holds it."""
    shift = layer.shift[layer.spec.part_slices()[part]].astype(int)
    columns = layer.spec.part_slices()[part] if len(layer.spec.parts) > 1 else slice(None)
    weight = dequantize_weight(layer)[:, columns]
    sums = (weight * 2.0 ** -shift_of_columns(layer.spec, shift, weight.ndim)).reshape(len(weight), -1).sum(1)
    scale = np.ldexp(layer.weight_scale[part].astype(np.float64), -shift.max())
    common = 2.0 ** np.ceil(np.log2(scale.max())) if target == "tensorrt" else 1.0
    held = (scale / common).astype(np.float32).astype(dtype).astype(np.float64)
    return sums * (held * common / scale)


@settings(max_examples=100, deadline=None)
@given(specs(), st.sampled_from(TARGETS), st.sampled_from(DTYPES), st.integers(1, 3), st.integers(0, 2**16))
def test_a_layer_of_zeros_gives_its_bias(
    spec: LayerSpec, target: Target, dtype: FloatType, steps: int, seed: int
) -> None:
    """Where ``q_x = z`` everywhere, the kernel sees the shift alone."""
    layer = random_layer(replace(spec, bits=replace(spec.bits, weight=3)), steps=steps, seed=seed)
    activations, result = corrected(layer, target, dtype)
    for row in range(steps):
        total, size = np.zeros(spec.out_channels), 1.0
        for part, activation in enumerate(activations):
            gain, shift = (float(table[min(row, len(table) - 1)]) for table in (activation.gain, activation.shift))
            added = float(activation.scale) * shift * weight_sums(layer, part, target, dtype)
            inner = result.inner[part]
            total += gain * (added + (0 if inner is None else inner * gains(layer, part, target, dtype)))
            size += np.abs(added).max()
        if result.outer is not None:
            total += result.outer[min(row, len(result.outer) - 1)]
        np.testing.assert_allclose(total, layer.bias, rtol=0, atol=1e-6 * size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_leaves_only_what_varies_to_the_outer_addition(dtype: FloatType) -> None:
    layer = random_layer(conv2d(), steps=3, bias=False)
    layer.scale[:] = 0.5
    layer.zero_point[:, 0] = 20, 30, 24
    _, result = corrected(layer, "tensorrt", dtype)
    sums = 0.5 * np.abs(weight_sums(layer, 0, "tensorrt", dtype)).max()
    rounding = 0 if dtype == "float32" else 103 * sums * 2.0**-11
    assert result.added == pytest.approx([108 * sums, 98 * sums, 104 * sums])
    assert result.left == pytest.approx([5 * sums, 5 * sums, sums], abs=1e-5 * sums + rounding)


def test_a_matrix_product_leaves_all_of_it() -> None:
    _, result = corrected(random_layer(linear(), steps=3), "tensorrt", "float32")
    assert result.inner == (None,)
    np.testing.assert_array_equal(result.left, result.added)


@pytest.mark.parametrize(
    ("dtype", "scheme", "outer"),
    [("float32", "asymmetric", False), ("float16", "asymmetric", True), ("float16", "symmetric", False)],
)
def test_a_static_convolution_adds_once_where_its_bias_holds_it_all(dtype: FloatType, scheme: str, outer: bool) -> None:
    layer = random_layer(conv2d(scheme=scheme))
    layer.weight_scale[:] = 0.5  # nothing is multiplied behind it
    _, result = corrected(layer, "tensorrt", dtype)
    assert result.inner[0] is not None
    assert (result.outer is not None) is outer


def test_a_bias_is_added_behind_the_gain_of_the_weights() -> None:
    layer = random_layer(conv2d(scheme="symmetric"))
    _, result = corrected(layer, "tensorrt", "float32")
    assert result.inner == (None,)
    np.testing.assert_array_equal(result.outer, layer.bias[None])


def test_a_bias_that_no_step_changes_is_one_row() -> None:
    layer = random_layer(conv2d(scheme="symmetric"), steps=3)
    _, result = corrected(layer, "tensorrt", "float32")
    assert result.inner == (None,)
    np.testing.assert_array_equal(result.outer, layer.bias[None])


def test_nothing_is_added_to_a_layer_without_bias_and_shift() -> None:
    _, result = corrected(random_layer(conv2d(scheme="symmetric"), steps=3, bias=False), "tensorrt", "float32")
    assert (result.inner, result.outer) == ((None,), None)
    assert not result.added.any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_inside_the_operator_is_one_that_the_graph_holds(dtype: FloatType) -> None:
    layer = random_layer(conv2d(parts=(4, 3), kernel=(1, 1), padding=(0, 0)), steps=3)
    activations, result = corrected(layer, "tensorrt", dtype)
    part_weights = [lifted_weights(layer, part, "tensorrt", dtype) for part in range(2)]
    inside = [*result.inner, *(weights.scale for weights in part_weights), *(weights.gain for weights in part_weights)]
    inside += [number for each in activations for number in (each.scale, each.gain, each.ratio, each.factor)]
    for values in inside:
        np.testing.assert_array_equal(values, np.asarray(values).astype(dtype))
