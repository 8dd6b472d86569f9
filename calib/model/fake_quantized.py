"""The fake-quantized PyTorch model: what every later stage is compared with."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.model.hooks import hooked
from calib.model.network import build_network, predict, replace_modules
from calib.quant.fake_quant import QParams, dequantize, quantize
from calib.quant.patches import apply_op, dequantized_weight, expand_parts, scaled_weight
from dmq_export.checkpoint import Checkpoint
from dmq_export.graph.lowered_layer import LayerValues
from dmq_export.layer import LayerSpec, QuantizedLayer


class FakeQuantizedLayer(nn.Module):
    """One quantized layer, exactly as ``docs/arithmetic.md`` defines it, in float32.

    Attributes:
        row: of its per-step tables, for the evaluations to come.

    Args:
        layer: the fitted numbers.
        weights: False keeps the float ``weight``, to see what the activations alone cost.
        activations: False keeps the float input, to see what the weights alone cost.
        weight: ``W``, needed only without ``weights``.
        keep: False makes the dequantized weight anew for every evaluation; in between only its codes take memory.
    """

    shift_scale: Tensor
    tau: Tensor
    scale: Tensor
    zero_point: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        layer: QuantizedLayer,
        *,
        weights: bool = True,
        activations: bool = True,
        weight: Tensor | None = None,
        keep: bool = True,
    ) -> None:
        super().__init__()
        self.spec = layer.spec
        self.row = 0
        self.activations = activations
        tau = torch.from_numpy(layer.tau)
        self.register_buffer("tau", tau)
        self.register_buffer("shift_scale", torch.from_numpy(2.0 ** -layer.shift.astype(np.float32)))
        self.register_buffer("scale", expand_parts(layer.spec, torch.from_numpy(layer.scale.copy())))
        zero_point = torch.from_numpy(layer.zero_point.astype(np.float32))
        self.register_buffer("zero_point", expand_parts(layer.spec, zero_point))
        maker = _RoundedWeight(layer) if weights else _ScaledWeight(layer.spec, weight, tau)
        self.register_buffer("weight", maker() if keep else None)
        self.maker = None if keep else maker
        self.register_buffer("bias", None if layer.bias is None else torch.from_numpy(layer.bias))

    def codes(self, x: Tensor) -> Tensor:
        """``q_x`` of ``x [N, C, ...]`` or ``[..., C]``: integers in a float tensor."""
        step = self._qparams(x.dim())
        tau = self._along_channels(self.tau, x.dim())
        return quantize(x, QParams(tau * step.scale, step.zero_point), self.spec.bits.activation)

    def forward(self, x: Tensor) -> Tensor:
        if self.activations:
            rounded = dequantize(self.codes(x), self._qparams(x.dim()))
        else:
            rounded = x / self._along_channels(self.tau, x.dim())
        return apply_op(self.spec, rounded, self._weight_now(), self.bias)

    def _weight_now(self) -> Tensor:
        made = self.weight if self.maker is None else self.maker()
        assert isinstance(made, Tensor)
        return made

    def _qparams(self, rank: int) -> QParams:
        """``s_t * 2^-k`` and ``z_t`` of the current step, per channel."""
        row = self.row if len(self.scale) > 1 else 0
        scale = self._along_channels(self.scale[row] * self.shift_scale, rank)
        return QParams(scale, self._along_channels(self.zero_point[row], rank))

    def _along_channels(self, values: Tensor, rank: int) -> Tensor:
        shape = [1] * rank
        shape[self.spec.channel_axis] = -1
        return values.view(shape)


class _RoundedWeight(nn.Module):
    """Makes ``w^`` of its codes, where these are."""

    codes: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.spec = layer.spec
        self.register_buffer("codes", torch.from_numpy(layer.codes))
        self.register_buffer("scale", torch.from_numpy(layer.weight_scale))
        self.register_buffer("zero_point", torch.from_numpy(layer.weight_zero_point.astype(np.float32)))

    def forward(self) -> Tensor:
        return dequantized_weight(self.spec, self.codes.float(), QParams(self.scale, self.zero_point))


class _ScaledWeight(nn.Module):
    """Makes ``W * tau``, where these are."""

    weight: Tensor
    tau: Tensor

    def __init__(self, spec: LayerSpec, weight: Tensor | None, tau: Tensor) -> None:
        if weight is None:
            raise ValueError(f"layer {spec.name}: the float weight is needed")
        super().__init__()
        self.spec = spec
        self.register_buffer("weight", weight.detach())
        self.register_buffer("tau", tau)

    def forward(self) -> Tensor:
        return scaled_weight(self.spec, self.weight, self.tau)


class FakeQuantizedModel:
    """A network whose fake-quantized layers follow the timestep it is evaluated at.

    Args:
        network: with :class:`FakeQuantizedLayer` modules in place.
        timesteps: the calibrated timesteps ``[T]``.
    """

    def __init__(self, network: nn.Module, timesteps: Tensor) -> None:
        self.network = network
        self.timesteps = timesteps
        self.layers = [module for module in network.modules() if isinstance(module, FakeQuantizedLayer)]

    def __call__(self, sample: Tensor, timestep: Any, **conditioning: Tensor) -> Tensor:
        """One evaluation: ``sample [N, ...]`` at one ``timestep`` to the prediction ``[N, ...]``."""
        t = torch.as_tensor(timestep)
        row = self.row_of(float(t))
        for layer in self.layers:
            layer.row = row
        with torch.no_grad():
            return predict(self.network, sample, t.to(sample.device), conditioning)

    def row_of(self, timestep: float) -> int:
        """The row of the per-step tables for ``timestep``: that of the nearest calibrated one."""
        return int((self.timesteps - timestep).abs().argmin())


def load_fake_quantized(checkpoint: Checkpoint, device: torch.device) -> FakeQuantizedModel:
    """The fake-quantized model rebuilt from a checkpoint alone.

    Raises:
        CheckpointError: the checkpoint's tensors do not make up the network.
    """
    layers = {layer.spec.name: FakeQuantizedLayer(layer) for layer in checkpoint.layers}
    network = build_network(checkpoint, layers).to(device)
    return FakeQuantizedModel(network, torch.from_numpy(checkpoint.timesteps))


@contextmanager
def quantized(
    network: nn.Module,
    layers: Sequence[QuantizedLayer],
    timesteps: Tensor,
    *,
    weights: bool = True,
    activations: bool = True,
) -> Iterator[FakeQuantizedModel]:
    """While the block runs, the float ``network`` has fake-quantized layers in place of those in ``layers``."""
    device = next(network.parameters()).device
    modules: Mapping[str, nn.Module] = {
        layer.spec.name: FakeQuantizedLayer(
            layer,
            weights=weights,
            activations=activations,
            weight=network.get_submodule(layer.spec.name).get_parameter("weight"),
            keep=False,
        ).to(device)
        for layer in layers
    }
    originals = replace_modules(network, modules)
    try:
        yield FakeQuantizedModel(network, timesteps)
    finally:
        replace_modules(network, originals)


def record_layers(
    reference: FakeQuantizedModel, sample: Tensor, timestep: float, conditioning: Mapping[str, Tensor]
) -> tuple[dict[str, LayerValues], Tensor]:
    """One evaluation with what every quantized layer saw and said, and the prediction."""
    seen: dict[str, LayerValues] = {}

    def note(module: FakeQuantizedLayer, args: tuple[Tensor, ...], output: Tensor) -> None:
        codes = module.codes(args[0]).cpu().numpy().astype(np.uint8)
        seen[module.spec.name] = LayerValues(args[0].cpu().numpy(), codes, output.cpu().numpy())

    with hooked(layer.register_forward_hook(note) for layer in reference.layers):
        prediction = reference(sample, timestep, **conditioning)
    return seen, prediction


@contextmanager
def perturbed(reference: FakeQuantizedModel, relative: float, *, seed: int) -> Iterator[None]:
    """While the block runs, every quantized layer's input is changed by ``+-relative``, signs at random."""
    generator = torch.Generator().manual_seed(seed)

    def disturb(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        signs = torch.randint(0, 2, args[0].shape, generator=generator).to(args[0]) * 2 - 1
        return (args[0] * (1 + relative * signs), *args[1:])

    with hooked(layer.register_forward_pre_hook(disturb) for layer in reference.layers):
        yield
