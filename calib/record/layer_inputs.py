"""What calibration keeps of a layer's inputs: patches to fit on, and exact extrema to take ranges from.

Patches go to files, a region for each group of rows, and are read back memory-mapped, one layer at a time. So the
memory this takes does not grow with the number of layers, and processes that share a calibration write one file.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.device import FLOAT_BYTES
from calib.model.hooks import hooked
from calib.model.network import predict
from calib.quant.patches import draw_positions, take_patches
from calib.quant.second_moments import SecondMoments
from calib.record.row_writer import RowWriter
from calib.record.trajectories import SetSize, Trajectories
from calib.record.work_folder import WorkFolder
from dmq_export.common.seeds import stream_seed
from dmq_export.layer import LayerSpec

GROUP = 16  # rows that share one extremum; ranges average over groups
FEWEST_ROWS, MOST_ROWS = 4096, 8192
MOST_NUMBERS = 2**26  # of one layer's patches, 256 MiB; more only where every evaluation gives just one


@dataclass(frozen=True)
class Extrema:
    """Per-channel extrema of a layer's input, ``[G, T, C]``: group of rows, step, channel."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class LayerInputs:
    """A layer's inputs over the calibration set.

    Attributes:
        patches: ``[M, C, K]``, see :mod:`calib.quant.patches`.
        step: the row of the timesteps table each patch was taken at, ``[M]``.
        extrema: over the whole set, not only the patches.
    """

    patches: Tensor
    step: Tensor
    extrema: Extrema

    @cached_property
    def moments(self) -> SecondMoments:
        """Of the patches."""
        return SecondMoments(self.patches)

    def to(self, device: torch.device) -> "LayerInputs":
        low, high = self.extrema.low.to(device), self.extrema.high.to(device)
        return LayerInputs(self.patches.to(device), self.step.to(device), Extrema(low, high))

    def thinned(self, numbers: int) -> "LayerInputs":
        """Evenly spaced patches of at most about ``numbers`` numbers; the extrema of all."""
        every = max(1, round(self.patches.numel() / numbers))
        return LayerInputs(self.patches[::every], self.step[::every], self.extrema)


@dataclass(frozen=True)
class EvaluationIndex:
    """Which evaluation of the calibration set: of the rows from ``first_row`` on, at one step."""

    first_row: int
    step: int


InputHook = Callable[[Tensor, EvaluationIndex], None]


def evaluate_recorded(
    network: nn.Module,
    trajectories: Trajectories,
    rows: range,
    hooks: Mapping[str, InputHook],
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Evaluate the network on some rows at once, step by step; each named layer's hook receives its input."""
    device = next(network.parameters()).device
    own = slice(rows.start, rows.stop)
    conditioning = {key: value[own].to(device) for key, value in trajectories.conditioning.items()}
    for step, timestep in enumerate(trajectories.timesteps):
        sample = trajectories.inputs[step, own].to(device)
        with torch.no_grad(), inputs_seen(network, hooks, EvaluationIndex(rows.start, step)):
            predict(network, sample, timestep.to(device), conditioning)
        advance(len(sample))


@contextmanager
def inputs_seen(network: nn.Module, hooks: Mapping[str, InputHook], index: EvaluationIndex) -> Iterator[None]:
    """While the block makes the evaluation ``index`` of the network, each named layer's hook receives its input."""
    handles = (
        network.get_submodule(name).register_forward_pre_hook(lambda _, args, hook=hook: hook(args[0], index))
        for name, hook in hooks.items()
    )
    with hooked(handles):
        yield


def columns_of(spec: LayerSpec) -> int:
    """Inputs of one output: the length of a weight row."""
    return spec.in_channels // spec.groups * math.prod(spec.kernel)


def patch_rows(spec: LayerSpec) -> int:
    """How many patches to fit a layer on: rounding by second moments wants several times its columns."""
    wanted = min(max(FEWEST_ROWS, 8 * columns_of(spec)), MOST_ROWS)
    return min(wanted, max(1, MOST_NUMBERS // (spec.in_channels * math.prod(spec.kernel))))


def patches_per_sample(spec: LayerSpec, evaluations: int) -> int:
    """How many patches each evaluation of a sample gives to reach :func:`patch_rows`, at least one."""
    return -(-patch_rows(spec) // evaluations)


def capture_bytes(spec: LayerSpec, evaluations: int) -> int:
    """Size of the file of a layer's patches; ``evaluations`` is samples times steps."""
    return FLOAT_BYTES * evaluations * patches_per_sample(spec, evaluations) * spec.in_channels * math.prod(spec.kernel)


class Captures:
    """The inputs of several layers over a calibration set, captured a batch of rows at a time into ``work``.

    Args:
        batches: of consecutive rows, all there are.
        steps: at which each row is evaluated.
        specs: the layers of one pass over the set.
        seed: of the patches' positions.
    """

    def __init__(
        self, work: WorkFolder, batches: Sequence[range], steps: int, specs: Sequence[LayerSpec], *, seed: int
    ) -> None:
        self.size = SetSize(batches[-1].stop, steps)
        self.seed = seed
        self._work = work
        self.batches = batches
        self._specs = specs

    def has(self, rows: range) -> bool:
        """Whether a batch is captured, perhaps beside other layers: when there was more room for them."""
        key = self._key(rows)
        layers = {spec.name for spec in self._specs}
        return key in self._work and layers <= set(self._work.load(key, only=()).facts["layers"])

    @contextmanager
    def recording(self, rows: range) -> Iterator[Mapping[str, InputHook]]:
        """What each layer's input of a batch is to be given to, step by step; kept if the block ends well."""
        writer = RowWriter()
        recorders = {spec.name: _Recorder(spec, self, rows, writer) for spec in self._specs}
        yield recorders
        writer.flush()
        tensors = {
            f"{name}/{end}": table for name, recorder in recorders.items() for end, table in recorder.extrema().items()
        }
        self._work.save(self._key(rows), tensors, {"layers": list(recorders)})

    def take(
        self,
        network: nn.Module,
        trajectories: Trajectories,
        rows: range,
        *,
        advance: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Evaluate the network on a recorded batch for nothing but this."""
        with self.recording(rows) as hooks:
            evaluate_recorded(network, trajectories, rows, hooks, advance=advance)

    def load(self, spec: LayerSpec) -> LayerInputs:
        """A layer's inputs once every batch is captured; the patches are memory-mapped."""
        per_sample = patches_per_sample(spec, self.size.evaluations)
        shape = (self.size.evaluations * per_sample, spec.in_channels, math.prod(spec.kernel))
        patches = torch.from_file(str(self.file(spec)), size=math.prod(shape), dtype=torch.float32).view(shape)
        steps = torch.arange(self.size.steps)
        groups = groups_of(range(self.size.rows))
        step = torch.cat([steps.repeat_interleave(len(group) * per_sample) for group in groups])
        return LayerInputs(patches, step, self._extrema(spec, len(groups)))

    def _extrema(self, spec: LayerSpec, groups: int) -> Extrema:
        """Of whole groups, from those of the batches' parts of them."""
        names = [f"{spec.name}/{end}" for end in ("low", "high")]
        parts = [self._work.load(self._key(rows), only=names).tensors for rows in self.batches]
        low, high = (torch.cat([part[name] for part in parts]) for name in names)
        group = torch.tensor([part.start // GROUP for rows in self.batches for part in groups_of(rows)])
        lows, highs = zip(*((low[group == n].amin(0), high[group == n].amax(0)) for n in range(groups)), strict=True)
        return Extrema(torch.stack(lows), torch.stack(highs))

    def forget(self) -> None:
        """Delete the patches, which nobody needs once the layers are fitted."""
        for spec in self._specs:
            self.file(spec).unlink(missing_ok=True)

    def file(self, spec: LayerSpec) -> Path:
        """Where a layer's patches are."""
        return self._work.raw(f"{spec.name}.patches")

    def _key(self, rows: range) -> str:
        first = self._specs[0]
        return f"captures/{first.bits}/{first.name}/{rows.start}"


class _Recorder:
    """Writes one layer's patches of a batch, step by step, and keeps its extrema."""

    def __init__(self, spec: LayerSpec, captures: Captures, batch: range, writer: RowWriter) -> None:
        self._spec = spec
        self._seed = captures.seed
        self._size = captures.size
        self._file = captures.file(spec)
        self._writer = writer
        self._per_sample = patches_per_sample(spec, self._size.evaluations)
        self._first_group = batch.start // GROUP
        shape = (len(groups_of(batch)), self._size.steps, spec.in_channels)
        self._low, self._high = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
        with self._file.open("ab") as stream:
            stream.truncate(capture_bytes(spec, self._size.evaluations))

    def __call__(self, x: Tensor, index: EvaluationIndex) -> None:
        self._low, self._high = self._low.to(x.device), self._high.to(x.device)
        axes = [axis for axis in range(x.dim()) if axis != self._spec.channel_axis % x.dim()]
        for rows in groups_of(range(index.first_row, index.first_row + len(x))):
            own = x[rows.start - index.first_row : rows.stop - index.first_row]
            self._take(own, rows, index.step)
            group = rows.start // GROUP - self._first_group
            self._low[group, index.step] = own.amin(axes)
            self._high[group, index.step] = own.amax(axes)

    def _take(self, x: Tensor, rows: range, step: int) -> None:
        """Patches of rows of one group."""
        number = rows.start // GROUP
        group = range(number * GROUP, min((number + 1) * GROUP, self._size.rows))
        # drawn for the whole group, so that they do not depend on how many rows are evaluated at once
        generator = torch.Generator().manual_seed(stream_seed(self._seed, "patches", self._spec.name, number, step))
        positions = draw_positions(self._spec, (len(group), *x.shape[1:]), self._per_sample, generator)
        within = slice(rows.start - group.start, rows.stop - group.start)
        before = group.start * self._size.steps + step * len(group) + within.start
        self._writer.write(self._file, before * self._per_sample, take_patches(self._spec, x, positions[within]))

    def extrema(self) -> dict[str, Tensor]:
        """Of each of the batch's groups, ``[G, T, C]``."""
        return {"low": self._low, "high": self._high}


def groups_of(rows: range) -> list[range]:
    """Consecutive rows, parted where groups of :data:`GROUP` end."""
    ends = range((rows.start // GROUP + 1) * GROUP, rows.stop + GROUP, GROUP)
    return [range(max(rows.start, end - GROUP), min(rows.stop, end)) for end in ends]
