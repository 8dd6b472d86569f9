"""What each sample is told besides the noise: labels, the embeddings of prompts, both, or nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.denoiser.arguments import LABELS, TEXT_LENGTH, arguments
from dmq_export.denoiser.config import labels_for
from dmq_export.denoiser.embeddings import Embeddings, fitted
from dmq_export.errors import ModelError

Named = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Asked:
    """What the user wants drawn.

    Attributes:
        labels: class labels, cycled over the samples; empty for all that the model knows.
        null_label: the label that stands for no label.
        embeddings: of prompts, cycled over the samples.
        guidance_scale: classifier-free guidance, or what a distilled model is told; None for none.
    """

    labels: Sequence[int] = ()
    null_label: int | None = None
    embeddings: Embeddings | None = None
    guidance_scale: float | None = None


def told(class_name: str, config: Mapping[str, Any], asked: Asked, count: int) -> tuple[Named, Named]:
    """Conditioning of ``count`` samples, ``[count, ...]`` by name, and that of guidance's other branch.

    The second is empty without guidance, and for a model that is told the guidance scale.

    Raises:
        ModelError: it is not said what the model must be told, or something is said that it does not know.
    """
    text = [argument for argument in arguments(class_name, config) if argument.name != LABELS]
    given, without = labels_told(config, asked, count, alone=not text)
    if not text:
        if asked.embeddings is not None:
            raise ModelError(f"{class_name} is told no text: leave out the prompts and their embeddings")
        return given, without
    if asked.embeddings is None:
        takes = ", ".join(argument.text() for argument in text)
        raise ModelError(
            f"{class_name} is told what to draw by {takes}: give --prompts FILE for the pipeline's own text encoder, "
            "or --prompt-embeds FILE.npz"
        )
    texts, no_texts = fitted(asked.embeddings, text, asked.guidance_scale).cycled(range(count))
    return given | texts, (given | without | no_texts if no_texts else {})


def made_up(class_name: str, config: Mapping[str, Any], inputs: Mapping[str, Sequence[Any]], count: int) -> Named:
    """Numbers in place of what a model is told, ``[count, ...]`` by name: enough to time it, which needs no prompt.

    Args:
        inputs: shapes ``[N, ...]`` by name, as the network takes them; sizes that are no number vary.
    """
    rng = np.random.default_rng(0)
    given, _ = labels_told(config, Asked(), count)
    for argument in arguments(class_name, config):
        if argument.name in inputs and argument.name not in given:
            sizes = [size if isinstance(size, int) else TEXT_LENGTH for size in inputs[argument.name][1:]]
            numbers = rng.standard_normal((count, *sizes), np.float32)
            given[argument.name] = np.ones_like(numbers, np.int64) if argument.integer else numbers
    return given


def labels_told(config: Mapping[str, Any], asked: Asked, count: int, *, alone: bool = True) -> tuple[Named, Named]:
    """Labels alone, as :func:`told`; not ``alone`` but beside text, guidance needs no null label.

    Raises:
        ModelError: the labels do not suit the model, or guidance lacks the label that stands for none.
    """
    if alone and asked.guidance_scale is not None and asked.null_label is None:
        raise ModelError("guidance needs the label that stands for no label: give --null-label")
    labels = labels_for(config, asked.labels, asked.null_label, count)
    if labels is None:
        return {}, {}
    given = np.array(labels, np.int64)
    if asked.guidance_scale is None or asked.null_label is None:
        return {LABELS: given}, {}
    return {LABELS: given}, {LABELS: np.full_like(given, asked.null_label)}
