"""The int8 carrier is the integer product's weight, or the layer is refused by name."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import conv2d, linear, random_layer, specs
from oracle import dequantize_weight, shift_of_columns

from dmq_export.bits import Bits
from dmq_export.errors import ExportError
from dmq_export.graph.int8_weights import lifted_weights
from dmq_export.layer import LayerSpec
from dmq_export.target import FloatType, Target

TARGETS: tuple[Target, ...] = ("tensorrt", "openvino")
DTYPES: tuple[FloatType, ...] = ("float32", "float16")


@settings(max_examples=100, deadline=None)
@given(specs(), st.sampled_from(TARGETS), st.integers(0, 3), st.integers(0, 2**16))
def test_a_carrier_is_the_weight_that_meets_the_unshifted_input_or_is_refused(
    spec: LayerSpec, target: Target, largest_shift: int, seed: int
) -> None:
    layer = random_layer(spec, seed=seed, largest_shift=largest_shift)
    for part, channels in enumerate(spec.part_slices()):
        shift = layer.shift[channels].astype(int)
        reach = (2**spec.bits.weight - 1) << (shift.max() - shift.min())
        if reach > 127:
            with pytest.raises(ExportError, match=f"layer {spec.name}: {spec.bits.weight}-bit weights .* {reach}"):
                lifted_weights(layer, part, target)
            continue
        weights = lifted_weights(layer, part, target)
        columns = channels if len(spec.parts) > 1 else slice(None)
        expected = dequantize_weight(layer)[:, columns] * 2.0 ** -shift_of_columns(spec, shift, layer.codes.ndim)
        channel = (-1, *[1] * (layer.codes.ndim - 1))
        rows = weights.scale.astype(np.float64).reshape(channel) * weights.gain.astype(np.float64).reshape(channel)
        assert weights.codes.dtype == np.int8
        assert np.abs(weights.codes.astype(int)).max() <= 127
        np.testing.assert_array_equal(rows * weights.codes, expected)
        np.testing.assert_allclose(
            weights.gain * weights.sums(),
            expected.reshape(len(expected), -1).sum(1),
            rtol=1e-12,
            atol=1e-12 * np.abs(expected).max(),
        )


@pytest.mark.parametrize("shift", range(4))
def test_four_bits_fit_with_every_shift(shift: int) -> None:
    layer = random_layer(conv2d(), largest_shift=shift)
    assert lifted_weights(layer, 0, "tensorrt").codes.shape == layer.codes.shape


@pytest.mark.parametrize(("bits", "shift", "reach"), [(8, 0, 255), (5, 3, 248), (7, 1, 254), (6, 2, 252)])
def test_the_bound_is_on_what_the_bits_can_hold_not_on_what_they_do(bits: int, shift: int, reach: int) -> None:
    layer = random_layer(linear(name="a.b", bits=Bits(bits, 8)))
    layer.shift[:] = 0
    layer.shift[0] = shift
    layer.codes[:] = layer.weight_zero_point[0][:, None]  # every weight is zero
    with pytest.raises(ExportError, match=rf"^layer a\.b: {bits}-bit weights shifted by {shift} reach {reach}, .*127"):
        lifted_weights(layer, 0, "tensorrt")


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensorrt_gets_one_power_of_two_that_no_scale_exceeds(dtype: FloatType) -> None:
    layer = random_layer(linear())
    weights = lifted_weights(layer, 0, "tensorrt", dtype)
    largest = np.ldexp(layer.weight_scale[0], -int(layer.shift.max())).max()
    assert weights.scale.shape == ()
    assert largest <= weights.scale < 2 * largest
    assert np.frexp(weights.scale)[0] == 0.5
    assert weights.gain.max() <= 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_below_what_float16_holds_leave_a_scale_that_it_holds(dtype: FloatType) -> None:
    layer = random_layer(linear(), largest_shift=0)
    layer.weight_scale[:] = np.float32(2.0**-20)
    weights = lifted_weights(layer, 0, "tensorrt", dtype)
    assert (weights.scale, weights.gain) == (2.0**-14, 2.0**-6)


def test_openvino_gets_a_scale_per_channel() -> None:
    weights = lifted_weights(random_layer(linear()), 0, "openvino")
    assert len(weights.scale) == linear().out_channels
    assert (weights.gain == 1).all()


def test_a_shift_that_all_channels_share_costs_no_bits() -> None:
    layer = random_layer(linear(bits=Bits(7, 8)))
    layer.shift[:] = 3
    weights = lifted_weights(layer, 0, "openvino")
    centred = layer.codes.astype(int) - layer.weight_zero_point[0].astype(int)[:, None]
    assert np.array_equal(weights.codes, centred)
    assert np.array_equal(weights.scale, layer.weight_scale[0] / 8)


def test_a_row_of_zeros_has_a_scale_that_no_float_type_loses() -> None:
    layer = random_layer(linear())
    layer.codes[2] = layer.weight_zero_point[0, 2]
    layer.weight_scale[0, 2] = 1e-30
    weights = lifted_weights(layer, 0, "tensorrt", "float16")
    assert weights.gain[2] == 1
    assert lifted_weights(layer, 0, "openvino").scale[2] == weights.scale
