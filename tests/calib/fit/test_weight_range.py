"""The weights' scales and zero points against a brute-force search in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import SPECS, linear, specs

from calib.fit.weight_range import COARSE_COLUMNS, grid_qparams, minmax_qparams, weight_range
from calib.quant.fake_quant import QParams, fake_quantize
from calib.quant.patches import weight_columns, weight_matrix
from dmq_export.bits import Bits
from dmq_export.layer import LayerSpec


def random_weight(spec: LayerSpec, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(spec.weight_shape)


def part_rows(spec: LayerSpec, weight: np.ndarray) -> list[list[np.ndarray]]:
    """The weights that share a scale, by part and output."""
    parts = spec.part_slices() if len(spec.parts) > 1 else [slice(None)]
    return [[weight[output, part].ravel() for output in range(spec.out_channels)] for part in parts]


def numpy_qparams(low: np.ndarray, high: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    scale = np.maximum((high - low) / (2**bits - 1), 1e-8)
    return scale, np.clip(np.rint(-low / scale), 0, 2**bits - 1)


def numpy_search(row: np.ndarray, bits: int) -> tuple[float, float]:
    """80 ranges, each 1 % of the full one narrower than the last; the first of the least error."""
    shrink = 1 - 0.01 * np.arange(80)[:, None]
    scale, zero_point = numpy_qparams(min(row.min(), 0) * shrink, max(row.max(), 0) * shrink, bits)
    codes = np.clip(np.rint(row / scale) + zero_point, 0, 2**bits - 1)
    best = (np.abs(scale * (codes - zero_point) - row) ** 2.4).sum(1).argmin()
    return scale[best, 0], zero_point[best, 0]


def row_errors(spec: LayerSpec, weight: np.ndarray, qparams: QParams) -> np.ndarray:
    """Of the fake-quantized weights, ``[P, O]``."""
    matrix = weight_matrix(spec, torch.from_numpy(weight))
    columns = QParams(*(weight_columns(spec, values) for values in qparams))
    error = (fake_quantize(matrix, columns, spec.bits.weight) - matrix).abs() ** 2.4
    return np.array([[row.sum() for row in part] for part in part_rows(spec, error.numpy())])


@settings(deadline=None, max_examples=12)
@given(specs(), st.integers(0, 2**16))
def test_the_search_equals_brute_force(spec: LayerSpec, seed: int) -> None:
    weight = random_weight(spec, seed) ** 3  # heavy tails, so that shrinking pays
    expected = [[numpy_search(row, spec.bits.weight) for row in part] for part in part_rows(spec, weight)]
    scale, zero_point = grid_qparams(spec, torch.from_numpy(weight))
    np.testing.assert_array_equal(scale, np.array(expected)[..., 0])
    np.testing.assert_array_equal(zero_point, np.array(expected)[..., 1])


@pytest.mark.parametrize("name", SPECS)
def test_minmax_covers_exactly_the_weights_and_zero(name: str) -> None:
    spec = SPECS[name]
    weight = random_weight(spec)
    weight[0], weight[1] = abs(weight[0]), -abs(weight[1])  # rows that reach zero only because ranges must
    ends = np.array([[(min(row.min(), 0), max(row.max(), 0)) for row in part] for part in part_rows(spec, weight)])
    expected = np.stack(numpy_qparams(ends[..., 0], ends[..., 1], spec.bits.weight), -1)
    np.testing.assert_array_equal(torch.stack(weight_range(spec, torch.from_numpy(weight)), -1), ends)
    np.testing.assert_array_equal(torch.stack(minmax_qparams(spec, torch.from_numpy(weight)), -1), expected)


@settings(deadline=None, max_examples=12)
@given(specs(), st.integers(0, 2**16))
def test_no_row_is_worse_than_with_minmax(spec: LayerSpec, seed: int) -> None:
    weight = random_weight(spec, seed)
    before = row_errors(spec, weight, minmax_qparams(spec, torch.from_numpy(weight)))
    after = row_errors(spec, weight, grid_qparams(spec, torch.from_numpy(weight)))
    assert (after <= before * (1 + 1e-9) + 1e-30).all()


def test_an_outlier_is_clipped_where_minmax_would_spoil_its_row() -> None:
    spec = linear(parts=(512,), bits=Bits(3, 8))
    weight = random_weight(spec)
    weight[0, 0] = 8.0
    before = row_errors(spec, weight, minmax_qparams(spec, torch.from_numpy(weight)))
    qparams = grid_qparams(spec, torch.from_numpy(weight))
    assert row_errors(spec, weight, qparams)[0, 0] < 0.8 * before[0, 0]
    assert qparams.scale[0, 0] * (7 - qparams.zero_point[0, 0]) < 7


def test_the_parts_of_a_split_layer_are_searched_on_their_own() -> None:
    spec = linear(parts=(3, 5))
    weight = torch.from_numpy(random_weight(spec))
    louder = weight.clone()
    louder[:, 3:] *= 100
    both, changed = (torch.stack(grid_qparams(spec, w)) for w in (weight, louder))
    assert torch.equal(both[:, 0], changed[:, 0])
    assert not torch.equal(both[:, 1], changed[:, 1])
    alone = torch.stack(grid_qparams(linear(parts=(3,)), weight[:, :3]))
    assert torch.equal(both[:, :1], alone)


def test_a_dead_output_channel_stays_zero() -> None:
    weight = torch.from_numpy(random_weight(linear()))
    weight[2] = 0
    for qparams in (minmax_qparams(linear(), weight), grid_qparams(linear(), weight)):
        assert (qparams.scale > 0).all()
        columns = QParams(*(values[0][:, None] for values in qparams))
        assert not fake_quantize(weight, columns, 4)[2].any()


def test_gradients_reach_the_weights_at_the_ends_of_the_range() -> None:
    weight = torch.tensor([[-2.0, 0.5, 3.0]], requires_grad=True)
    span = weight_range(linear(parts=(3,), out_channels=1), weight)
    (span.high - span.low).sum().backward()
    assert weight.grad is not None
    assert weight.grad.tolist() == [[-1, 0, 1]]


def test_the_narrowest_range_tried_is_a_fifth_of_the_weights() -> None:
    spec = linear(parts=(20000,), out_channels=1, bits=Bits(3, 8))
    weight = 0.07 * random_weight(spec)
    weight[0, :2] = -1, 1  # hardly matter beside so many small weights
    whole, best = minmax_qparams(spec, torch.from_numpy(weight)), grid_qparams(spec, torch.from_numpy(weight))
    assert (best.scale / whole.scale).item() == pytest.approx(0.21)


@pytest.mark.parametrize("columns", [COARSE_COLUMNS + COARSE_COLUMNS // 2 + 1, 5 * COARSE_COLUMNS])
def test_long_rows_are_searched_nearly_as_well_as_by_brute_force(columns: int) -> None:
    spec = linear(parts=(columns,), out_channels=12)
    weight = random_weight(spec)
    expected = np.array([numpy_search(row, spec.bits.weight) for row in part_rows(spec, weight)[0]])
    least = row_errors(spec, weight, QParams(*(torch.from_numpy(values)[None] for values in expected.T)))
    found = row_errors(spec, weight, grid_qparams(spec, torch.from_numpy(weight)))
    assert (found >= least * (1 - 1e-12)).all()
    assert found.sum() < 1.005 * least.sum()
    assert (found == least).mean() >= 0.5
