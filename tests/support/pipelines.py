"""Tiny untrained diffusers pipelines of every kind, saved as ordinary folders; those with text need transformers."""

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LDMPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DModel,
    VQModel,
)
from models import NETWORKS, TEXT_WIDTH

TEXT_LENGTH = 12
WORDS = ["a", "red", "cat", "dog"]
UNCONDITIONAL = ("ddpm", "ddim", "ldm", "dit")
TEXTUAL = ("sd", "sdxl", "pixart", "sd3", "flux")


def save_tiny_pipeline(kind: str, folder: Path) -> Path:
    """A random pipeline of one of :data:`UNCONDITIONAL` or :data:`TEXTUAL`."""
    torch.manual_seed(0)
    pipeline: DiffusionPipeline = BUILDERS[kind]()
    pipeline.save_pretrained(folder)
    return folder


def _unet(channels: int) -> UNet2DModel:
    return UNet2DModel(
        sample_size=4,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        add_attention=False,
    )


def _ddim() -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=100, clip_sample=False, steps_offset=1)


def _flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)


def _vae(**changes: Any) -> AutoencoderKL:
    settings: dict[str, Any] = {
        "block_out_channels": (4, 4),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 2,
        "sample_size": 16,
    }
    return AutoencoderKL(**settings | changes)


def _clip(projected: bool = False) -> tuple[Any, Any]:
    """A tokenizer that knows single letters, and a text encoder."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    letters = sorted({letter for word in WORDS for letter in word})
    tokens = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=TEXT_LENGTH)
    config = CLIPTextConfig(
        vocab_size=len(tokens),
        hidden_size=TEXT_WIDTH,
        intermediate_size=TEXT_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=TEXT_WIDTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return tokenizer, (CLIPTextModelWithProjection if projected else CLIPTextModel)(config).eval()


def _t5(width: int = TEXT_WIDTH) -> tuple[Any, Any]:
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((f"▁{word}", -1.0) for word in WORDS)]
    tokenizer = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_LENGTH)
    config = T5Config(
        vocab_size=len(tokenizer), d_model=width, d_kv=4, d_ff=8, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return tokenizer, T5EncoderModel(config).eval()


def _sd() -> StableDiffusionPipeline:
    tokenizer, encoder = _clip()
    parts = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(
        vae=_vae(), text_encoder=encoder, tokenizer=tokenizer, unet=NETWORKS["sd"](), scheduler=_ddim(), **parts
    )


def _sdxl() -> StableDiffusionXLPipeline:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = _clip(), _clip(projected=True)
    return StableDiffusionXLPipeline(
        vae=_vae(),
        text_encoder=encoder,
        text_encoder_2=encoder_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        unet=NETWORKS["sdxl"](),
        scheduler=_ddim(),
        add_watermarker=False,
    )


def _pixart() -> PixArtAlphaPipeline:
    tokenizer, encoder = _t5()
    return PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=_vae(), transformer=NETWORKS["pixart"](), scheduler=_ddim()
    )


def _sd3() -> StableDiffusion3Pipeline:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = _clip(projected=True), _clip(projected=True)
    tokenizer_3, encoder_3 = _t5(2 * TEXT_WIDTH)
    return StableDiffusion3Pipeline(
        transformer=NETWORKS["sd3"](),
        scheduler=_flow(),
        vae=_vae(shift_factor=0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        text_encoder_3=encoder_3,
        tokenizer_3=tokenizer_3,
    )


def _flux() -> FluxPipeline:
    (tokenizer, encoder), (tokenizer_2, encoder_2) = _clip(), _t5()
    return FluxPipeline(
        scheduler=_flow(),
        vae=_vae(shift_factor=0.1),
        text_encoder=encoder,
        tokenizer=tokenizer,
        text_encoder_2=encoder_2,
        tokenizer_2=tokenizer_2,
        transformer=NETWORKS["flux"](),
    )


BUILDERS: dict[str, Any] = {
    "ddpm": lambda: DDPMPipeline(unet=_unet(1), scheduler=DDPMScheduler(num_train_timesteps=100)),
    "ddim": lambda: DDIMPipeline(unet=_unet(3), scheduler=_ddim()),
    "ldm": lambda: LDMPipeline(
        vqvae=VQModel(block_out_channels=(4,), latent_channels=3, norm_num_groups=2), unet=_unet(3), scheduler=_ddim()
    ),
    "dit": lambda: DiTPipeline(transformer=NETWORKS["dit"](), vae=_vae(), scheduler=_ddim()),
    "sd": _sd,
    "sdxl": _sdxl,
    "pixart": _pixart,
    "sd3": _sd3,
    "flux": _flux,
}
