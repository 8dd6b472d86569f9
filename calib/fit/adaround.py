"""AdaRound by block reconstruction: each weight is rounded up or down so that the block's output stays.

Nagel et al. 2020 with the blocks of BRECQ (Li et al. 2021). The fit starts from rounding by second moments
(:mod:`calib.fit.gptq`). A block is fitted on the float model's inputs, against its outputs, and its activations stay
float; so no block waits for another, and none learns to make up for errors that another's fit takes away.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.device import FLOAT_BYTES
from calib.model.layers import Block
from calib.model.network import replace_modules
from calib.quant.fake_quant import QParams
from calib.quant.patches import apply_op, scaled_weight, tau_columns, weight_columns, weight_matrix, weight_of
from calib.record.block_inputs import BlockInputs, whole_output
from dmq_export.common.seeds import stream_seed
from dmq_export.layer import QuantizedLayer

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # of the rectified sigmoid
REGULARIZER = 0.01
BETA_START, BETA_END = 20.0, 2.0
WARM_UP_SHARE = 0.2  # share of the iterations without the regularizer
LEARNING_RATE = 1e-2
BATCH = 32  # evaluations per iteration, as in the published code; 8 cost some tenths of a decibel
REPORT = 20  # iterations between two signs of progress
CONFIDENCE = 0.7  # how far a weight starts towards the code it already has


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
    recorded: BlockInputs,
    *,
    iterations: int,
    seed: int,
    advance: Callable[[int], None] = lambda _: None,
) -> list[QuantizedLayer]:
    """The layers of ``block`` with their codes refined.

    Args:
        network: the float network.
        layers: all quantized layers.
        recorded: inputs and outputs of the block in the float network.
        advance: called with the number of iterations done, for progress.
    """
    fitted = [layer for layer in layers if layer.spec.name in block.layers]
    soft = {layer.spec.name: SoftLayer(layer, weight_of(network.get_submodule(layer.spec.name))) for layer in fitted}
    originals = replace_modules(network, soft)
    try:
        module = network.get_submodule(block.name)
        _fit(module, soft.values(), recorded, iterations, stream_seed(seed, "round", block.name), advance)
    finally:
        replace_modules(network, originals)
    return [layer.hardened() for layer in soft.values()]


def _fit(
    block: nn.Module,
    soft: Collection[SoftLayer],
    recorded: BlockInputs,
    iterations: int,
    seed: int,
    advance: Callable[[int], None],
) -> None:
    """Move the ``soft`` layers of ``block`` to where its outputs are those of the ``recorded``."""
    optimizer = torch.optim.Adam([layer.logit for layer in soft], lr=LEARNING_RATE)
    generator = torch.Generator().manual_seed(seed)
    for iteration in range(iterations):
        rows = torch.randint(len(recorded.output), (BATCH,), generator=generator).to(recorded.output.device)
        args, kwargs = recorded.picked(rows)
        error = whole_output(block(*args, **kwargs)) - recorded.output[rows]
        loss = squared_error(error) + _regularizer(soft, iteration / iterations)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        if (iteration + 1) % REPORT == 0 or iteration + 1 == iterations:
            advance(iteration % REPORT + 1)


def squared_error(error: Tensor) -> Tensor:
    """Summed over channels, averaged over the rest: of a feature map ``[N, C, H, W]`` or of tokens ``[N, L, C]``."""
    return error.square().sum(1 if error.dim() == 4 else -1).mean()


def _regularizer(layers: Iterable[SoftLayer], progress: float) -> Tensor:
    """Pulls every ``h`` to 0 or 1, ever more sharply; ``progress`` runs from 0 to 1."""
    if progress < WARM_UP_SHARE:
        return torch.zeros(())
    remaining = (1 - progress) / (1 - WARM_UP_SHARE)
    beta = BETA_END + (BETA_START - BETA_END) * remaining
    penalties = [(1 - (2 * layer.up() - 1).abs().pow(beta)).sum() for layer in layers]
    return REGULARIZER * torch.stack(penalties).sum()


def _on(device: torch.device, values: Any) -> Tensor:
    return torch.from_numpy(values.astype(np.float32)).to(device)


def adaround_evaluations(iterations: int) -> float:
    """How many samples the network could evaluate while all its blocks are fitted.

    Every iteration runs one block forth and back, some evaluations at a time; all blocks make up the network.
    """
    return BATCH * iterations * 3


def adaround_bytes(outputs: int, weights: int) -> int:
    """Memory of fitting a block: its modules' outputs, kept for the gradients, and copies of its weights.

    Args:
        outputs: bytes that the block's modules put out in one evaluation.
        weights: how many it has, in quantized layers.
    """
    return 2 * BATCH * outputs + 12 * FLOAT_BYTES * weights
