"""What must be stated of a model family; everything else is found out by running the model once."""

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from dmq_export.denoiser.arguments import TEXT_LENGTH, arguments

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
    "*.norm1_context.linear",
    "*.norm.linear",
    "norm_out.linear",
    "*adaln_single*",
    "proj_out_1",
)
TEXT_LAYERS = ("encoder_hid_proj*", "caption_projection.*", "context_embedder")


@dataclass(frozen=True)
class ModelFamily:
    """A diffusers model class that needs more than "its Conv and Linear modules".

    Attributes:
        classes: diffusers class names.
        block_classes: modules whose weights are rounded together (BRECQ blocks); layers outside any block
            are rounded on their own.
        time_layers, text_layers: name patterns of layers that stay float, beside the first and the last: those that
            embed the time or the label, their projections in the blocks, and the text's way in.
    """

    classes: tuple[str, ...]
    block_classes: tuple[str, ...]
    time_layers: tuple[str, ...] = TIME_AND_LABEL_LAYERS
    text_layers: tuple[str, ...] = TEXT_LAYERS

    def float_reason(self, name: str) -> str | None:
        """Why the layer ``name`` stays float, or None."""
        if any(fnmatchcase(name, pattern) for pattern in self.time_layers):
            return "time or label embedding"
        return "text embedding" if any(fnmatchcase(name, pattern) for pattern in self.text_layers) else None


GENERIC = ModelFamily(
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
    ModelFamily(classes=("UNet2DModel",), block_classes=("ResnetBlock2D", "Attention")),
    ModelFamily(
        classes=("UNet2DConditionModel",),
        block_classes=("ResnetBlock2D", "BasicTransformerBlock", "Transformer2DModel"),
    ),
)


def family_of(class_name: str) -> ModelFamily:
    """The entry of ``class_name``, or the generic one."""
    return next((family for family in FAMILIES if class_name in family.classes), GENERIC)


def example_conditioning(class_name: str, config: Mapping[str, Any], batch: int) -> dict[str, Tensor]:
    """Conditioning of the right shapes and types, to run the model once.

    Raises:
        ModelError: the model takes an argument that this tool cannot fill.
    """
    example: dict[str, Tensor] = {}
    for argument in arguments(class_name, config):
        shape = (batch, *(TEXT_LENGTH if size is None else size for size in argument.shape))
        example[argument.name] = torch.zeros(shape, dtype=torch.int64 if argument.integer else torch.float32)
    return example
