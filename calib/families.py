"""What the tool must be told about a model family; everything else it finds out by running the model once."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dmq_export.signature import label_count

TIME_AND_LABEL_LAYERS = (
    "time_embedding.*",
    "time_embed*",
    "*.time_emb_proj",
    "class_embedding*",
    "add_embedding.*",
    "*time_text_embed*",
    "*timestep_embedder*",
    "*class_embedder*",
    "*.norm1.linear",
    "*adaln_single*",
)


@dataclass(frozen=True)
class Family:
    """A diffusers model class that needs more than "its Conv and Linear modules".

    Attributes:
        classes: diffusers class names.
        block_classes: modules whose weights are rounded together (BRECQ blocks); layers outside any block
            are rounded on their own.
        float_layers: name patterns of layers that stay float, beside the first and the last.
    """

    classes: tuple[str, ...]
    block_classes: tuple[str, ...]
    float_layers: tuple[str, ...] = TIME_AND_LABEL_LAYERS


GENERIC = Family(
    classes=(),
    block_classes=(
        "ResnetBlock2D",
        "Attention",
        "BasicTransformerBlock",
        "JointTransformerBlock",
        "FluxTransformerBlock",
        "FluxSingleTransformerBlock",
    ),
)
FAMILIES = (
    Family(classes=("UNet2DModel",), block_classes=("ResnetBlock2D", "Attention")),
    Family(
        classes=("UNet2DConditionModel",),
        block_classes=("ResnetBlock2D", "BasicTransformerBlock", "Transformer2DModel"),
    ),
)


def family_of(class_name: str) -> Family:
    """The entry of ``class_name``, or the generic one."""
    return next((family for family in FAMILIES if class_name in family.classes), GENERIC)


def example_conditioning(config: Mapping[str, Any], batch: int) -> dict[str, Tensor]:
    """Conditioning of the right shapes and types, to run the model once."""
    example: dict[str, Tensor] = {}
    if label_count(config) is not None:
        example["class_labels"] = torch.zeros(batch, dtype=torch.int64)
    if config.get("cross_attention_dim") is not None:
        example["encoder_hidden_states"] = torch.zeros(batch, 77, int(config["cross_attention_dim"]))
    return example
