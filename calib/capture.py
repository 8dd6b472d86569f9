"""What calibration keeps of a layer's inputs: patches to fit on, and exact extrema to take ranges from."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from calib.layer_op import take_patches
from calib.model import predict
from calib.trajectories import Trajectories
from dmq_export.layer import LayerSpec
from dmq_export.seeds import stream_seed

GROUP = 16  # samples that share one extremum; ranges average over groups


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

    def to(self, device: torch.device) -> "LayerInputs":
        low, high = self.extrema.low.to(device), self.extrema.high.to(device)
        return LayerInputs(self.patches.to(device), self.step.to(device), Extrema(low, high))


@contextmanager
def _inputs_seen(network: nn.Module, visit: Mapping[str, Callable[[Tensor, int], None]], step: int) -> Iterator[None]:
    handles = [
        network.get_submodule(name).register_forward_pre_hook(lambda _, args, see=see: see(args[0], step))
        for name, see in visit.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def patch_rows(spec: LayerSpec) -> int:
    """How many patches to fit a layer on: rounding by second moments wants several times its columns."""
    columns = spec.in_channels // spec.groups
    for size in spec.kernel:
        columns *= size
    return max(4096, 8 * columns)


def patches_per_sample(spec: LayerSpec, evaluations: int) -> int:
    """How many patches each evaluation of a sample gives to reach :func:`patch_rows`, at least one."""
    return -(-patch_rows(spec) // evaluations)


def capture_bytes(spec: LayerSpec, evaluations: int) -> int:
    """Memory that :func:`capture_inputs` keeps for a layer's patches; ``evaluations`` is samples times steps."""
    taps = 1
    for size in spec.kernel:
        taps *= size
    return 4 * evaluations * patches_per_sample(spec, evaluations) * spec.in_channels * taps


def capture_inputs(
    network: nn.Module,
    trajectories: Trajectories,
    specs: Sequence[LayerSpec],
    *,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> dict[str, LayerInputs]:
    """Run the network once over the calibration set and keep the inputs of ``specs``, on the CPU.

    Args:
        advance: called with the number of evaluations done, for progress.
    """
    recorders = {spec.name: _Recorder(spec, trajectories, seed) for spec in specs}
    replay(network, trajectories, recorders, advance=advance)
    return {name: recorder.result() for name, recorder in recorders.items()}


def replay(
    network: nn.Module,
    trajectories: Trajectories,
    visit: Mapping[str, Callable[[Tensor, int], None]],
    *,
    advance: Callable[[int], None] = lambda _: None,
) -> None:
    """Evaluate the network on the whole set; each named layer's ``visit`` receives its input and the step's row.

    Groups of :data:`GROUP` samples, each through all steps.
    """
    device = next(network.parameters()).device
    steps, samples = trajectories.inputs.shape[:2]
    for start in range(0, samples, GROUP):
        group = slice(start, min(start + GROUP, samples))
        conditioning = {key: value[group].to(device) for key, value in trajectories.conditioning.items()}
        for step in range(steps):
            sample = trajectories.inputs[step, group].to(device)
            with torch.no_grad(), _inputs_seen(network, visit, step):
                predict(network, sample, trajectories.timesteps[step].to(device), conditioning)
            advance(len(sample))


class _Recorder:
    """Collects one layer's :class:`LayerInputs` call by call."""

    def __init__(self, spec: LayerSpec, trajectories: Trajectories, seed: int) -> None:
        self._spec = spec
        self._steps = len(trajectories.timesteps)
        self._per_sample = patches_per_sample(spec, trajectories.evaluations)
        self._generator = torch.Generator().manual_seed(stream_seed(seed, "patches", spec.name))
        self._patches: list[Tensor] = []
        self._step_of: list[Tensor] = []
        self._low: list[Tensor] = []
        self._high: list[Tensor] = []

    def __call__(self, x: Tensor, step: int) -> None:
        self._patches.append(take_patches(self._spec, x, self._per_sample, self._generator).cpu())
        self._step_of.append(torch.full((len(self._patches[-1]),), step))
        axes = [axis for axis in range(x.dim()) if axis != self._spec.channel_axis % x.dim()]
        self._low.append(x.amin(axes).cpu())
        self._high.append(x.amax(axes).cpu())

    def result(self) -> LayerInputs:
        def table(rows: list[Tensor]) -> Tensor:
            return torch.stack(rows).view(-1, self._steps, self._spec.in_channels)

        extrema = Extrema(table(self._low), table(self._high))
        return LayerInputs(torch.cat(self._patches), torch.cat(self._step_of), extrema)
