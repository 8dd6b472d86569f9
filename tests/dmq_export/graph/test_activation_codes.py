"""Activation codes are the quantizer of ``docs/arithmetic.md`` in other codes, whatever the target."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import linear, random_input, random_layer, specs
from oracle import along, dequantize_input, quantize_input

from dmq_export.bits import Bits
from dmq_export.graph.activation_codes import ActivationCodes, part_activation_codes
from dmq_export.layer import LayerSpec
from dmq_export.target import Target

TARGETS = ("tensorrt", "openvino")


def row_of(table: np.ndarray, row: int) -> np.ndarray:
    return table[min(row, len(table) - 1)]


def codes_of(activation: ActivationCodes, spec: LayerSpec, x: np.ndarray, row: int) -> np.ndarray:
    """What the kernel's quantizer makes of ``x`` after the Mul, Add and Clip, in float64."""
    scale = float(activation.scale)
    factor = activation.factor.astype(np.float64) * row_of(activation.ratio, row)
    factor = np.broadcast_to(factor, x.shape[spec.channel_axis])
    v = x * along(factor, x.ndim, spec.channel_axis) + float(row_of(activation.shift, row)) * scale
    if activation.bounds is not None:
        v = v.clip(*(row_of(activation.bounds, row) * scale))
    lowest = 0 if activation.container is np.uint8 else -128
    return (np.rint(v / scale) + activation.zero_point).clip(lowest, lowest + 255)


@settings(max_examples=150, deadline=None)
@given(specs(), st.sampled_from(TARGETS), st.integers(1, 3), st.integers(0, 2**16))
def test_codes_are_the_layers_codes_less_the_offset(spec: LayerSpec, target: Target, steps: int, seed: int) -> None:
    layer, x = random_layer(spec, steps=steps, seed=seed), random_input(spec, seed=seed)
    for row in range(steps):
        expected, rounded = quantize_input(layer, x, row), dequantize_input(layer, quantize_input(layer, x, row), row)
        for part, channels in enumerate(spec.part_slices()):
            at = (slice(None), channels) if spec.channel_axis == 1 else (..., channels)
            activation = part_activation_codes(layer, part, target)
            codes = codes_of(activation, spec, x[at], row)
            differ = codes + row_of(activation.offset, row) - expected[at]
            assert np.abs(differ).max() <= 1  # a factor rounded to float32 may cross a tie
            assert (differ != 0).mean() < 0.01
            gain, shift = float(row_of(activation.gain, row)), float(row_of(activation.shift, row))
            given = float(activation.scale) * (codes - differ - activation.zero_point)
            value = gain * (given - float(activation.scale) * shift)
            steps_ = along(2.0 ** -layer.shift[channels].astype(float), x.ndim, spec.channel_axis)
            np.testing.assert_allclose(value * steps_, rounded[at], rtol=1e-6, atol=1e-4 * np.abs(rounded).max())


@pytest.mark.parametrize("bits", [6, 8])
@pytest.mark.parametrize("steps", [1, 3])
def test_tensorrt_has_int8_codes_and_no_zero_point(bits: int, steps: int) -> None:
    activation = part_activation_codes(random_layer(linear(bits=Bits(4, bits)), steps=steps), 0, "tensorrt")
    assert (activation.container, activation.zero_point) == (np.int8, 0)


def test_openvino_shifts_by_as_little_as_it_can() -> None:
    layer = random_layer(linear(), steps=3)
    layer.zero_point[:, 0] = 20, 25, 24
    activation = part_activation_codes(layer, 0, "openvino")
    assert (activation.container, activation.zero_point) == (np.uint8, 24)
    assert activation.shift.tolist() == [-4, 1, 0]


@pytest.mark.parametrize(("bits", "scheme"), [(8, "symmetric"), (7, "asymmetric"), (6, "asymmetric"), (6, "symmetric")])
@pytest.mark.parametrize("target", TARGETS)
def test_zero_stays_zero_but_for_eight_asymmetric_bits(target: Target, bits: int, scheme: str) -> None:
    layer = random_layer(linear(bits=Bits(4, bits), scheme=scheme), steps=3)
    assert not part_activation_codes(layer, 0, target).shift.any()


def test_eight_asymmetric_bits_are_shifted_where_the_kernel_has_no_zero_point_for_them() -> None:
    static, varying = random_layer(linear()), random_layer(linear(), steps=3)
    assert part_activation_codes(static, 0, "tensorrt").shift.tolist() == [int(static.zero_point[0, 0]) - 128]
    assert not part_activation_codes(static, 0, "openvino").shift.any()
    assert part_activation_codes(varying, 0, "openvino").shift.any()


def test_a_scale_by_step_becomes_a_power_of_two_and_a_static_one_stays() -> None:
    static, varying = random_layer(linear()), random_layer(linear(), steps=3)
    varying.scale[:, 0] = 0.3, 0.25, 0.7
    assert part_activation_codes(static, 0, "tensorrt").scale == static.scale[0, 0]
    assert part_activation_codes(varying, 0, "tensorrt").scale == 1.0
    varying.scale[:, 0] = 0.3, 0.25, 0.5
    activation = part_activation_codes(varying, 0, "tensorrt")
    assert activation.scale == 0.5
    np.testing.assert_allclose(activation.gain, [0.6, 0.5, 1.0], rtol=1e-7)
    np.testing.assert_allclose(activation.ratio * activation.gain, 1, rtol=1e-6)


def test_what_does_not_vary_has_one_row_and_one_factor() -> None:
    layer = random_layer(linear(), steps=3, largest_shift=0)
    layer.tau[:] = 0.5
    layer.scale[:] = 0.25
    activation = part_activation_codes(layer, 0, "tensorrt")
    assert activation.factor.tolist() == [2.0]
    assert (activation.ratio.tolist(), activation.gain.tolist()) == ([1.0], [1.0])
    assert len(activation.shift) == 3
