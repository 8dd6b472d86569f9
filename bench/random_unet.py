"""Models of random weights for the measurements that need a size and no pictures."""

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

# their constructors are not typed
UNet2DModel: Any = diffusers.UNet2DModel
UNet2DConditionModel: Any = diffusers.UNet2DConditionModel
DDIMScheduler: Any = diffusers.DDIMScheduler

LATENT: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "attention_head_dim": 32,
    "down_block_types": ("DownBlock2D", *["AttnDownBlock2D"] * 3),
    "up_block_types": (*["AttnUpBlock2D"] * 3, "UpBlock2D"),
}
LDM_4 = LATENT | {"sample_size": 64, "block_out_channels": (224, 448, 672, 896), "layers_per_block": 2}
SMALL_LDM = LATENT | {"sample_size": 32, "block_out_channels": (64, 128, 192, 256), "layers_per_block": 1}
TEXT_TOKENS, TEXT_WIDTH = 77, 768
SD_1 = {
    "sample_size": 64,
    "cross_attention_dim": TEXT_WIDTH,
    "attention_head_dim": 8,
}  # the rest is the class's default


def save_unet(folder: Path, *, steps_offset: int = 0, **config: Any) -> int:
    """Write an unconditional pipeline, always the same weights; returns their bytes in float32."""
    return _save(folder, UNet2DModel, config, steps_offset)


def save_text_unet(folder: Path, **config: Any) -> int:
    """Write a UNet that is told text, with the scheduler of Stable Diffusion 1."""
    return _save(folder, UNet2DConditionModel, config, 1)


def save_prompts(path: Path, count: int) -> None:
    """Random embeddings of as many prompts, and of the empty one."""
    rng = np.random.default_rng(0)
    prompts, empty = (rng.standard_normal((n, TEXT_TOKENS, TEXT_WIDTH), np.float32) for n in (count, 1))
    arrays: Any = {"encoder_hidden_states": prompts, "uncond/encoder_hidden_states": empty}
    np.savez(path, **arrays)


def _save(folder: Path, model: Any, config: dict[str, Any], steps_offset: int) -> int:
    torch.manual_seed(0)
    network = model(**config)
    network.save_pretrained(folder / "unet")
    DDIMScheduler(steps_offset=steps_offset).save_pretrained(folder / "scheduler")
    return sum(4 * parameter.numel() for parameter in network.parameters())
