"""What a quantized layer may be, and what it refuses to be."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SPECS, conv2d, linear, random_layer, specs

from dmq_export.bits import Bits
from dmq_export.errors import CheckpointError
from dmq_export.layer import LayerSpec

ARRAYS = ("codes", "weight_scale", "weight_zero_point", "tau", "shift", "scale", "zero_point", "bias")


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("conv2d", (6, 4, 3, 3)),
        ("conv2d grouped", (6, 2, 3, 3)),
        ("conv2d depthwise", (6, 1, 3, 3)),
        ("conv2d split", (6, 7, 1, 1)),
        ("conv1d", (6, 4, 3)),
        ("linear", (5, 8)),
    ],
)
def test_the_weight_has_the_shape_torch_gives_it(name: str, shape: tuple[int, ...]) -> None:
    assert SPECS[name].weight_shape == shape


@pytest.mark.parametrize(("spec", "axis"), [(SPECS["conv1d"], 1), (SPECS["conv2d"], 1), (SPECS["linear"], -1)])
def test_channels_are_second_for_convolutions_and_last_for_linear_layers(spec: LayerSpec, axis: int) -> None:
    assert spec.channel_axis == axis


def test_parts_follow_each_other_along_the_input_channels() -> None:
    spec = linear(parts=(3, 5, 2))
    assert spec.in_channels == 10
    assert spec.part_slices() == [slice(0, 3), slice(3, 8), slice(8, 10)]
    assert linear(parts=(8,)).part_slices() == [slice(0, 8)]


@pytest.mark.parametrize(("inputs", "outputs", "groups"), [(4, 6, 0), (4, 6, -1), (4, 6, 4), (6, 4, 3), (4, 6, 3)])
def test_groups_that_do_not_divide_the_channels_are_refused(inputs: int, outputs: int, groups: int) -> None:
    expected = f"^layer mid.conv: {inputs} inputs and {outputs} outputs do not make {groups} groups$"
    with pytest.raises(CheckpointError, match=expected):
        conv2d(name="mid.conv", parts=(inputs,), out_channels=outputs, groups=groups)


@settings(deadline=None, max_examples=50)
@given(specs(), st.integers(1, 3), st.integers(0, 2**16), st.booleans())
def test_the_whole_allowed_range_is_accepted(spec: LayerSpec, steps: int, seed: int, bias: bool) -> None:
    layer = random_layer(spec, steps=steps, seed=seed, bias=bias)
    full = replace(
        layer,
        codes=np.full_like(layer.codes, 2**spec.bits.weight - 1),
        weight_zero_point=np.full_like(layer.weight_zero_point, 2**spec.bits.weight - 1),
        shift=np.full_like(layer.shift, 3),
    )
    assert set(full.tensors()) == set(ARRAYS if bias else ARRAYS[:-1])
    assert full.tensors()["codes"] is full.codes


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
@pytest.mark.parametrize("name", ["weight_scale", "tau", "scale"])
def test_a_scale_that_is_not_finite_and_positive_is_refused(name: str, value: float) -> None:
    layer = random_layer(conv2d(name="mid.conv"), steps=2)
    changed = getattr(layer, name).copy()
    changed.flat[-1] = value
    with pytest.raises(CheckpointError, match=f"^layer mid.conv: {name} must be finite and positive everywhere$"):
        replace(layer, **{name: changed})


@pytest.mark.parametrize(("weight", "activation"), [(4, 8), (4, 6), (3, 3), (8, 5)])
@pytest.mark.parametrize("name", ["codes", "weight_zero_point", "zero_point", "shift"])
def test_a_code_above_its_largest_is_refused(name: str, weight: int, activation: int) -> None:
    limit = {"zero_point": 2**activation - 1, "shift": 3}.get(name, 2**weight - 1)
    layer = random_layer(conv2d(bits=Bits(weight, activation)), steps=2)
    changed = getattr(layer, name).copy()
    changed.flat[-1] = limit
    replace(layer, **{name: changed})
    if limit == 255:
        return  # uint8 holds nothing larger
    changed.flat[-1] = limit + 1
    with pytest.raises(CheckpointError, match=f"^layer conv: {name} is {limit + 1}, at most {limit} is allowed$"):
        replace(layer, **{name: changed})


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_another_shape_is_refused_with_both_shapes(name: str) -> None:
    layer = random_layer(conv2d(parts=(4, 3), kernel=(1, 1), padding=(0, 0)), steps=2)
    right = getattr(layer, name)
    wrong = np.concatenate([right, right], axis=-1)
    with pytest.raises(CheckpointError) as refusal:
        replace(layer, **{name: wrong})
    assert str(refusal.value) == (
        f"layer conv: {name} is {wrong.dtype} {list(wrong.shape)}, {right.dtype} {list(right.shape)} was expected"
    )


@pytest.mark.parametrize("name", ARRAYS)
def test_an_array_of_another_type_is_refused(name: str) -> None:
    layer = random_layer(conv2d())
    with pytest.raises(CheckpointError, match=f"^layer conv: {name} is float64 .* was expected$"):
        replace(layer, **{name: getattr(layer, name).astype(np.float64)})


def test_scales_and_zero_points_of_unequal_step_counts_are_refused() -> None:
    layer = random_layer(conv2d(), steps=3)
    with pytest.raises(CheckpointError, match=r"zero_point is uint8 \[3, 1\], uint8 \[2, 1\] was expected"):
        replace(layer, scale=layer.scale[:2])


def test_a_symmetric_layer_has_its_zero_point_in_the_middle() -> None:
    layer = random_layer(conv2d(scheme="symmetric"))
    assert (layer.zero_point == 128).all()
    with pytest.raises(CheckpointError, match="layer conv: a symmetric layer's zero points must be 128"):
        replace(layer, zero_point=layer.zero_point + np.uint8(1))


def test_a_bias_that_is_not_finite_is_refused() -> None:
    layer = random_layer(conv2d())
    with pytest.raises(CheckpointError, match="layer conv: bias must be finite"):
        replace(layer, bias=np.full(6, np.nan, np.float32))
