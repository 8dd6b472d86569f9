"""What a denoiser takes, read from its diffusers configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from dmq_export.errors import ModelError

FLUX = "FluxTransformer2DModel"
FLUX_PATCH = 2  # its pipeline packs 2x2 latents into one token


def sample_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """``(channels, height, width)`` of one sample; ``(tokens, channels)`` of Flux, whose latents come in packed.

    Raises:
        ModelError: the configuration does not say.
    """
    try:
        size, channels = config["sample_size"], int(config["in_channels"])
        height, width = (size, size) if isinstance(size, int) else size
        if config.get("_class_name") == FLUX:
            return int(height) // FLUX_PATCH * (int(width) // FLUX_PATCH), channels
        return channels, int(height), int(width)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError("the model's config.json states no sample_size and in_channels") from error


def image_tokens(config: Mapping[str, Any]) -> int:
    """How many tokens a transformer cuts one sample into.

    Raises:
        ModelError: the configuration does not say.
    """
    first, *rest = sample_shape(config)
    if config.get("_class_name") == FLUX:
        return first
    height, width = (size // int(config.get("patch_size") or 1) for size in rest)
    return height * width


def label_count(config: Mapping[str, Any]) -> int | None:
    """How many class labels the model knows, or None when it takes none."""
    if config.get("num_class_embeds") is not None:
        return int(config["num_class_embeds"])
    if _has_row_for_no_label(config):
        return int(config["num_embeds_ada_norm"])
    return None


def labels_for(
    config: Mapping[str, Any], labels: Sequence[int], null_label: int | None, count: int
) -> list[int] | None:
    """``labels`` cycled over ``count`` samples; without any, all that the model knows but ``null_label``.

    Returns:
        One label per sample, or None for a model that takes none.

    Raises:
        ModelError: a label the model does not know, labels for a model that takes none, or none is left.
    """
    known = label_count(config)
    asked = [*labels, *([] if null_label is None else [null_label])]
    if known is None:
        if asked:
            raise ModelError("the model takes no class labels: leave out --labels and --null-label")
        return None
    largest = known if _has_row_for_no_label(config) else known - 1
    for label in asked:
        if not 0 <= label <= largest:
            raise ModelError(f"label {label} is unknown to the model: 0 to {largest} are allowed")
    cycle = list(labels) or [label for label in range(known) if label != null_label]
    if not cycle:
        raise ModelError(f"the model knows no label but the null label {null_label}: leave out --null-label")
    return [cycle[i % len(cycle)] for i in range(count)]


def _has_row_for_no_label(config: Mapping[str, Any]) -> bool:
    """Whether this is a DiT: its label table has one row more, for no label, than its configuration says.

    PixArt's configuration has the same key, but its conditioning is text (``caption_channels``).
    """
    return config.get("num_embeds_ada_norm") is not None and config.get("caption_channels") is None
