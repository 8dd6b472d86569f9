"""Bytes a calibration holds, computed from the layers' shapes and one evaluation of the model."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from calib.device import FLOAT_BYTES, memory_held
from calib.fit.adaround import adaround_bytes
from calib.fit.layer import fit_bytes
from calib.model.hooks import hooked
from calib.model.layers import LayerSelection
from calib.model.load import SourceModel
from calib.model.network import predict
from calib.record.block_inputs import block_bytes, recorded_bytes
from calib.record.conditioning import Conditioning
from calib.record.row_writer import MOST_WAITING
from calib.record.trajectories import SetSize, trajectory_bytes
from dmq_export.recipe import Recipe

WORKER_BYTES = 400 * 2**20  # a process that has imported PyTorch


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a calibration.

    Attributes:
        fixed: held throughout: the process with the model, both sets of trajectories; on a GPU the model alone.
        check: on top of it during the check, beside the activations: all layers' codes, one layer's weights.
        waiting: on top of it while layer inputs are captured: those that wait to be written.
        sample: activations of one sample.
        fit: of the largest layer.
        calls: recorded at once for AdaRound.
        block: of AdaRound on top of these, at the most demanding block.
    """

    fixed: int
    check: int
    waiting: int
    sample: int
    fit: int
    calls: int
    block: int

    def evaluating(self, batch: int) -> int:
        """During the capture, the check or AdaRound's recording, ``batch`` samples at a time."""
        return self.fixed + max(self.waiting, self.check, self.calls) + batch * self.sample

    def peak(self, batch: int, workers: int) -> int:
        """At the worst moment, of all processes together."""
        fitting = self.fit if workers == 1 else workers * (self.fit + WORKER_BYTES)
        return max(self.evaluating(batch), self.fixed + fitting, self.fixed + self.calls + self.block)


def estimate_memory(
    source: SourceModel, selection: LayerSelection, recipe: Recipe, conditioning: Conditioning
) -> MemoryEstimate:
    """What calibrating the layers of ``selection`` takes; on a GPU these are bytes of its memory.

    Args:
        conditioning: of one sample at least.
    """
    device = next(source.network.parameters()).device
    specs, branches = selection.coverage.quantized, conditioning.branches
    sizes = [spec.weight_count for spec in specs]
    evaluations = recipe.samples * branches * recipe.steps
    # before asking what the process holds: it does more afterwards
    sample = branches * activation_bytes(source, conditioning)
    calls, block = _block_rounding(source, selection, recipe, conditioning) if recipe.rounding == "adaround" else (0, 0)
    on_gpu = device.type == "cuda"
    both_sets = SetSize((recipe.samples + recipe.check_samples) * branches, recipe.steps)
    trajectories = trajectory_bytes(source.sample_shape, both_sets)
    return MemoryEstimate(
        fixed=memory_held(device) + (0 if on_gpu else trajectories),
        check=sum(sizes) + 3 * FLOAT_BYTES * max(sizes),  # a code takes a byte
        waiting=MOST_WAITING if on_gpu else 0,
        sample=sample,
        fit=max(fit_bytes(spec, recipe, evaluations) for spec in specs),
        calls=calls,
        block=block,
    )


def _block_rounding(
    source: SourceModel, selection: LayerSelection, recipe: Recipe, conditioning: Conditioning
) -> tuple[int, int]:
    """Memory that AdaRound takes: for recorded blocks, and for the most demanding fit of one."""
    names = [block.name for block in selection.blocks]
    sizes = block_bytes(source.network, names, lambda: evaluate_zeros(source, conditioning, 1))
    recorded = recorded_bytes(sizes, recipe.steps, recipe.samples * conditioning.branches, recipe.round_samples)
    counts = {spec.name: spec.weight_count for spec in selection.coverage.quantized}
    outputs = _output_bytes(source, names, conditioning)
    fits = (
        adaround_bytes(outputs[block.name], sum(counts[name] for name in block.layers)) for block in selection.blocks
    )
    return recorded, max(fits)


def _output_bytes(source: SourceModel, names: Sequence[str], conditioning: Conditioning) -> dict[str, int]:
    """By block, what its modules put out in one evaluation of one sample: all of it is kept for the gradients."""
    totals = dict.fromkeys(names, 0)

    def counter(name: str) -> Callable[..., None]:
        def count(_: nn.Module, __: Any, output: Any) -> None:
            totals[name] += sum(value.nbytes for value in _tensors(output))

        return count

    inside = ((name, module) for name in names for module in source.network.get_submodule(name).modules())
    with hooked(module.register_forward_hook(counter(name)) for name, module in inside):
        evaluate_zeros(source, conditioning, 1)
    return totals


def _tensors(output: Any) -> list[Tensor]:
    return [value for value in (output if isinstance(output, tuple) else (output,)) if isinstance(value, Tensor)]


def activation_bytes(source: SourceModel, conditioning: Conditioning) -> int:
    """What evaluating one sample holds at its worst moment: module outputs, and as much again between modules."""
    with _live_outputs(source.network) as live:
        evaluate_zeros(source, conditioning, 1)
    return 2 * live.most


def evaluate_zeros(source: SourceModel, conditioning: Conditioning, batch: int) -> None:
    """Run the model once, on ``batch`` samples of zeros, each with the first row of ``conditioning``."""
    device = next(source.network.parameters()).device
    first = {
        key: value[:1].expand(batch, *value.shape[1:]).to(device) for key, value in conditioning.conditional.items()
    }
    with torch.no_grad():
        sample = torch.zeros(batch, *source.sample_shape, device=device)
        predict(source.network, sample, torch.tensor(1.0, device=device), first).cpu()


class _Live:
    """Bytes of the tensors that are alive now, and the most there were."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self._known: set[int] = set()

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage.data_ptr()
        if address in self._known:
            return
        self._known.add(address)
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._drop, address, storage.nbytes())

    def _drop(self, address: int, size: int) -> None:
        self._known.discard(address)
        self.now -= size


@contextmanager
def _live_outputs(network: nn.Module) -> Iterator[_Live]:
    """Counts what the network's modules put out while the block runs."""
    live = _Live()

    def note(_: nn.Module, __: Any, output: Any) -> None:
        for value in _tensors(output):
            live.add(value)

    with hooked(module.register_forward_hook(note) for module in network.modules()):
        yield live
