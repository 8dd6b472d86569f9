"""One small random network of every family, widths multiples of 32, so that integer kernels exist for all layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

# their constructors are not typed
models: Any = diffusers

TEXT, POOLED, TOKENS = 64, 64, 8
UNET: dict[str, Any] = {
    "sample_size": 16,
    "in_channels": 4,
    "out_channels": 4,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "attention_head_dim": 32,
}
ATTENTION = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
LDM = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64, 64),
    "down_block_types": ("AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D"),
}
CROSS_ATTENTION = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": TEXT,
    "attention_head_dim": 2,
}
SDXL = {
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 32,
    "projection_class_embeddings_input_dim": POOLED + 6 * 32,
}
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 16,
    "patch_size": 2,
}
JOINT = {"joint_attention_dim": TEXT, "pooled_projection_dim": POOLED}
SD3 = {"out_channels": 4, "caption_projection_dim": 64, "pos_embed_max_size": 16, **JOINT}
FLUX = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "axes_dims_rope": (8, 12, 12),
    **JOINT,
}
POOLED_TEXT = {"encoder_hidden_states": (TOKENS, TEXT), "pooled_projections": (POOLED,)}


@dataclass(frozen=True)
class Family:
    """How to make a network of one family and what it is told.

    Attributes:
        network: makes it.
        told: shapes of one prompt's embeddings by argument.
        options: of ``dmq-export calibrate``.
    """

    network: Callable[[], Any]
    told: dict[str, tuple[int, ...]]
    options: tuple[str, ...] = ()


FAMILIES = {
    "ddpm": Family(lambda: models.UNet2DModel(**UNET | ATTENTION), {}),
    "class": Family(lambda: models.UNet2DModel(**UNET | ATTENTION, num_class_embeds=3), {}),
    "ldm": Family(lambda: models.UNet2DModel(**UNET | LDM), {}),
    "sd": Family(
        lambda: models.UNet2DConditionModel(**UNET | CROSS_ATTENTION), {"encoder_hidden_states": (TOKENS, TEXT)}
    ),
    "sdxl": Family(
        lambda: models.UNet2DConditionModel(**UNET | CROSS_ATTENTION | SDXL),
        {
            "encoder_hidden_states": (TOKENS, TEXT),
            "added_cond_kwargs.text_embeds": (POOLED,),
            "added_cond_kwargs.time_ids": (6,),
        },
    ),
    "dit": Family(lambda: models.DiTTransformer2DModel(**TRANSFORMER, num_embeds_ada_norm=3), {}),
    "pixart": Family(
        lambda: models.PixArtTransformer2DModel(**TRANSFORMER, cross_attention_dim=64, caption_channels=TEXT),
        {"encoder_hidden_states": (TOKENS, TEXT), "encoder_attention_mask": (TOKENS,)},
    ),
    "sd3": Family(lambda: models.SD3Transformer2DModel(**TRANSFORMER | SD3), POOLED_TEXT),
    "flux": Family(lambda: models.FluxTransformer2DModel(**FLUX), POOLED_TEXT, ("--sample-size", "16")),
}


def save_network(kind: str, folder: Path) -> list[str]:
    """Write a random network of the family ``kind`` and its scheduler; returns calibrate's arguments for it."""
    torch.manual_seed(0)
    family = FAMILIES[kind]
    network = family.network()
    network.save_pretrained(folder / ("unet" if "UNet" in type(network).__name__ else "transformer"))
    scheduler = models.FlowMatchEulerDiscreteScheduler() if kind in ("sd3", "flux") else models.DDIMScheduler()
    scheduler.save_pretrained(folder / "scheduler")
    if not family.told:
        return [str(folder), *family.options]
    np.savez(folder / "embeddings.npz", **_embeddings(family))
    return [str(folder), "--prompt-embeds", str(folder / "embeddings.npz"), *family.options]


def _embeddings(family: Family) -> Any:
    rng = np.random.default_rng(0)
    return {
        name: np.ones((2, *shape), np.int64) if "mask" in name else rng.standard_normal((2, *shape), np.float32)
        for name, shape in family.told.items()
    }
