"""Recorded calls of blocks: what each block was given and gave, whatever was recorded together or at once."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import calib.record.block_inputs
from calib.record.block_inputs import BlockInputs, BlockRecorder, _recorded, block_bytes, split_blocks, whole_output
from calib.record.trajectories import Trajectories

SAMPLES = 5
TIMESTEPS = torch.tensor([80.0, 20.0])
STEPS = len(TIMESTEPS)


class Gain(nn.Module):
    """``gain x + shift``; ``shift`` may be absent."""

    def forward(self, x: Tensor, gain: float, shift: Tensor | None = None) -> Tensor:
        return gain * x + (0 if shift is None else shift)


class Pair(nn.Module):
    """Two streams, as a joint block passes on."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, -x


class Network(nn.Module):
    """Three blocks, and something after them that must not run."""

    def __init__(self) -> None:
        super().__init__()
        self.gain, self.pair, self.last = Gain(), Pair(), Gain()
        self.parameter = nn.Parameter(torch.zeros(1))
        self.ran_to_the_end = 0

    def forward(self, sample: Tensor, timestep: Tensor, return_dict: bool = True) -> tuple[Tensor]:
        x = self.gain(sample, 2.0, shift=timestep[:, None, None])
        text, picture = self.pair(x)
        x = self.last(text + 3 * picture, gain=0.5)
        self.ran_to_the_end += 1
        return (x,)


NAMES = ("gain", "pair", "last")


@pytest.fixture
def network() -> Network:
    return Network().requires_grad_(False)


@pytest.fixture(scope="module")
def trajectories() -> Trajectories:
    inputs = torch.randn(STEPS, SAMPLES, 4, 3, generator=torch.Generator().manual_seed(0))
    return Trajectories(TIMESTEPS, inputs, inputs, {}, inputs[0])


def recorder(network: nn.Module, trajectories: Trajectories, batch: int = 2, evaluations: int = 100) -> BlockRecorder:
    return BlockRecorder(network, NAMES, trajectories, evaluations=evaluations, batch=batch)


def expected(trajectories: Trajectories, samples: int = SAMPLES) -> dict[str, list[Tensor]]:
    """Inputs and output of every block, the samples of a step after each other."""
    x = trajectories.inputs[:, :samples].flatten(0, 1)
    shift = TIMESTEPS.repeat_interleave(samples)[:, None, None]
    first = 2 * x + shift
    return {
        "gain": [x, shift, first],
        "pair": [first, torch.cat([first, -first], dim=1)],
        "last": [-2 * first, -first],
    }


@pytest.mark.parametrize("batch", [1, 2, 5, 16])
def test_every_block_s_calls_are_recorded_whatever_is_evaluated_at_once(
    network: Network, trajectories: Trajectories, batch: int
) -> None:
    made = recorder(network, trajectories, batch)
    for name in NAMES:
        calls = made.take(name)
        for found, wanted in zip(calls.tensors, expected(trajectories)[name], strict=True):
            torch.testing.assert_close(found, wanted)
        assert all(tensor.is_contiguous() for tensor in calls.tensors)
    assert made.take("gain").args[1:] == (2.0,)
    assert made.take("last").kwargs == {"gain": 0.5}
    assert not any(module._forward_hooks for module in network.modules())


def test_one_pass_records_all_and_stops_after_the_last_block(network: Network, trajectories: Trajectories) -> None:
    made = recorder(network, trajectories)
    evaluations: list[int] = []
    network.gain.register_forward_pre_hook(lambda _, args: evaluations.append(len(args[0])))
    for name in NAMES:
        made.take(name)
    assert evaluations == [1, 2, 2, 1, 2, 2, 1]  # once for the sizes, then two steps of five samples
    assert network.ran_to_the_end == 0


def test_blocks_that_do_not_fit_together_are_recorded_one_after_the_other(
    network: Network, trajectories: Trajectories, monkeypatch: pytest.MonkeyPatch
) -> None:
    # one evaluation: 12 numbers in, 12 out, a shift; pair puts out twice as much; last as gain without a shift
    assert list(recorder_sizes(network, trajectories).values()) == [4 * 25, 4 * 36, 4 * 24]
    monkeypatch.setattr(calib.record.block_inputs, "MOST_BYTES", 4 * 36 * STEPS * 3)
    made = recorder(network, trajectories)
    assert made.groups == [{"gain": 4}, {"pair": 3}, {"last": 4}]
    for name, samples in (("gain", 4), ("pair", 3), ("last", 4)):
        for found, wanted in zip(made.take(name).tensors, expected(trajectories, samples)[name], strict=True):
            torch.testing.assert_close(found, wanted)


def recorder_sizes(network: nn.Module, trajectories: Trajectories) -> dict[str, int]:
    return block_bytes(network, NAMES, lambda: network(trajectories.inputs[0, :1], TIMESTEPS[:1]))


@pytest.mark.parametrize(("evaluations", "samples"), [(1, 1), (2, 1), (5, 2), (6, 3), (100, 5)])
def test_no_more_evaluations_than_asked_for_are_recorded(
    network: Network, trajectories: Trajectories, evaluations: int, samples: int
) -> None:
    assert len(recorder(network, trajectories, evaluations=evaluations).take("pair").output) == STEPS * samples


@given(
    st.dictionaries(st.text(min_size=1), st.integers(1, 1000), min_size=1),
    st.integers(1, 9),
    st.integers(1, 99),
    st.integers(1, 500),
)
def test_every_block_is_in_one_group_and_its_samples_depend_on_its_size_alone(
    sizes: dict[str, int], steps: int, samples: int, evaluations: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calib.record.block_inputs, "MOST_BYTES", 10_000)
        groups = split_blocks(sizes, steps, samples, evaluations)
        alone = {name: split_blocks({name: size}, steps, samples, evaluations)[0][name] for name, size in sizes.items()}
    assert [name for group in groups for name in group] == list(sizes)
    for group in groups:
        assert len(group) == 1 or sum(sizes[name] * steps * count for name, count in group.items()) <= 10_000
        for name, count in group.items():
            assert count == alone[name]
            assert 1 <= count <= samples
            assert count == 1 or count * steps <= evaluations


def test_picked_rows_are_of_all_tensors() -> None:
    x = torch.arange(6.0).view(3, 2)
    args, kwargs = BlockInputs((x, 7), {"y": -x, "z": None}, x).picked(torch.tensor([2, 0]))
    assert args[1] == 7
    assert kwargs["z"] is None
    torch.testing.assert_close(args[0], x[[2, 0]])
    torch.testing.assert_close(kwargs["y"], -x[[2, 0]])


def test_a_joint_block_is_judged_by_both_of_its_streams() -> None:
    text, picture = torch.zeros(2, 3, 4), torch.ones(2, 5, 4)
    both = whole_output((text, picture))
    assert both.shape == (2, 8, 4)
    torch.testing.assert_close(both[:, 3:], picture)
    assert whole_output((None, picture)).shape == picture.shape  # SD3's last block passes no text on
    assert whole_output({"sample": picture}).shape == picture.shape
    assert whole_output(picture) is picture


def test_blocks_of_one_group_keep_their_own_number_of_samples(network: Network, trajectories: Trajectories) -> None:
    found = _recorded(network, {"gain": 5, "pair": 3}, trajectories, batch=2)  # pair: two samples, then one of two
    for name, samples in (("gain", 5), ("pair", 3)):
        for kept, wanted in zip(found[name].tensors, expected(trajectories, samples)[name], strict=True):
            torch.testing.assert_close(kept, wanted)
