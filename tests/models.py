"""Tiny untrained diffusers models, saved as ordinary folders."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel

from calib.recipe import Recipe
from dmq_export.bits import Bits

TINY_RECIPE = Recipe(bits=Bits(4, 8), samples=2, steps=3, les_iterations=2, les_batch=16, check_samples=2)


def tiny_unet() -> UNet2DModel:
    """Class-conditional, 8x8, with attention and concatenated skips; about 30 thousand parameters."""
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=8,
        num_class_embeds=3,
    )


def save_tiny_model(folder: Path) -> Path:
    """``folder/unet`` and ``folder/scheduler``, as a diffusers pipeline has them."""
    tiny_unet().save_pretrained(folder / "unet")
    DDIMScheduler(num_train_timesteps=100, steps_offset=1).save_pretrained(folder / "scheduler")
    return folder
