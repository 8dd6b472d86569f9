"""What calibration keeps of a layer's inputs: patches to fit on, and exact extrema to take ranges from.

Patches go to files, a region for each group of samples, and are read back memory-mapped, one layer at a time. So the
memory this takes does not grow with the number of layers, and processes that share a calibration write one file.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from calib.hooks import hooked
from calib.layer_op import draw_positions, take_patches
from calib.model import predict
from calib.moments import Moments
from calib.trajectories import Trajectories
from calib.work import WorkFolder
from dmq_export.layer import LayerSpec
from dmq_export.seeds import stream_seed

GROUP = 16  # samples that share one extremum; ranges average over groups
FEWEST_ROWS, MOST_ROWS = 4096, 8192
MOST_NUMBERS = 2**26  # of one layer's patches: 256 MiB
MOST_WAITING = 2**28  # bytes of patches on a GPU that are not yet written


@dataclass(frozen=True)
class Extrema:
    """Per-channel extrema of a layer's input, ``[G, T, C]``: group of samples, step, channel."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class LayerInputs:
    """A layer's inputs over the calibration set.

    Attributes:
        patches: ``[M, C, K]``, see :mod:`calib.layer_op`.
        step: the row of the timesteps table each patch was taken at, ``[M]``.
        extrema: over the whole set, not only the patches.
    """

    patches: Tensor
    step: Tensor
    extrema: Extrema

    @cached_property
    def moments(self) -> Moments:
        """Of the patches."""
        return Moments(self.patches)

    def to(self, device: torch.device) -> "LayerInputs":
        low, high = self.extrema.low.to(device), self.extrema.high.to(device)
        return LayerInputs(self.patches.to(device), self.step.to(device), Extrema(low, high))

    def thinned(self, numbers: int) -> "LayerInputs":
        """Evenly spaced patches of at most about ``numbers`` numbers; the extrema of all."""
        every = max(1, round(self.patches.numel() / numbers))
        return LayerInputs(self.patches[::every], self.step[::every], self.extrema)


@dataclass(frozen=True)
class Place:
    """Where in the calibration set an evaluation is.

    Attributes:
        group: of samples.
        size: samples in that group.
        first: of the evaluated samples, within the group.
        step: row of the timesteps table.
    """

    group: int
    size: int
    first: int
    step: int


Visit = Callable[[Tensor, Place], None]


def group_count(trajectories: Trajectories) -> int:
    """Groups of :data:`GROUP` samples, the last one may be smaller."""
    return -(-trajectories.inputs.shape[1] // GROUP)


def replay(
    network: nn.Module,
    trajectories: Trajectories,
    group: int,
    visit: Mapping[str, Visit],
    *,
    batch: int = GROUP,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Evaluate the network on one group of samples, step by step; each named layer's ``visit`` receives its input.

    Args:
        batch: samples per evaluation.
    """
    device = next(network.parameters()).device
    start = group * GROUP
    size = min(GROUP, trajectories.inputs.shape[1] - start)
    for step, timestep in enumerate(trajectories.timesteps):
        for first in range(0, size, batch):
            rows = slice(start + first, start + min(first + batch, size))
            conditioning = {key: value[rows].to(device) for key, value in trajectories.conditioning.items()}
            sample = trajectories.inputs[step, rows].to(device)
            with torch.no_grad(), _inputs_seen(network, visit, Place(group, size, first, step)):
                predict(network, sample, timestep.to(device), conditioning)
            advance(len(sample))


@contextmanager
def _inputs_seen(network: nn.Module, visit: Mapping[str, Visit], place: Place) -> Iterator[None]:
    hooks = (
        network.get_submodule(name).register_forward_pre_hook(lambda _, args, see=see: see(args[0], place))
        for name, see in visit.items()
    )
    with hooked(hooks):
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
    return 4 * evaluations * patches_per_sample(spec, evaluations) * spec.in_channels * math.prod(spec.kernel)


class Captures:
    """The inputs of several layers over a calibration set, captured group by group into ``work``.

    Args:
        specs: the layers of one pass over the set.
        seed: of the patches' positions.
    """

    def __init__(self, work: WorkFolder, trajectories: Trajectories, specs: Sequence[LayerSpec], *, seed: int) -> None:
        self._work = work
        self._trajectories = trajectories
        self._specs = specs
        self._seed = seed

    def has(self, group: int) -> bool:
        """Whether the group is captured."""
        key = self._key(group)
        return key in self._work and self._work.load(key).facts["layers"] == [spec.name for spec in self._specs]

    def take(
        self, network: nn.Module, group: int, *, batch: int = GROUP, advance: Callable[[int], None] = lambda _: None
    ) -> None:
        """Run the network once over a group of samples.

        Args:
            batch: samples per evaluation; which patches are taken does not depend on it.
            advance: called with the number of evaluations done, for progress.
        """
        writer = _Writer()
        recorders = {
            spec.name: _Recorder(spec, self._trajectories, self._file(spec), writer, self._seed) for spec in self._specs
        }
        replay(network, self._trajectories, group, recorders, batch=batch, advance=advance)
        writer.flush()
        tensors = {
            f"{name}/{end}": table for name, recorder in recorders.items() for end, table in recorder.extrema().items()
        }
        self._work.save(self._key(group), tensors, {"layers": list(recorders)})

    def load(self, spec: LayerSpec) -> LayerInputs:
        """A layer's inputs once every group is captured; the patches are memory-mapped."""
        per_sample = patches_per_sample(spec, self._trajectories.evaluations)
        shape = (self._trajectories.evaluations * per_sample, spec.in_channels, math.prod(spec.kernel))
        patches = torch.from_file(str(self._file(spec)), size=math.prod(shape), dtype=torch.float32).view(shape)
        samples, steps = self._trajectories.inputs.shape[1], len(self._trajectories.timesteps)
        sizes = [min(GROUP, samples - first) for first in range(0, samples, GROUP)]
        step = torch.cat([torch.arange(steps).repeat_interleave(size * per_sample) for size in sizes])
        groups = [self._work.load(self._key(group)).tensors for group in range(len(sizes))]
        low, high = (torch.stack([group[f"{spec.name}/{end}"] for group in groups]) for end in ("low", "high"))
        return LayerInputs(patches, step, Extrema(low, high))

    def forget(self) -> None:
        """Delete the patches, which nobody needs once the layers are fitted."""
        for spec in self._specs:
            self._file(spec).unlink(missing_ok=True)

    def _key(self, group: int) -> str:
        first = self._specs[0]
        return f"captures/{first.bits}/{first.name}/{group}"

    def _file(self, spec: LayerSpec) -> Path:
        return self._work.raw(f"{spec.name}.patches")


class _Recorder:
    """Writes one layer's patches of one group, call by call, and keeps its extrema."""

    def __init__(self, spec: LayerSpec, trajectories: Trajectories, file: Path, writer: "_Writer", seed: int) -> None:
        self._spec = spec
        self._steps = len(trajectories.timesteps)
        self._per_sample = patches_per_sample(spec, trajectories.evaluations)
        self._seed = seed
        self._file = file
        self._writer = writer
        shape = (self._steps, spec.in_channels)
        self._low, self._high = torch.full(shape, torch.inf), torch.full(shape, -torch.inf)
        with self._file.open("ab") as stream:
            stream.truncate(capture_bytes(spec, trajectories.evaluations))

    def __call__(self, x: Tensor, place: Place) -> None:
        # drawn for the whole group, so that they do not depend on how many samples are evaluated at once
        generator = torch.Generator().manual_seed(
            stream_seed(self._seed, "patches", self._spec.name, place.group, place.step)
        )
        positions = draw_positions(self._spec, (place.size, *x.shape[1:]), self._per_sample, generator)
        own = positions[place.first : place.first + len(x)]
        sample = place.group * GROUP * self._steps + place.step * place.size + place.first
        self._writer.write(self._file, sample * self._per_sample, take_patches(self._spec, x, own))
        axes = [axis for axis in range(x.dim()) if axis != self._spec.channel_axis % x.dim()]
        self._low, self._high = self._low.to(x.device), self._high.to(x.device)
        self._low[place.step] = torch.minimum(self._low[place.step], x.amin(axes))
        self._high[place.step] = torch.maximum(self._high[place.step], x.amax(axes))

    def extrema(self) -> dict[str, Tensor]:
        return {"low": self._low, "high": self._high}


class _Writer:
    """Writes rows into files; those that lie on a GPU together, since fetching each would stop it each time."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Path, int, Tensor]] = []
        self._bytes = 0

    def write(self, file: Path, first: int, rows: Tensor) -> None:
        """Put ``rows`` where row number ``first`` of the file is, now or later."""
        self._waiting.append((file, first, rows))
        self._bytes += rows.nbytes
        if self._bytes > MOST_WAITING or not rows.is_cuda:
            self.flush()

    def flush(self) -> None:
        """Write what waits."""
        for file, first, rows in self._waiting:
            content = memoryview(rows.cpu().contiguous().numpy().tobytes())
            _write_at(file, first * rows[0].nbytes, content)
        self._waiting, self._bytes = [], 0


def _write_at(file: Path, offset: int, content: memoryview) -> None:
    descriptor = os.open(file, os.O_WRONLY)
    try:
        while content:
            written = os.pwrite(descriptor, content, offset)
            content, offset = content[written:], offset + written
    finally:
        os.close(descriptor)
