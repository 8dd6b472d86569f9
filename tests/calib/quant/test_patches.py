"""A layer as a matrix product of patches, against the operator of ``reference.py``."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SPECS, conv2d, linear, random_input, specs
from oracle import along, operate, shift_of_columns

from calib.quant.patches import (
    apply_op,
    draw_positions,
    expand_parts,
    product,
    scaled_weight,
    split_parts,
    take_patches,
    tau_columns,
    weight_columns,
    weight_matrix,
    weight_of,
)
from dmq_export.layer import LayerSpec


def random_weight(spec: LayerSpec, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(spec.weight_shape)


def windows(spec: LayerSpec, x: np.ndarray) -> np.ndarray:
    """What each output position of ``x`` sees, in the order of the outputs, ``[N, L, C, K]``."""
    if spec.kind == "linear":
        return x.reshape(len(x), -1, spec.in_channels, 1)
    padded = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in spec.padding)])
    axes = list(zip(padded.shape[2:], spec.kernel, spec.stride, spec.dilation, strict=True))
    found = []
    for position in np.ndindex(*[(size - d * (k - 1) - 1) // s + 1 for size, k, s, d in axes]):
        taps = [p * s + d * np.arange(k) for p, (_, k, s, d) in zip(position, axes, strict=True)]
        found.append(padded[np.ix_(range(len(x)), range(spec.in_channels), *taps)])
    return np.stack(found, 1).reshape(len(x), len(found), spec.in_channels, -1)


def draw(spec: LayerSpec, x: np.ndarray, count: int, seed: int = 0) -> torch.Tensor:
    return take_patches(
        spec, torch.from_numpy(x), draw_positions(spec, x.shape, count, torch.Generator().manual_seed(seed))
    )


def assert_patches_give_the_outputs(spec: LayerSpec, seed: int) -> None:
    x = random_input(spec, seed=seed).astype(np.float64)
    weight = random_weight(spec, seed)
    outputs = np.moveaxis(operate(spec, x, weight), spec.channel_axis, -1).reshape(len(x), -1, spec.out_channels)
    seen = windows(spec, x)
    patches = draw(spec, x, 7, seed)
    assert patches.shape == (len(x) * 7, spec.in_channels, seen.shape[-1])
    products = product(spec, patches, weight_matrix(spec, torch.from_numpy(weight))).numpy()
    for row, (patch, result) in enumerate(zip(patches.numpy(), products, strict=True)):
        sample = row // 7
        positions = (seen[sample] == patch).all((1, 2)).nonzero()[0]
        assert len(positions), f"patch {row} is no window of sample {sample}"
        # float64 sums in another order
        np.testing.assert_allclose(result, outputs[sample, positions[0]], rtol=0, atol=1e-12 * (1 + abs(result).max()))


@pytest.mark.parametrize("name", SPECS)
def test_patches_times_weight_is_the_operator_where_they_were_taken(name: str) -> None:
    assert_patches_give_the_outputs(SPECS[name], 0)


@settings(deadline=None, max_examples=50)
@given(specs(), st.integers(0, 2**16))
def test_any_layer_is_its_patches_times_its_weight(spec: LayerSpec, seed: int) -> None:
    assert_patches_give_the_outputs(spec, seed)


@pytest.mark.parametrize("name", SPECS)
def test_patches_come_from_every_output_position(name: str) -> None:
    spec = SPECS[name]
    x = random_input(spec)
    drawn = draw(spec, x, 500).numpy().reshape(len(x), 500, -1)
    for sample, seen in enumerate(windows(spec, x)):
        assert {patch.tobytes() for patch in drawn[sample]} == {window.tobytes() for window in seen}


@pytest.mark.parametrize("shape", [(3, 8), (3, 4, 8), (3, 2, 5, 8)])
def test_linear_patches_are_tokens_of_any_input_rank(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape)
    tokens = x.reshape(3, -1, 8)
    for sample, drawn in enumerate(draw(linear(), x, 4).reshape(3, 4, 8).numpy()):
        assert all((tokens[sample] == token).all(1).any() for token in drawn)


def test_patches_follow_the_generator() -> None:
    x = random_input(conv2d())
    assert torch.equal(draw(conv2d(), x, 8, 1), draw(conv2d(), x, 8, 1))
    assert not torch.equal(draw(conv2d(), x, 8, 1), draw(conv2d(), x, 8, 2))


@settings(deadline=None, max_examples=50)
@given(specs(), st.integers(0, 2**16))
def test_the_operator_equals_the_oracle(spec: LayerSpec, seed: int) -> None:
    x, weight = random_input(spec, seed=seed).astype(np.float64), random_weight(spec, seed)
    bias = np.random.default_rng(seed).standard_normal(spec.out_channels)
    y = apply_op(spec, *(torch.from_numpy(array) for array in (x, weight, bias)))
    plain = operate(spec, x, weight)
    np.testing.assert_allclose(y, plain + along(bias, plain.ndim, spec.channel_axis), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", SPECS)
def test_a_weight_is_scaled_by_the_factors_of_the_channels_its_output_reads(name: str) -> None:
    spec = SPECS[name]
    weight, tau = random_weight(spec), np.random.default_rng(1).uniform(0.1, 9, spec.in_channels)
    scaled = scaled_weight(spec, torch.from_numpy(weight), torch.from_numpy(tau))
    np.testing.assert_array_equal(scaled, weight * shift_of_columns(spec, tau, weight.ndim))


@settings(deadline=None, max_examples=50)
@given(specs(), st.integers(0, 2**16))
def test_factors_move_between_input_and_weight_without_changing_the_product(spec: LayerSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    patches = torch.from_numpy(rng.standard_normal((3, spec.in_channels, np.prod(spec.kernel, dtype=int))))
    tau = torch.from_numpy(np.exp(rng.uniform(-3, 3, spec.in_channels)))
    matrix = weight_matrix(spec, torch.from_numpy(random_weight(spec, seed)))
    moved = product(spec, patches / tau[:, None], matrix * tau_columns(spec, tau))
    torch.testing.assert_close(moved, product(spec, patches, matrix), rtol=0, atol=1e-12)


def test_each_part_of_a_split_layer_has_its_own_column_of_values() -> None:
    spec = conv2d(parts=(2, 3), out_channels=2, kernel=(1, 1), padding=(0, 0))
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]])  # [P, O]
    columns = weight_columns(spec, values).expand(2, 5, 1)[:, :, 0]
    assert columns.tolist() == [[1, 1, 3, 3, 3], [2, 2, 4, 4, 4]]
    assert expand_parts(spec, values).tolist() == [[1, 1, 2, 2, 2], [3, 3, 4, 4, 4]]


def test_a_layer_in_one_piece_has_one_value_per_output() -> None:
    spec = conv2d(parts=(4,), groups=2, out_channels=2)
    values = weight_columns(spec, torch.tensor([[1.0, 2.0]])).expand(2, 2, 9)
    assert (values[0] == 1).all()
    assert (values[1] == 2).all()


def test_the_columns_of_the_parts_put_together_are_the_weight() -> None:
    spec = linear(parts=(3, 5))
    matrix = weight_matrix(spec, torch.from_numpy(random_weight(spec)))
    parts = split_parts(spec, matrix)
    assert [part.shape[1] for part in parts] == [3, 5]
    assert torch.equal(torch.cat(parts, 1), matrix)


def test_the_weight_of_a_module_carries_no_gradient() -> None:
    module = torch.nn.Linear(3, 2)
    assert torch.equal(weight_of(module), module.weight)
    assert not weight_of(module).requires_grad
