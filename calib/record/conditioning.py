"""What the network is given besides noisy samples: labels and embeddings of prompts, as the recipe names them."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from calib.model.load import SourceModel
from dmq_export.denoiser.conditioning import Request, conditioning_of
from dmq_export.recipe import Recipe


@dataclass(frozen=True)
class Conditioning:
    """Arguments of the network besides the noisy sample and the timestep, each ``[S, ...]`` by name.

    Attributes:
        conditional: of the samples.
        unconditional: of guidance's other branch; empty without guidance, and for a model that takes the guidance
            scale as an argument.
    """

    conditional: Mapping[str, Tensor]
    unconditional: Mapping[str, Tensor]

    @property
    def branches(self) -> int:
        """Evaluations of the network per sample and step."""
        return 2 if self.unconditional else 1


def recipe_conditioning(source: SourceModel, recipe: Recipe, count: int) -> Conditioning:
    """The recipe's labels or embeddings cycled over ``count`` samples; without labels, all that the model knows.

    Raises:
        ModelError: the recipe lacks what the model takes, or holds what it does not know.
    """
    request = Request(recipe.labels, recipe.null_label, recipe.embeddings, recipe.guidance_scale)
    branches = conditioning_of(source.class_name, source.config, request, count)
    tensors = ({name: torch.from_numpy(value) for name, value in branch.items()} for branch in branches)
    return Conditioning(*tensors)
