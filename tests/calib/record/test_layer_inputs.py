"""What is kept of a layer's inputs, against brute force."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from layers import conv2d, linear
from torch import Tensor, nn

from calib.model.layers import select_layers
from calib.model.load import SourceModel, load_model
from calib.model.network import predict
from calib.record.conditioning import Conditioning
from calib.record.layer_inputs import (
    GROUP,
    Captures,
    EvaluationIndex,
    LayerInputs,
    capture_bytes,
    evaluate_recorded,
    groups_of,
    inputs_seen,
    patch_rows,
)
from calib.record.trajectories import SamplerSettings, Trajectories, record_trajectories, set_size
from calib.record.work_folder import WorkFolder
from dmq_export.bits import Bits
from dmq_export.layer import LayerSpec

TIMESTEPS = torch.tensor([90.0, 50.0, 10.0])
STEPS = len(TIMESTEPS)


class Encoding(nn.Module):
    """Layers whose inputs say where they come from: ``1000 label + timestep`` everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1)
        self.proj = nn.Linear(8, 5)

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = True
    ) -> tuple[Tensor]:
        code = 1000 * class_labels + timestep
        self.conv(code.view(-1, 1, 1, 1).expand(-1, 4, 2, 2))
        self.proj(code.view(-1, 1, 1).expand(-1, 3, 8))
        return (sample,)


def numbered(count: int, steps: int = STEPS) -> Trajectories:
    """Random samples labelled 0, 1, 2, ..."""
    inputs = torch.randn(steps, count, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    timesteps = TIMESTEPS if steps == STEPS else torch.arange(steps, 0, -1.0)
    return Trajectories(timesteps, inputs, inputs, {"class_labels": torch.arange(count)}, inputs[0])


def captured_inputs(
    network: nn.Module,
    trajectories: Trajectories,
    specs: Sequence[LayerSpec],
    *,
    seed: int,
    batch: int = GROUP,
    backwards: bool = False,
) -> dict[str, LayerInputs]:
    """All batches, one after the other or the other way round; the files' mappings outlive the files."""
    size = trajectories.size
    batches = [range(first, min(first + batch, size.rows)) for first in range(0, size.rows, batch)]
    with tempfile.TemporaryDirectory() as folder:
        captures = Captures(WorkFolder(Path(folder)), batches, size.steps, specs, seed=seed)
        for rows in reversed(batches) if backwards else batches:
            assert not captures.has(rows)
            captures.take(network, trajectories, rows)
            assert captures.has(rows)
        return {spec.name: captures.load(spec) for spec in specs}


def assert_same(one: LayerInputs, other: LayerInputs) -> None:
    assert torch.equal(one.patches, other.patches)
    assert torch.equal(one.step, other.step)
    assert torch.equal(one.extrema.low, other.extrema.low)
    assert torch.equal(one.extrema.high, other.extrema.high)


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> SourceModel:
    return load_model(tiny_model, torch.device("cpu"))


@pytest.fixture(scope="module")
def specs(tiny: SourceModel) -> list[LayerSpec]:
    """A convolution, a split shortcut and a linear layer."""
    names = ("down_blocks.0.resnets.0.conv1", "up_blocks.1.resnets.0.conv_shortcut", "mid_block.attentions.0.to_q")
    found = {spec.name: spec for spec in select_layers(tiny, Bits(4, 8), "asymmetric", []).coverage.quantized}
    return [found[name] for name in names]


@pytest.fixture(scope="module")
def wanderings() -> Trajectories:
    """More samples than one group, whatever the network would make of them."""
    generator = torch.Generator().manual_seed(1)
    count = GROUP + 3
    inputs = torch.randn(STEPS, count, 1, 8, 8, generator=generator) * torch.tensor([3.0, 1.0, 0.3]).view(3, 1, 1, 1, 1)
    labels = torch.randint(3, (count,), generator=generator)
    return Trajectories(TIMESTEPS, inputs, inputs, {"class_labels": labels}, inputs[0])


def layer_input(source: SourceModel, name: str, trajectories: Trajectories, step: int, samples: slice) -> np.ndarray:
    """A layer's input by a hook of our own."""
    seen: list[Tensor] = []
    handle = source.network.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    conditioning = {"class_labels": trajectories.conditioning["class_labels"][samples]}
    predict(source.network, trajectories.inputs[step, samples], trajectories.timesteps[step], conditioning)
    handle.remove()
    return seen[0].numpy()


def test_extrema_are_those_of_each_group_step_and_channel(
    tiny: SourceModel, specs: list[LayerSpec], wanderings: Trajectories
) -> None:
    captured = captured_inputs(tiny.network, wanderings, specs, seed=0)
    groups = [slice(0, GROUP), slice(GROUP, GROUP + 3)]
    for spec in specs:
        extrema = captured[spec.name].extrema
        assert extrema.low.shape == extrema.high.shape == (len(groups), STEPS, spec.in_channels)
        for group, samples in enumerate(groups):
            for step in range(STEPS):
                x = layer_input(tiny, spec.name, wanderings, step, samples)
                channels = np.moveaxis(x, spec.channel_axis, 0).reshape(spec.in_channels, -1)
                np.testing.assert_array_equal(extrema.low[group, step].numpy(), channels.min(1))
                np.testing.assert_array_equal(extrema.high[group, step].numpy(), channels.max(1))


def test_every_patch_is_a_window_of_its_own_steps_input(
    tiny: SourceModel, specs: list[LayerSpec], wanderings: Trajectories
) -> None:
    spec = specs[0]
    assert spec.kernel == (3, 3)
    captured = captured_inputs(tiny.network, wanderings, [spec], seed=0)[spec.name]
    for step in range(STEPS):
        x = layer_input(tiny, spec.name, wanderings, step, slice(0, GROUP))
        padded = np.pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))  # [N, C, H, W, 3, 3]
        known = {window.tobytes() for window in windows.transpose(0, 2, 3, 1, 4, 5).reshape(-1, 8 * 9)}
        # the first group's patches come first
        first_group = len(captured.patches) * GROUP // (GROUP + 3)
        patches = captured.patches[:first_group][captured.step[:first_group] == step]
        assert len(patches) == first_group // STEPS
        assert all(patch.numpy().tobytes() in known for patch in patches)


@pytest.mark.parametrize("spec", [conv2d(), linear()], ids=lambda spec: spec.kind)
def test_patches_belong_to_their_step_and_every_evaluation_gives_as_many(spec: LayerSpec) -> None:
    count = GROUP + 2
    captured = captured_inputs(Encoding(), numbered(count), [spec], seed=0)[spec.name]
    # the middle tap is never padding
    taps = captured.patches.shape[-1]
    codes = captured.patches[:, 0, taps // 2].long()
    assert torch.equal(codes % 1000, TIMESTEPS[captured.step].long())
    pairs, counts = torch.unique(codes, return_counts=True)
    assert len(pairs) == count * STEPS
    assert counts.unique().tolist() == [-(-patch_rows(spec) // (count * STEPS))]
    assert torch.equal(captured.patches[:, :, taps // 2], codes[:, None].expand(-1, spec.in_channels).float())
    assert set(captured.patches.unique().tolist()) <= {0.0, *codes.tolist()}


def test_each_group_sees_its_own_conditioning() -> None:
    count = GROUP + 2
    captured = captured_inputs(Encoding(), numbered(count), [linear()], seed=0)["proj"]
    low = torch.tensor([0, GROUP])[:, None] * 1000 + TIMESTEPS
    high = torch.tensor([GROUP - 1, count - 1])[:, None] * 1000 + TIMESTEPS
    assert torch.equal(captured.extrema.low, low[..., None].expand(-1, -1, 8))
    assert torch.equal(captured.extrema.high, high[..., None].expand(-1, -1, 8))


def test_a_capture_does_not_depend_on_what_else_is_captured(
    tiny: SourceModel, specs: list[LayerSpec], wanderings: Trajectories
) -> None:
    together = captured_inputs(tiny.network, wanderings, specs, seed=4)
    reversed_ = captured_inputs(tiny.network, wanderings, specs[::-1], seed=4)
    for spec in specs:
        alone = captured_inputs(tiny.network, wanderings, [spec], seed=4)
        assert_same(alone[spec.name], together[spec.name])
        assert_same(alone[spec.name], reversed_[spec.name])


def test_another_seed_takes_other_patches_and_the_same_extrema(
    tiny: SourceModel, specs: list[LayerSpec], wanderings: Trajectories
) -> None:
    one, other = (captured_inputs(tiny.network, wanderings, specs[:1], seed=seed)[specs[0].name] for seed in (0, 1))
    assert not torch.equal(one.patches, other.patches)
    assert torch.equal(one.extrema.low, other.extrema.low)


def test_there_are_several_times_as_many_patches_as_columns_up_to_a_limit() -> None:
    assert patch_rows(conv2d(parts=(64,))) == 8 * 64 * 9
    assert patch_rows(conv2d(parts=(128,), out_channels=128, groups=128)) == patch_rows(linear()) == 4096
    assert patch_rows(conv2d(parts=(256,))) == 8192
    huge = conv2d(parts=(1280, 1280))
    assert patch_rows(huge) * 2560 * 9 * 4 <= 2**28


@pytest.mark.parametrize("changed", [{"batch": 1}, {"batch": 3}, {"batch": 2 * GROUP}, {"backwards": True}], ids=str)
def test_batches_captured_in_any_order_and_size_are_the_same(changed: dict[str, Any]) -> None:
    # a network that computes each sample by itself, to the bit
    layers = [conv2d(), linear()]
    trajectories = numbered(2 * GROUP + 5)
    whole = captured_inputs(Encoding(), trajectories, layers, seed=0)
    other = captured_inputs(Encoding(), trajectories, layers, seed=0, **changed)
    for spec in layers:
        assert_same(whole[spec.name], other[spec.name])


def test_a_batch_is_captured_if_all_of_the_layers_are(tmp_path: Path) -> None:
    work, batches = WorkFolder(tmp_path), [range(2)]
    few, more = (Captures(work, batches, STEPS, specs, seed=0) for specs in ([conv2d()], [conv2d(), linear()]))
    few.take(Encoding(), numbered(2), range(2))
    assert few.has(range(2))
    assert not more.has(range(2))
    more.take(Encoding(), numbered(2), range(2))
    assert few.has(range(2))
    assert more.has(range(2))


def test_a_recording_that_fails_is_not_kept(tmp_path: Path) -> None:
    captures = Captures(WorkFolder(tmp_path), [range(2)], STEPS, [linear()], seed=0)
    with pytest.raises(RuntimeError, match="on purpose"), captures.recording(range(2)):
        raise RuntimeError("on purpose")
    assert not captures.has(range(2))


@given(st.integers(0, 100), st.integers(1, 100))
def test_rows_are_parted_where_groups_end(first: int, count: int) -> None:
    rows = range(first, first + count)
    parts = groups_of(rows)
    assert [row for part in parts for row in part] == list(rows)
    assert [{row // GROUP for row in part} for part in parts] == [
        {group} for group in range(first // GROUP, (first + count - 1) // GROUP + 1)
    ]


def test_forgotten_patches_leave_no_file(tmp_path: Path) -> None:
    captures = Captures(WorkFolder(tmp_path), [range(2)], STEPS, [conv2d(), linear()], seed=0)
    captures.take(Encoding(), numbered(2), range(2))
    assert len(list(tmp_path.rglob("*.patches"))) == 2
    captures.forget()
    assert list(tmp_path.rglob("*.patches")) == []


def test_thinned_inputs_are_evenly_spaced_and_keep_the_extrema() -> None:
    inputs = captured_inputs(Encoding(), numbered(4), [linear()], seed=0)["proj"]
    few = inputs.thinned(inputs.patches.numel() // 5)
    assert torch.equal(few.patches, inputs.patches[::5])
    assert torch.equal(few.step, inputs.step[::5])
    assert few.extrema is inputs.extrema
    assert len(inputs.thinned(10**9).patches) == len(inputs.patches)


@pytest.mark.parametrize("count", [18, 2300])
def test_patches_take_the_memory_that_was_said(count: int) -> None:
    captured = captured_inputs(Encoding(), numbered(count, steps=2), [linear()], seed=0)["proj"]
    assert captured.patches.nbytes == capture_bytes(linear(), 2 * count)


def test_replay_visits_rows_at_all_steps() -> None:
    seen: list[tuple[EvaluationIndex, list[int]]] = []
    progress: list[int] = []

    def note(x: Tensor, index: EvaluationIndex) -> None:
        seen.append((index, (x[:, 0, 0].long() // 1000).tolist()))

    evaluate_recorded(Encoding(), numbered(GROUP + 3), range(5, 12), {"proj": note}, advance=progress.append)
    assert seen == [(EvaluationIndex(5, step), list(range(5, 12))) for step in range(STEPS)]
    assert sum(progress) == 7 * STEPS


@pytest.mark.parametrize(("scheduler", "guidance"), [("ddim", None), ("pndm", 2.0)])
def test_what_is_captured_while_trajectories_are_recorded_is_what_a_replay_of_them_captures(
    tiny: SourceModel, specs: list[LayerSpec], scheduler: str, guidance: float | None, tmp_path: Path
) -> None:
    """To the bit; PNDM visits a timestep twice, and guidance evaluates two branches at once."""
    labels = torch.arange(3) % 3
    unconditional = {} if guidance is None else {"class_labels": torch.zeros(3).long()}
    conditioning = Conditioning({"class_labels": labels}, unconditional)
    settings = SamplerSettings(scheduler, 4, guidance_scale=guidance)
    size = set_size(tiny, settings, conditioning, 3)
    rows = range(size.rows)
    one, other = (Captures(WorkFolder(tmp_path / n), [rows], size.steps, specs, seed=0) for n in ("one", "other"))
    with one.recording(rows) as hooks:
        trajectories = record_trajectories(
            tiny,
            settings,
            conditioning,
            range(3),
            seed=0,
            step_context=lambda step: inputs_seen(tiny.network, hooks, EvaluationIndex(0, step)),
        )
    assert trajectories.size == size
    assert size.rows == 3 * trajectories.branches == (3 if guidance is None else 6)
    other.take(tiny.network, trajectories, rows)
    for spec in specs:
        assert_same(one.load(spec), other.load(spec))


def test_no_hook_stays_on_the_network_even_if_a_visit_fails() -> None:
    network = Encoding()
    captured_inputs(network, numbered(2), [linear(), conv2d()], seed=0)
    assert not any(module._forward_pre_hooks for module in network.modules())

    def fail(x: Tensor, index: EvaluationIndex) -> None:
        raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        evaluate_recorded(network, numbered(2), range(2), {"proj": fail})
    assert not any(module._forward_pre_hooks for module in network.modules())
