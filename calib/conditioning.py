"""What the network is told beside the noisy sample while it is calibrated."""

import torch

from calib.model import SourceModel
from calib.recipe import Recipe
from calib.trajectories import Conditioning
from dmq_export.errors import ModelError
from dmq_export.signature import labels_for


def conditioning_for(source: SourceModel, recipe: Recipe, count: int) -> Conditioning:
    """The recipe's labels cycled over ``count`` samples; without any, all labels the model knows.

    Raises:
        ModelError: a label the model does not know, or guidance without a null label.
    """
    if recipe.guidance_scale is not None and recipe.null_label is None:
        raise ModelError("guidance needs the label that stands for no label: give --null-label")
    if source.config.get("cross_attention_dim") is not None:
        raise ModelError(
            f"{source.class_name} is told what to draw by text embeddings, which calibrate cannot give yet"
        )
    labels = labels_for(source.config, recipe.labels, recipe.null_label, count)
    if labels is None:
        return Conditioning({}, {})
    given = torch.tensor(labels)
    without = {} if recipe.null_label is None else {"class_labels": torch.full_like(given, recipe.null_label)}
    return Conditioning({"class_labels": given}, without)
