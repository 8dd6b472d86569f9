"""Tiny untrained diffusers models, saved as ordinary folders."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

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
    return _with_scheduler(folder)


def save_small_model(folder: Path, **changes: Any) -> Path:
    """Unconditional unless ``changes`` say otherwise, 4x4, nine quantized layers."""
    torch.manual_seed(0)
    settings = {
        "sample_size": 4,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "block_out_channels": (4,),
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "norm_num_groups": 2,
        "add_attention": False,
    }
    UNet2DModel(**(settings | changes)).save_pretrained(folder / "unet")
    DDIMScheduler(num_train_timesteps=100).save_pretrained(folder / "scheduler")
    return folder


def save_tiny_transformer(folder: Path) -> Path:
    """A class-conditional DiT on 4-channel latents that predicts its variance too."""
    torch.manual_seed(0)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=1,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=5,
    )
    transformer.save_pretrained(folder / "transformer")
    return _with_scheduler(folder)


def save_tiny_conditional(folder: Path) -> Path:
    """A UNet with cross-attention, as Stable Diffusion's."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=12,
    )
    unet.save_pretrained(folder / "unet")
    return _with_scheduler(folder)


def _with_scheduler(folder: Path) -> Path:
    DDIMScheduler(num_train_timesteps=100, steps_offset=1).save_pretrained(folder / "scheduler")
    return folder
