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
class Request:
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


def conditioning_of(class_name: str, config: Mapping[str, Any], request: Request, count: int) -> tuple[Named, Named]:
    """Conditioning of ``count`` samples, ``[count, ...]`` by name, and that of guidance's other branch.

    The second is empty without guidance, and for a model that is told the guidance scale.

    Raises:
        ModelError: it is not said what the model must be told, or something is said that it does not know.
    """
    text = [argument for argument in arguments(class_name, config) if argument.name != LABELS]
    conditional, unconditional = _labels(config, request, count, alone=not text)
    if not text:
        if request.embeddings is not None:
            raise ModelError(f"{class_name} is told no text: leave out the prompts and their embeddings")
        return conditional, unconditional
    if request.embeddings is None:
        takes = ", ".join(argument.text() for argument in text)
        raise ModelError(
            f"{class_name} is told what to draw by {takes}: give --prompts FILE for the pipeline's own text encoder, "
            "or --prompt-embeds FILE.npz"
        )
    texts, no_texts = fitted(request.embeddings, text, request.guidance_scale).cycled(range(count))
    return conditional | texts, (conditional | unconditional | no_texts if no_texts else {})


def dummy_conditioning(
    class_name: str, config: Mapping[str, Any], inputs: Mapping[str, Sequence[Any]], count: int
) -> Named:
    """Numbers in place of what a model is told, ``[count, ...]`` by name: enough to time it, which needs no prompt.

    Args:
        inputs: shapes ``[N, ...]`` by name, as the network takes them; sizes that are no number vary.
    """
    rng = np.random.default_rng(0)
    conditional, _ = _labels(config, Request(), count)
    for argument in arguments(class_name, config):
        if argument.name in inputs and argument.name not in conditional:
            sizes = [size if isinstance(size, int) else TEXT_LENGTH for size in inputs[argument.name][1:]]
            numbers = rng.standard_normal((count, *sizes), np.float32)
            conditional[argument.name] = np.ones_like(numbers, np.int64) if argument.integer else numbers
    return conditional


def _labels(config: Mapping[str, Any], request: Request, count: int, *, alone: bool = True) -> tuple[Named, Named]:
    """Labels alone, as :func:`conditioning_of`; not ``alone`` but beside text, guidance needs no null label.

    Raises:
        ModelError: the labels do not suit the model, or guidance lacks the label that stands for none.
    """
    if alone and request.guidance_scale is not None and request.null_label is None:
        raise ModelError("guidance needs the label that stands for no label: give --null-label")
    labels = labels_for(config, request.labels, request.null_label, count)
    if labels is None:
        return {}, {}
    conditional = np.array(labels, np.int64)
    if request.guidance_scale is None or request.null_label is None:
        return {LABELS: conditional}, {}
    return {LABELS: conditional}, {LABELS: np.full_like(conditional, request.null_label)}
