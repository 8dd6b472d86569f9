"""The method's published code on this project's models: a CUDA program made to run anywhere.

It knows one UNet, its own, so weights are mapped to it. Reading starts at :func:`calibrated_as_published`.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.model.load import SourceModel
from calib.record.trajectories import Trajectories
from dmq_export.recipe import Recipe

SAME_MAPPING = 1e-4  # of the prediction: the two networks add in another order

Denoise = Callable[..., Tensor]


class FittingClock:
    """Processor seconds the published code spends fitting, by stage, without caching layer inputs."""

    def __init__(self) -> None:
        self.fitting = {"les": 0.0, "round": 0.0}
        self._caching = 0.0

    def caching(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.process_time()
            result = function(*args, **options)
            self._caching += time.process_time() - start
            return result

        return timed

    def reconstruction(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start, self._caching = time.process_time(), 0.0
            result = function(*args, **options)
            stage = "les" if options["use_aq"] else "round"
            self.fitting[stage] += time.process_time() - start - self._caching
            return result

        return timed


def let_import(folder: Path) -> None:
    """Make the checkout in ``folder`` importable, and what it asks of CUDA do nothing."""
    sys.path[:0] = [str(folder), str(folder / "stable-diffusion")]
    torch.Tensor.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    nn.Module.cuda = lambda self, *_, **__: self  # type: ignore[method-assign]
    torch.cuda.max_memory_reserved = lambda *_: 0


class _Multiplier(float):
    """Widths that are no integer multiples of the first stay integers."""

    def __mul__(self, width: float) -> int:
        return round(float(self) * width)

    __rmul__ = __mul__


def published_unet(source: SourceModel) -> nn.Module:
    """The published code's UNet with our weights.

    Raises:
        SystemExit: it does not predict what ours does.
    """
    import ldm.modules.diffusionmodules.util as blocks

    config: Any = source.network.config
    blocks.normalization = lambda channels: blocks.GroupNorm32(config.norm_num_groups, channels)
    import ldm.modules.diffusionmodules.openaimodel as unet

    unet.normalization = blocks.normalization
    widths = config.block_out_channels
    network: nn.Module = unet.UNetModel(
        image_size=config.sample_size,
        in_channels=config.in_channels,
        model_channels=widths[0],
        out_channels=config.out_channels,
        num_res_blocks=config.layers_per_block,
        attention_resolutions=[2**i for i, block in enumerate(config.down_block_types) if "Attn" in block],
        channel_mult=tuple(_Multiplier(width / widths[0]) for width in widths),
        num_head_channels=config.attention_head_dim,
    ).eval()
    with torch.no_grad():
        _map_unet(network, source.network)
        x, t = torch.randn(2, *source.sample_shape), torch.tensor([501, 501])
        difference = (network(x, t) - source.network(x, t).sample).abs().max().item()
    print(f"mapped to the published UNet: largest difference {difference:.1e}", file=sys.stderr, flush=True)
    if difference > SAME_MAPPING:
        raise SystemExit("the mapping is wrong")
    return network


def _map_unet(to: Any, source: Any) -> None:
    _put(to.time_embed[0], source.time_embedding.linear_1)
    _put(to.time_embed[2], source.time_embedding.linear_2)
    _put(to.input_blocks[0][0], source.conv_in)
    blocks = iter(to.input_blocks[1:])
    for down in source.down_blocks:
        for index, resnet in enumerate(down.resnets):
            _map_stage(next(blocks), resnet, down, index)
        if down.downsamplers:
            _put(next(blocks)[0].op, down.downsamplers[0].conv)
    first, second = source.mid_block.resnets
    _map_resnet(to.middle_block[0], first)
    _map_attention(to.middle_block[1], source.mid_block.attentions[0])
    _map_resnet(to.middle_block[2], second)
    blocks = iter(to.output_blocks)
    for up in source.up_blocks:
        for index, resnet in enumerate(up.resnets):
            block = next(blocks)
            _map_stage(block, resnet, up, index)
        if up.upsamplers:
            _put(block[-1].conv, up.upsamplers[0].conv)
    _put(to.out[0], source.conv_norm_out)
    _put(to.out[2], source.conv_out)


def _map_stage(to: Any, resnet: Any, block: Any, index: int) -> None:
    _map_resnet(to[0], resnet)
    if getattr(block, "attentions", None):
        _map_attention(to[1], block.attentions[index])


def _map_resnet(to: Any, source: Any) -> None:
    _put(to.in_layers[0], source.norm1)
    _put(to.in_layers[2], source.conv1)
    _put(to.emb_layers[1], source.time_emb_proj)
    _put(to.out_layers[0], source.norm2)
    _put(to.out_layers[3], source.conv2)
    if source.conv_shortcut is not None:
        _put(to.skip_connection, source.conv_shortcut)


def _map_attention(to: Any, source: Any) -> None:
    """Queries, keys and values of one head lie together in the published code."""
    _put(to.norm, source.group_norm)
    heads = to.num_heads
    for name in ("weight", "bias"):
        split = [getattr(getattr(source, part), name).chunk(heads) for part in ("to_q", "to_k", "to_v")]
        joined = torch.cat([part[head] for head in range(heads) for part in split])
        getattr(to.qkv, name).copy_(joined[..., None] if name == "weight" else joined)
    to.proj_out.weight.copy_(source.to_out[0].weight[..., None])
    to.proj_out.bias.copy_(source.to_out[0].bias)


def _put(to: Any, source: Any) -> None:
    to.weight.copy_(source.weight)
    to.bias.copy_(source.bias)


def calibrated_as_published(
    network: nn.Module, calibration: Trajectories, recipe: Recipe, clock: FittingClock, scratch: Path
) -> Denoise:
    """Run the published calibration as its own scripts do; the calibrated network as a function."""
    import quant.calibration as stages
    import quant.reconstruction as fits
    from quant.quant_layer import QMODE
    from quant.quant_model import QuantModel
    from quant.quant_utils import Scaler
    from quant.reconstruction_util import RLOSS

    fits.save_inout = clock.caching(fits.save_inout)
    for name in ("layer_reconstruction", "block_reconstruction"):
        setattr(stages, name, clock.reconstruction(getattr(stages, name)))
    bits = recipe.bits
    weights: dict[str, Any] = {"bits": bits.weight, "channel_wise": True, "scaler": Scaler.MSE, "init": True}
    steps = len(calibration.timesteps)
    activations: dict[str, Any] = {"bits": bits.activation, "channel_wise": False, "use_aq": True, "dynamic": True}
    activations |= {"total_steps": steps, "symmetric": False, "ratio_threshold": 0.85}
    torch.manual_seed(123 + recipe.seed)
    np.random.seed(123 + recipe.seed)
    model = QuantModel(
        model=copy.deepcopy(network),
        wq_params=weights,
        aq_params=activations,
        aq_mode=[QMODE.NORMAL.value],
        use_scale=True,
        use_split=True,
    ).eval()
    inputs = calibration.inputs.flatten(0, 1)
    timesteps = calibration.timesteps.long().repeat_interleave(recipe.samples)
    model, found = stages.cali_model(
        qnn=model,
        use_aq=True,
        path=str(scratch),
        running_stat=True,
        interval=recipe.samples,
        lr=1e-3,
        lr_les=1e-3,
        cali_data=(inputs, timesteps),
        iters=recipe.round_iterations,
        iters_scale=recipe.les_iterations,
        batch_size=32,
        w=0.01,
        asym=True,
        warmup=0.2,
        opt_mode=RLOSS.MSE,
        multi_gpu=False,
        load_quant=None,
        amp_enabled=False,
        layerwise_recon=True,
        ptf_layers="skip_connection",
        r=20.0,
        momentum=0.95,
        task="ldm",
    )
    return _published_denoiser(model, found, calibration.timesteps)


def _published_denoiser(model: Any, found: dict[str, Any], timesteps: Tensor) -> Denoise:
    from quant.quantizer import ActivationQuantizer

    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.dynamic = module.init = module.running_stat = False
    model.set_quant_state(True, True)

    def denoise(x: Tensor, timestep: Any, **_: Tensor) -> Tensor:
        row = int((timesteps - float(timestep)).abs().argmin())
        for name, value in found[f"act_{row}"].items():
            _set(model, name, value)
        with torch.no_grad():
            prediction: Tensor = model(x, torch.full((len(x),), int(timestep)))
        return prediction

    return denoise


def _set(model: Any, name: str, value: Any) -> None:
    """Activation parameters are plain attributes or parameters, whichever they were saved as."""
    *path, last = name.split(".")
    module = model
    for part in path:
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    module._parameters.pop(last, None)
    module.__dict__[last] = value
