"""What the calibration samples are told."""

import torch

from calib.model.load import SourceModel
from calib.trajectories import Conditioning
from dmq_export.conditioning import Asked, told
from dmq_export.recipe import Recipe


def conditioning_for(source: SourceModel, recipe: Recipe, count: int) -> Conditioning:
    """The recipe's labels or embeddings cycled over ``count`` samples; without labels, all that the model knows.

    Raises:
        ModelError: the recipe does not say what the model must be told, or says what it does not know.
    """
    asked = Asked(recipe.labels, recipe.null_label, recipe.embeddings, recipe.guidance_scale)
    branches = told(source.class_name, source.config, asked, count)
    given, without = ({name: torch.from_numpy(value) for name, value in branch.items()} for branch in branches)
    return Conditioning(given, without)
