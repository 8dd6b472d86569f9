"""What a calibration says it will take, and that limits are respected."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import conv2d, linear
from models import TINY_RECIPE, save_small_model, save_tiny_conditional
from torch import Tensor, nn

import calib.device
import calib.run.memory_estimate
from calib.calibrate import planned, work_folder
from calib.model.layers import select_layers
from calib.model.load import SourceModel, load_model
from calib.record.conditioning import Conditioning, recipe_conditioning
from calib.record.layer_inputs import capture_bytes
from calib.record.work_folder import WorkFolder
from calib.run.memory_estimate import MemoryEstimate, activation_bytes, estimate_memory, fit_bytes
from calib.run.plan import Resources, make_plan, split_passes
from dmq_export.bits import Bits
from dmq_export.common.progress import Progress
from dmq_export.errors import DmqError
from dmq_export.recipe import Recipe

CPU = torch.device("cpu")
GIB = 2**30


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def small(small_model: Path) -> SourceModel:
    return load_model(small_model, CPU)


def plan_of(source: SourceModel, limits: Resources, work: Path, recipe: Recipe = TINY_RECIPE):
    return make_plan(source, select_layers(source, Bits(4, 8), "asymmetric", ()), recipe, limits, work)


@given(st.integers(1, 500), st.integers(1, 2**20))
def test_every_layer_is_in_one_pass_and_no_pass_takes_more_than_it_may(evaluations: int, disk: int) -> None:
    specs = [conv2d(name="a"), linear(name="b"), conv2d(name="c", parts=(64,)), linear(name="d")]
    groups = [(specs[0],), tuple(specs[1:3]), (specs[3],)]
    passes = split_passes(groups, evaluations, disk)
    assert [group for chosen in passes for group in chosen] == groups
    for chosen in passes:
        captured = sum(capture_bytes(spec, evaluations) for group in chosen for spec in group)
        assert len(chosen) == 1 or captured <= disk


def test_room_for_everything_makes_one_pass_and_none_makes_as_many_as_layers(
    small: SourceModel, tmp_path: Path
) -> None:
    assert len(plan_of(small, Resources(CPU), tmp_path).passes) == 1
    alone = plan_of(small, Resources(CPU, disk=1), tmp_path)
    assert [len(layers) for layers in alone.passes] == [1] * 12
    largest = max(capture_bytes(group[0], 2 * 3) for (group,) in alone.passes)
    assert alone.disk == largest


def test_disk_that_layer_inputs_already_take_counts_as_theirs(
    small: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a calibration that goes on would have less room for them than when it began."""
    needed = plan_of(small, Resources(CPU), tmp_path).disk
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed * 3 // 2))
    assert len(plan_of(small, Resources(CPU), tmp_path).passes) > 1
    WorkFolder(tmp_path).raw("conv.patches").write_bytes(bytes(needed // 2 + 4096))
    assert len(plan_of(small, Resources(CPU), tmp_path).passes) == 1


class Nest(nn.Module):
    """Three outputs of 1000, 2000 and 3000 numbers; the first is alive until the third is made."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Identity(), nn.Identity(), nn.Identity()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        first = self.a(torch.ones(1000))
        self.b(torch.ones(2000))  # dies at once
        third = self.c(torch.ones(3000))
        return (first[:1] + third[:1],)


def test_activations_are_what_lives_at_the_worst_moment() -> None:
    source = SourceModel(Nest(), "Nest", {"sample_size": 1, "in_channels": 1}, {}, "")
    assert 2 * 4 * 4000 <= activation_bytes(source, Conditioning({}, {})) <= 2 * 4 * 4010


def test_the_text_counts_as_long_as_it_is(tmp_path: Path) -> None:
    source = load_model(save_tiny_conditional(tmp_path), CPU)
    name, width = "encoder_hidden_states", source.config["cross_attention_dim"]
    short, long = (Conditioning({name: torch.zeros(3, length, width)}, {}) for length in (8, 512))
    keys_and_values = 2 * 2 * 4 * 512 * 16  # of 512 tokens, 16 channels wide, and as much again
    assert activation_bytes(source, short) < keys_and_values < activation_bytes(source, long) < 2 * keys_and_values


@pytest.mark.parametrize("largest", [conv2d(parts=(512,), out_channels=512), conv2d(parts=(1792,), out_channels=896)])
def test_a_fit_takes_no_more_than_was_said_and_not_far_less(largest) -> None:
    """Against the sum of what certainly is alive at once: patches, three factors of the moments, two of the weights."""
    said = fit_bytes(largest, TINY_RECIPE, 100)
    columns = largest.in_channels * 9
    alive = capture_bytes(largest, 100) + 4 * (3 * 3456**2 + 2 * largest.out_channels * columns)
    assert alive < said < 3 * alive


def test_less_memory_means_smaller_batches_then_a_refusal(
    small: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calib.device, "current_memory", lambda: GIB)
    monkeypatch.setattr(calib.device, "peak_memory", lambda: GIB)
    monkeypatch.setattr(calib.run.memory_estimate, "activation_bytes", lambda source, conditioning: GIB // 4)
    batches = [plan_of(small, Resources(CPU, memory=n * GIB // 4), tmp_path).batch for n in (24, 12, 9, 7, 6)]
    assert batches == [16, 4, 4, 2, 1]
    with pytest.raises(
        DmqError, match=r"UNet2DModel, 1 sample at a time, takes about 1.3 GiB, 1.1 GiB is allowed: raise --max"
    ):
        plan_of(small, Resources(CPU, memory=9 * GIB // 8), tmp_path)
    selection = select_layers(small, Bits(4, 8), "asymmetric", ())
    with pytest.raises(DmqError, match=r"16 samples at a time, takes about 5.0 GiB, 3.0 GiB is allowed: raise --max"):
        make_plan(small, selection, TINY_RECIPE, Resources(CPU, memory=3 * GIB), tmp_path, batch=16)


def test_processes_of_one_machine_share_its_free_memory(
    small: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calib.device, "current_memory", lambda: GIB)
    monkeypatch.setattr(calib.device, "available_memory", lambda: 5 * GIB)
    monkeypatch.setattr(calib.run.memory_estimate, "activation_bytes", lambda source, conditioning: GIB // 4)
    assert plan_of(small, Resources(CPU), tmp_path).batch == 16
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert plan_of(small, Resources(CPU), tmp_path).batch == 4


def test_adaround_needs_room_for_recorded_calls_and_gradients(small: SourceModel, tmp_path: Path) -> None:
    selection = select_layers(small, Bits(4, 8), "asymmetric", ())
    conditioning = recipe_conditioning(small, TINY_RECIPE, 1)

    def needed(samples: int, round_samples: int) -> MemoryEstimate:
        recipe = replace(TINY_RECIPE, samples=samples, rounding="adaround", round_iterations=1)
        return estimate_memory(small, selection, replace(recipe, round_samples=round_samples), conditioning)

    without = estimate_memory(small, selection, TINY_RECIPE, conditioning)
    assert (without.calls, without.block) == (0, 0)
    few, more, most = needed(8, 1024), needed(16, 1024), needed(10**9, 10**9)
    assert 0 < 2 * few.calls == more.calls
    assert needed(16, 8 * TINY_RECIPE.steps).calls == few.calls
    assert most.calls <= 2**30
    assert few.block == more.block > 12 * 4 * max(spec.weight_count for spec in selection.coverage.quantized)
    assert most.peak(1, 1) >= most.fixed + most.calls + most.block
    assert most.evaluating(16) == most.fixed + max(most.calls, most.check) + 16 * most.sample
    waiting = replace(most, waiting=most.calls + most.check)  # as much as on a GPU
    assert waiting.evaluating(16) == waiting.fixed + waiting.waiting + 16 * waiting.sample


def test_workers_are_those_asked_for_and_as_many_as_the_memory_takes(
    small: SourceModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calib.device, "current_memory", lambda: GIB)
    monkeypatch.setattr(calib.device, "peak_memory", lambda: GIB)
    roomy, tight = (plan_of(small, Resources(CPU, memory=m, workers=8), tmp_path) for m in (64 * GIB, 3 * GIB))
    assert roomy.workers == 8
    assert 1 < tight.workers < 8
    assert tight.memory <= 3 * GIB
    # a few seconds of fits are not worth starting processes for
    assert plan_of(small, Resources(CPU), tmp_path).workers == 1


def test_the_time_grows_with_what_is_asked_for(small: SourceModel, tmp_path: Path) -> None:
    plan = plan_of(small, Resources(CPU), tmp_path)
    assert set(plan.seconds) == {
        "trajectories",
        "layer fits",
        "held-out trajectories",
        "check",
        "PTS votes",
    }
    assert all(math.isfinite(seconds) and seconds > 0 for seconds in plan.seconds.values())
    more = plan_of(
        small, Resources(CPU), tmp_path, replace(TINY_RECIPE, samples=200, rounding="adaround", round_iterations=100)
    )
    assert more.seconds["trajectories"] > plan.seconds["trajectories"]
    assert more.seconds["PTS votes"] > 5 * plan.seconds["PTS votes"]
    assert more.seconds["AdaRound"] > 0


def test_a_plan_writes_nothing_and_is_json(small_model: Path, tmp_path: Path) -> None:
    selection, plan = planned(small_model, tmp_path / "out", TINY_RECIPE, Resources(CPU), Progress(show=False))
    assert list(tmp_path.iterdir()) == []
    facts = json.loads(json.dumps(plan.to_json(), allow_nan=False))
    assert facts["layers"] == len(selection.coverage.quantized) == 12
    assert facts["memory_bytes"] > 2**27
    for words in ("layers to fit", "peak memory", "disk for layer inputs", "time: total"):
        assert words in plan.text()


def test_the_work_folder_lies_beside_the_output(tmp_path: Path) -> None:
    assert work_folder(tmp_path / "a.b") == tmp_path / "a.b.work"
