"""What a denoiser takes, read from its diffusers configuration."""

from collections.abc import Mapping, Sequence
from typing import Any

from dmq_export.errors import ModelError


def sample_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """``(channels, height, width)`` of one sample.

    Raises:
        ModelError: the configuration does not say.
    """
    try:
        size, channels = config["sample_size"], int(config["in_channels"])
        height, width = (size, size) if isinstance(size, int) else size
        return channels, int(height), int(width)
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError("the model's config.json states no sample_size and in_channels") from error


def label_count(config: Mapping[str, Any]) -> int | None:
    """How many class labels the model knows, or None when it takes none."""
    for key in ("num_class_embeds", "num_embeds_ada_norm"):
        if config.get(key) is not None:
            return int(config[key])
    return None


def labels_for(
    config: Mapping[str, Any], labels: Sequence[int], null_label: int | None, count: int
) -> list[int] | None:
    """``labels`` cycled over ``count`` samples; without any, all that the model knows but ``null_label``.

    Returns:
        One label per sample, or None for a model that takes none.

    Raises:
        ModelError: a label the model does not know, or labels for a model that takes none.
    """
    known = label_count(config)
    asked = [*labels, *([] if null_label is None else [null_label])]
    if known is None:
        if asked:
            raise ModelError("the model takes no class labels: leave out --labels and --null-label")
        return None
    for label in asked:
        if not 0 <= label < known:
            raise ModelError(f"label {label} is unknown to the model: 0 to {known - 1} are allowed")
    cycle = list(labels) or [label for label in range(known) if label != null_label]
    return [cycle[i % len(cycle)] for i in range(count)]
