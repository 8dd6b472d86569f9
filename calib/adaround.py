"""AdaRound by block reconstruction: each weight is rounded up or down so that the block's output stays.

Nagel et al. 2020 with the blocks of BRECQ (Li et al. 2021). The fit starts from rounding by second moments
(:mod:`calib.gptq`). A block is fitted on the float model's inputs, against its outputs, and its activations stay float;
so no block waits for another, and none learns to make up for errors that another's fit takes away.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.fake_quant import QParams
from calib.layer_op import apply_op, scaled_weight, tau_columns, weight_columns, weight_matrix, weight_of
from calib.model import predict
from calib.survey import Block
from calib.trajectories import Trajectories
from dmq_export.layer import QuantizedLayer
from dmq_export.network import replace_modules
from dmq_export.seeds import stream_seed

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # of the rectified sigmoid
REGULARIZER = 0.01
BETA_START, BETA_END = 20.0, 2.0
WARM_UP = 0.2  # share of the iterations without the regularizer
LEARNING_RATE = 1e-2
BATCH = 32
MOST_BYTES = 2**30  # of the inputs and outputs a block is fitted on
CONFIDENCE = 0.7  # how far a weight starts towards the code it already has


class _BlockDone(Exception):  # noqa: N818 - control flow, like StopIteration
    """The block has run: the rest of the network need not."""


@dataclass(frozen=True)
class BlockCalls:
    """Inputs and outputs of a block over ``N`` evaluations; what is no tensor is the same in all of them."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    output: Tensor

    def picked(self, rows: Tensor) -> tuple[list[Any], dict[str, Any]]:
        def pick(value: Any) -> Any:
            return value[rows] if isinstance(value, Tensor) else value

        return [pick(value) for value in self.args], {key: pick(value) for key, value in self.kwargs.items()}


class SoftLayer(nn.Module):
    """A quantized layer whose weights lie between two neighbouring codes, as ``h`` in 0..1 says."""

    def __init__(self, layer: QuantizedLayer, weight: Tensor) -> None:
        super().__init__()
        device = weight.device
        self.layer = layer
        tau = torch.from_numpy(layer.tau).to(device)
        self.tau = tau_columns(layer.spec, tau)
        qparams = QParams(*(_on(device, values) for values in (layer.weight_scale, layer.weight_zero_point)))
        self.columns = QParams(*(weight_columns(layer.spec, values) for values in qparams))
        steps = weight_matrix(layer.spec, scaled_weight(layer.spec, weight, tau)) / self.columns.scale
        codes = weight_matrix(layer.spec, _on(device, layer.codes)) - self.columns.zero_point
        above = codes > steps
        self.base = torch.where(above, codes - 1, codes)
        start = CONFIDENCE * above + (1 - CONFIDENCE) * (steps - self.base).clamp(0, 1)
        unstretched = (start - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)
        self.logit = nn.Parameter(torch.logit(unstretched.clamp(0.01, 0.99)))
        self.bias = None if layer.bias is None else _on(device, layer.bias)

    def up(self) -> Tensor:
        """``h``: 0 is the lower code, 1 the upper."""
        stretched = torch.sigmoid(self.logit) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW
        return stretched.clamp(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        # the input stays float, so tau is divided out of the weight instead of the activation
        weight = self.columns.scale * (self._codes(self.up()) - self.columns.zero_point) / self.tau
        return apply_op(self.layer.spec, x, weight.view(self.layer.spec.weight_shape), self.bias)

    def hardened(self) -> QuantizedLayer:
        """The layer with the codes decided on."""
        with torch.no_grad():
            codes = self._codes((self.up() >= 0.5).float()).view(self.layer.spec.weight_shape)
        return replace(self.layer, codes=codes.cpu().numpy().astype(np.uint8))

    def _codes(self, up: Tensor) -> Tensor:
        return (self.base + up + self.columns.zero_point).clamp(0, 2**self.layer.spec.bits.weight - 1)


def adaround(
    network: nn.Module,
    block: Block,
    layers: Sequence[QuantizedLayer],
    trajectories: Trajectories,
    *,
    iterations: int,
    evaluations: int,
    seed: int,
) -> list[QuantizedLayer]:
    """The layers of ``block`` with their codes refined.

    Args:
        network: the float network.
        layers: all quantized layers.
        evaluations: how many of the trajectories' evaluations the block is fitted on; fewer, if they would take more
            than :data:`MOST_BYTES`.
    """
    size = _calls_bytes(_block_calls(network, block.name, _first_samples(trajectories, 1)))
    subset = _first_samples(trajectories, min(evaluations, MOST_BYTES * len(trajectories.timesteps) // size))
    calls = _block_calls(network, block.name, subset)
    fitted = [layer for layer in layers if layer.spec.name in block.layers]
    return _fit_block(network, block, fitted, calls, iterations, stream_seed(seed, "round", block.name))


def _fit_block(
    network: nn.Module,
    block: Block,
    layers: Sequence[QuantizedLayer],
    calls: BlockCalls,
    iterations: int,
    seed: int,
) -> list[QuantizedLayer]:
    soft = {layer.spec.name: SoftLayer(layer, weight_of(network.get_submodule(layer.spec.name))) for layer in layers}
    logits = [layer.logit for layer in soft.values()]
    optimizer = torch.optim.Adam(logits, lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    originals = replace_modules(network, soft)
    try:
        module = network.get_submodule(block.name)
        for iteration in range(iterations):
            rows = torch.randint(len(calls.output), (BATCH,), generator=generator)
            args, kwargs = calls.picked(rows.to(calls.output.device))
            error = _whole_output(module(*args, **kwargs)) - calls.output[rows]
            loss = squared_error(error) + _regularizer(soft.values(), iteration / iterations)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    finally:
        replace_modules(network, originals)
    return [layer.hardened() for layer in soft.values()]


def squared_error(error: Tensor) -> Tensor:
    """Summed over channels, averaged over the rest: of a feature map ``[N, C, H, W]`` or of tokens ``[N, L, C]``."""
    return error.square().sum(1 if error.dim() == 4 else -1).mean()


def _regularizer(layers: Iterable[SoftLayer], progress: float) -> Tensor:
    """Pulls every ``h`` to 0 or 1, ever more sharply; ``progress`` runs from 0 to 1."""
    if progress < WARM_UP:
        return torch.zeros(())
    remaining = (1 - progress) / (1 - WARM_UP)
    beta = BETA_END + (BETA_START - BETA_END) * remaining
    penalties = [(1 - (2 * layer.up() - 1).abs().pow(beta)).sum() for layer in layers]
    return REGULARIZER * torch.stack(penalties).sum()


def _block_calls(network: nn.Module, name: str, trajectories: Trajectories) -> BlockCalls:
    """Every call of the module ``name`` over the trajectories; the network stops after it."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []

    def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append((args, kwargs, _whole_output(output)))
        raise _BlockDone

    device = next(network.parameters()).device
    conditioning = {key: value.to(device) for key, value in trajectories.conditioning.items()}
    handle = network.get_submodule(name).register_forward_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            for timestep, x in zip(trajectories.timesteps, trajectories.inputs, strict=True):
                try:
                    predict(network, x.to(device), timestep.to(device), conditioning)
                except _BlockDone:
                    continue
    finally:
        handle.remove()
    args = tuple(_joined([call[0][i] for call in calls]) for i in range(len(calls[0][0])))
    kwargs = {key: _joined([call[1][key] for call in calls]) for key in calls[0][1]}
    return BlockCalls(args, kwargs, torch.cat([call[2] for call in calls]))


def _calls_bytes(calls: BlockCalls) -> int:
    """Memory of all tensors."""
    values = (*calls.args, *calls.kwargs.values(), calls.output)
    return sum(value.nbytes for value in values if isinstance(value, Tensor))


def _joined(values: list[Any]) -> Any:
    # contiguous: PyTorch's backward of GroupNorm crashes on channels-last inputs without a gradient (2.13, CPU)
    return torch.cat(values).contiguous() if isinstance(values[0], Tensor) else values[0]


def _whole_output(output: Any) -> Tensor:
    """All that a block passes on; the streams of text and picture of a joint block end to end, ``[N, L + S, D]``."""
    if isinstance(output, Tensor):
        return output
    tensors = output.values() if isinstance(output, Mapping) else output
    return torch.cat([tensor for tensor in tensors if isinstance(tensor, Tensor)], dim=1)


def _first_samples(trajectories: Trajectories, evaluations: int) -> Trajectories:
    return trajectories.first(max(1, evaluations // len(trajectories.timesteps)))


def _on(device: torch.device, values: Any) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)
