"""Tiny untrained diffusers models, saved as ordinary folders."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import (
    DDIMScheduler,
    DiTTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    ModelMixin,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNet2DModel,
)
from torch import nn

from dmq_export.bits import Bits
from dmq_export.denoiser.arguments import LABELS, Argument, arguments
from dmq_export.denoiser.embeddings import Embeddings
from dmq_export.recipe import Recipe

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


# one tiny network of every family; 16 is the width of the tiny text encoders' output (tests/support/pipelines.py)
TEXT_WIDTH = 16
UNET: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": TEXT_WIDTH,
    "mid_block_type": None,
}
SDXL: dict[str, Any] = {  # one resolution: what differs from SD is what it is told
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": TEXT_WIDTH + 6 * 4,
    "cross_attention_dim": 2 * TEXT_WIDTH,
}
TRANSFORMER: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 1,
    "sample_size": 8,
    "patch_size": 2,
}
PIXART = {"out_channels": 8, "cross_attention_dim": 16, "caption_channels": TEXT_WIDTH}
JOINT = {"joint_attention_dim": 2 * TEXT_WIDTH, "pooled_projection_dim": 2 * TEXT_WIDTH}
SD3 = {"num_layers": 2, "out_channels": 4, "caption_projection_dim": 16, "pos_embed_max_size": 8, **JOINT}
FLUX: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": TEXT_WIDTH,
    "pooled_projection_dim": TEXT_WIDTH,
    "guidance_embeds": True,
    "axes_dims_rope": (4, 6, 6),
}
NETWORKS: dict[str, Callable[[], ModelMixin]] = {
    "sd": lambda: UNet2DConditionModel(**UNET),
    "sdxl": lambda: UNet2DConditionModel(**UNET | SDXL),
    "dit": lambda: DiTTransformer2DModel(**TRANSFORMER, out_channels=8, num_embeds_ada_norm=5),
    "pixart": lambda: PixArtTransformer2DModel(**TRANSFORMER | PIXART),
    "sd3": lambda: SD3Transformer2DModel(**TRANSFORMER | SD3),
    "flux": lambda: FluxTransformer2DModel(**FLUX),
}
FLOWS = ("sd3", "flux")
SAMPLE_SIZE = {"flux": 8}
GUIDED = {"sd": 3.0, "flux": 3.5, "dit": 2.0}


def save_tiny_network(kind: str, folder: Path) -> Path:
    """A random network of :data:`NETWORKS` and a scheduler that suits it, as a diffusers pipeline has them."""
    torch.manual_seed(0)
    network = NETWORKS[kind]()
    network.save_pretrained(folder / ("unet" if isinstance(network, UNet2DConditionModel) else "transformer"))
    if kind in FLOWS:
        dynamic = {"use_dynamic_shifting": True, "base_image_seq_len": 4, "max_image_seq_len": 64}
        FlowMatchEulerDiscreteScheduler(**dynamic).save_pretrained(folder / "scheduler")
        return folder
    return _with_scheduler(folder)


def tiny_network_recipe(kind: str, network: nn.Module) -> Recipe:
    """Every stage of a calibration of a network of :data:`NETWORKS`, told what its kind is told."""
    told = [argument for argument in arguments(type(network).__name__, network.config) if argument.name != LABELS]
    return replace(
        TINY_RECIPE,
        steps=2,
        rounding="adaround",
        round_iterations=2,
        sample_size=SAMPLE_SIZE.get(kind),
        embeddings=random_embeddings(told, 2, uncond=kind == "sd") if told else None,
        guidance_scale=GUIDED.get(kind),
        null_label=5 if kind == "dit" else None,
    )


def save_tiny_transformer(folder: Path) -> Path:
    """A class-conditional DiT on 4-channel latents that predicts its variance too."""
    return save_tiny_network("dit", folder)


def save_tiny_conditional(folder: Path) -> Path:
    """A UNet with cross-attention, as Stable Diffusion's."""
    return save_tiny_network("sd", folder)


def random_embeddings(told: Sequence[Argument], count: int, *, length: int = 5, uncond: bool = False) -> Embeddings:
    """What a model could be told of ``count`` prompts."""
    rng = np.random.default_rng(0)

    def branch(rows: int) -> dict[str, np.ndarray]:
        arrays = {}
        for argument in told:
            shape = (rows, *(length if size is None else size for size in argument.shape))
            arrays[argument.name] = (
                np.ones(shape, np.int64) if argument.integer else rng.standard_normal(shape).astype(np.float32)
            )
        return arrays

    return Embeddings(branch(count), branch(1) if uncond else {})


def _with_scheduler(folder: Path) -> Path:
    DDIMScheduler(num_train_timesteps=100, steps_offset=1).save_pretrained(folder / "scheduler")
    return folder
