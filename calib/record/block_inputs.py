"""What AdaRound fits blocks on: their inputs and outputs over the calibration set, several blocks in one pass."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from calib.model.hooks import hooked
from calib.model.network import predict
from calib.record.trajectories import Trajectories

MOST_BYTES = 2**30  # of the calls held at once

See = Callable[[tuple[Any, ...], Mapping[str, Any], Tensor], None]


class _AllSeen(Exception):  # noqa: N818 - control flow, like StopIteration
    """Every block has run: the rest of the network need not."""


@dataclass(frozen=True)
class BlockInputs:
    """Inputs and outputs of a block over ``N`` evaluations; what is no tensor is the same in all of them.

    Attributes:
        output: all that the block passes on, see :func:`whole_output`.
    """

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor

    def picked(self, rows: Tensor) -> tuple[list[Any], dict[str, Any]]:
        """The arguments of some evaluations."""

        def pick(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) else value

        return [pick(value) for value in self.args], {key: pick(value) for key, value in self.kwargs.items()}

    @property
    def tensors(self) -> list[Tensor]:
        """Of the inputs and the output, in a fixed order."""
        values = (*self.args, *self.kwargs.values(), self.output)
        return [value for value in values if isinstance(value, Tensor)]


class BlockRecorder:
    """Records blocks, as many at once as :data:`MOST_BYTES` take, when the first of them is asked for.

    Args:
        names: of the blocks, in the order that they will be asked for.
        evaluations: how many of the trajectories' evaluations to record of a block, in whole samples; fewer, if they
            would take more than :data:`MOST_BYTES`.
        batch: samples per evaluation.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], trajectories: Trajectories, *, evaluations: int, batch: int
    ) -> None:
        self._network, self._names, self._trajectories = network, names, trajectories
        self._evaluations, self._batch = evaluations, batch
        self._held: dict[str, BlockInputs] = {}

    @cached_property
    def groups(self) -> list[dict[str, int]]:
        """Blocks that are recorded together, each with the samples to record of it."""
        sizes = block_bytes(
            self._network, self._names, lambda: _evaluate(self._network, self._trajectories, 0, slice(0, 1))
        )
        steps, samples = self._trajectories.inputs.shape[:2]
        return split_blocks(sizes, steps, samples, self._evaluations)

    def take(self, name: str) -> BlockInputs:
        """The calls of one block, which are forgotten here."""
        if name not in self._held:
            group = next(group for group in self.groups if name in group)
            self._held = {}  # before the next ones come
            self._held = _recorded(self._network, group, self._trajectories, self._batch)
        return self._held.pop(name)


def block_bytes(network: nn.Module, names: Sequence[str], evaluate: Callable[[], object]) -> dict[str, int]:
    """What the call of each block takes in one evaluation that ``evaluate`` makes."""
    sizes: dict[str, int] = {}

    def seer(name: str) -> See:
        def see(args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor) -> None:
            sizes[name] = sum(tensor.nbytes for tensor in BlockInputs(args, kwargs, output).tensors)

        return see

    with _blocks_seen(network, {name: seer(name) for name in names}):
        evaluate()
    return {name: sizes[name] for name in names}


def split_blocks(sizes: Mapping[str, int], steps: int, samples: int, evaluations: int) -> list[dict[str, int]]:
    """Blocks that are recorded together, each with the samples to record of it, :data:`MOST_BYTES` in all.

    How many samples a block gets depends on its own size alone.

    Args:
        sizes: bytes of each block's call, in one evaluation.
        samples: there are.
        evaluations: wanted of each block, in whole samples; at least one is recorded.
    """
    wanted = min(samples, max(1, evaluations // steps))
    groups: list[dict[str, int]] = []
    used = 0
    for name, size in sizes.items():
        own = max(1, min(wanted, MOST_BYTES // (size * steps)))
        taken = size * steps * own
        if not groups or used + taken > MOST_BYTES:
            groups.append({})
            used = 0
        groups[-1][name] = own
        used += taken
    return groups


def recorded_bytes(sizes: Mapping[str, int], steps: int, samples: int, evaluations: int) -> int:
    """The most that is held at once of blocks that are recorded as :func:`split_blocks` says."""
    groups = split_blocks(sizes, steps, samples, evaluations)
    return max(sum(sizes[name] * steps * count for name, count in group.items()) for group in groups)


def whole_output(output: Any) -> Tensor:
    """All that a block passes on; the streams of text and picture of a joint block end to end, ``[N, L + S, D]``."""
    if isinstance(output, Tensor):
        return output
    tensors = output.values() if isinstance(output, Mapping) else output
    return torch.cat([tensor for tensor in tensors if isinstance(tensor, Tensor)], dim=1)


class _Recorder:
    """The calls of one block, as they come."""

    def __init__(self, evaluations: int) -> None:
        self._evaluations = evaluations
        self._done = 0
        self.calls: BlockInputs | None = None

    def note(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor, rows: int) -> None:
        """Keep the first ``rows`` of a call."""
        new = BlockInputs(args, kwargs, output)
        if self.calls is None:
            self.calls = BlockInputs(
                tuple(self._room(value) for value in args),
                {key: self._room(value) for key, value in kwargs.items()},
                self._room(output),
            )
        for kept, value in zip(self.calls.tensors, new.tensors, strict=True):
            kept[self._done : self._done + rows] = value[:rows]
        self._done += rows

    def _room(self, value: Any) -> Any:
        # contiguous: PyTorch's backward of GroupNorm crashes on channels-last inputs without a gradient (2.13, CPU)
        return value.new_empty((self._evaluations, *value.shape[1:])) if isinstance(value, Tensor) else value


def _recorded(
    network: nn.Module, samples: Mapping[str, int], trajectories: Trajectories, batch: int
) -> dict[str, BlockInputs]:
    """The calls of blocks over the first ``samples`` of each, all samples of a step after each other."""
    recorders = {name: _Recorder(count * len(trajectories.timesteps)) for name, count in samples.items()}
    most = max(samples.values())
    for step in range(len(trajectories.timesteps)):
        for first in range(0, most, batch):
            rows = slice(first, min(first + batch, most))
            see = {
                name: _keeping(recorders[name], min(rows.stop, count) - first)
                for name, count in samples.items()
                if first < count
            }
            with _blocks_seen(network, see):
                _evaluate(network, trajectories, step, rows)
    return {name: recorder.calls for name, recorder in recorders.items() if recorder.calls is not None}


def _keeping(recorder: _Recorder, rows: int) -> See:
    return lambda args, kwargs, output: recorder.note(args, kwargs, output, rows)


def _evaluate(network: nn.Module, trajectories: Trajectories, step: int, rows: slice) -> None:
    device = next(network.parameters()).device
    conditioning = {key: value[rows].to(device) for key, value in trajectories.conditioning.items()}
    with torch.no_grad():
        x, timestep = trajectories.inputs[step, rows], trajectories.timesteps[step]
        predict(network, x.to(device), timestep.to(device), conditioning)


@contextmanager
def _blocks_seen(network: nn.Module, see: Mapping[str, See]) -> Iterator[None]:
    """The first call of each named block goes to its ``see``; the evaluation in the block ends after the last one."""
    left = set(see)

    def hook_of(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if name in left:
                left.remove(name)
                see[name](args, kwargs, whole_output(output))
            if not left:
                raise _AllSeen

        return hook

    blocks = ((name, network.get_submodule(name)) for name in see)
    hooks = (block.register_forward_hook(hook_of(name), with_kwargs=True) for name, block in blocks)
    with hooked(hooks), suppress(_AllSeen):
        yield
