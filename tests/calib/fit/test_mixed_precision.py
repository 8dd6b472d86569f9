"""Which layers get more bits: what rounding one layer costs, and whom the room goes to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import linear, random_layer
from models import TINY_RECIPE, save_small_model
from oracle import dequantize_input, dequantize_weight, quantize_input
from torch import Tensor, nn

from calib.calibrate import calibrate
from calib.fit.mixed_precision import MORE, few_evaluations, most_sensitive, prediction_error
from calib.model.load import SourceModel
from calib.record.trajectories import Trajectories
from calib.run.plan import Resources
from dmq_export.bits import Bits
from dmq_export.commands.export import export_onnx
from dmq_export.common.progress import Progress
from dmq_export.layer import LayerSpec


def trajectories(steps: int, samples: int, predictions: Tensor | None = None) -> Trajectories:
    x = torch.randn(steps, samples, 5, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.arange(steps, 0, -1).float()
    told = {"label": torch.arange(samples)}
    return Trajectories(timesteps, x, x if predictions is None else predictions, told, x[0])


def test_few_evaluations_go_from_the_first_step_to_the_last() -> None:
    all_of_them = trajectories(25, 5)
    few = few_evaluations(all_of_them)
    assert few.timesteps.tolist() == [25 - row for row in (0, 3, 5, 8, 11, 13, 16, 19, 21, 24)]
    assert few.inputs.shape == few.predictions.shape == (10, 2, 5, 8)
    torch.testing.assert_close(few.inputs[-1], all_of_them.inputs[-1, :2], rtol=0, atol=0)
    assert few.conditioning["label"].tolist() == [0, 1]
    assert few_evaluations(trajectories(3, 1)).inputs.shape == (3, 1, 5, 8)


class Net(nn.Module):
    """The prediction is what the layer puts out."""

    def __init__(self, weight: np.ndarray) -> None:
        super().__init__()
        self.layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        self.layer.weight.data = torch.from_numpy(weight)

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True, **_: Any) -> tuple[Tensor]:
        return (self.layer(sample),)


@pytest.mark.parametrize("bits", [Bits(4, 8), Bits(4, 6)])
def test_the_error_is_that_of_the_prediction_with_what_more_bits_would_change_rounded(bits: Bits) -> None:
    spec = replace(linear(name="layer"), parts=(8,), out_channels=3, bits=bits)
    layer = replace(random_layer(spec, seed=1, steps=1), bias=None)
    weight = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    source = SourceModel(Net(weight), "Net", {"sample_size": 1, "in_channels": 1}, {}, "")
    recorded = trajectories(4, 2)
    expected = (recorded.inputs.numpy() @ weight.T).astype(np.float64)
    x = recorded.inputs.numpy()
    inputs = x / layer.tau if bits.activation == 8 else dequantize_input(layer, quantize_input(layer, x))
    rounded = inputs @ dequantize_weight(layer).T
    shares = ((rounded - expected) ** 2).sum((1, 2, 3)) / (expected**2).sum((1, 2, 3))
    recorded = replace(recorded, predictions=torch.from_numpy(expected.astype(np.float32)))
    assert prediction_error(source, layer, recorded) == pytest.approx(shares.mean(), rel=1e-5)
    torch.testing.assert_close(source.network.layer.weight, torch.from_numpy(weight), rtol=0, atol=0)


families_of_layers = st.lists(st.lists(st.integers(1, 64), min_size=1, max_size=3), min_size=1, max_size=8)


@given(families_of_layers, st.randoms(use_true_random=False), st.floats(0, 1))
def test_the_room_goes_to_whoever_costs_most_per_weight(sizes: list[list[int]], random: Any, share: float) -> None:
    groups = tuple(
        tuple(replace(linear(name=f"{i}.{j}"), parts=(size,), out_channels=1) for j, size in enumerate(sizes_of_family))
        for i, sizes_of_family in enumerate(sizes)
    )
    errors = {spec.name: random.random() for group in groups for spec in group}
    chosen = most_sensitive(groups, errors, share)
    total = sum(map(sum, sizes))

    def weights(group: tuple[LayerSpec, ...]) -> int:
        return sum(spec.in_channels for spec in group)

    def cost(group: tuple[LayerSpec, ...]) -> float:
        return sum(errors[spec.name] for spec in group) / weights(group)

    assert chosen == tuple(group for group in groups if group in chosen)
    assert sum(map(weights, chosen)) <= share * total
    for left in set(groups) - set(chosen):  # there was no room for it beside those that cost more
        before = sum(weights(group) for group in chosen if cost(group) >= cost(left))
        assert before + weights(left) > share * total


def test_all_or_none_of_the_layers() -> None:
    groups = ((linear(name="a"), linear(name="b")), (linear(name="c"),))
    errors = dict.fromkeys("abc", 1.0)
    assert most_sensitive(groups, errors, 1.0) == groups
    assert most_sensitive(groups, errors, 0.0) == ()


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.mark.parametrize(("joint", "bits"), [(True, Bits(4, 8)), (False, Bits(4, 6))])
def test_the_chosen_layers_have_more_bits_the_others_are_as_they_were(
    small_model: Path, tmp_path: Path, joint: bool, bits: Bits
) -> None:
    recipe = replace(TINY_RECIPE, bits=bits, pts_layers="all", pts_kappa=0.0, les_joint=joint)

    def run(share: float):
        settings = replace(recipe, sensitive_share=share)
        folder = tmp_path / str(share)
        return calibrate(small_model, folder, settings, Resources(torch.device("cpu")), Progress(show=False))

    plain, wide = run(0.0), run(0.4)
    widths = {layer.spec.name: layer.spec.bits for layer in wide.layers}
    assert set(widths.values()) == {bits, MORE}
    weights = {width: sum(one.codes.size for one in wide.layers if one.spec.bits == width) for width in (bits, MORE)}
    assert weights[MORE] <= 0.4 * sum(weights.values())
    for before, after in zip(plain.layers, wide.layers, strict=True):
        if after.spec.bits == before.spec.bits:
            np.testing.assert_array_equal(after.codes, before.codes)
        else:
            assert after.codes.max() > 15
            assert not after.shift.any()  # an int8 carrier of 7 bits has no room
    reports = wide.metrics["layers"]
    assert all(0 < report["prediction_db"] < 200 for report in reports.values())
    quality = [np.mean(one.metrics["prediction_sqnr_db"]["weights"]) for one in (plain, wide)]
    assert quality[1] > quality[0] + 1


@pytest.mark.parametrize("target", ["portable", "openvino", "tensorrt"])
def test_layers_of_different_widths_are_exported_and_proved_equal(
    small_model: Path, tmp_path: Path, target: Any
) -> None:
    recipe = replace(TINY_RECIPE, sensitive_share=0.4, pts_layers="all", pts_kappa=0.3)
    calibrate(small_model, tmp_path / "out", recipe, Resources(torch.device("cpu")), Progress(show=False))
    assert export_onnx(tmp_path / "out", tmp_path / "model.onnx", Progress(show=False), target=target).verification
