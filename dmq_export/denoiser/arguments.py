"""What each family of denoisers is told besides the noisy sample and the timestep, read from its configuration.

Conditioning travels through the whole tool as a flat mapping ``name -> array [N, ...]``, ``N`` samples first. A
name is that of the argument of the model's ``forward``; a dot reaches into a dictionary, so that
``added_cond_kwargs.text_embeds`` is the entry ``text_embeds`` of the argument ``added_cond_kwargs``.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from dmq_export.denoiser.config import FLUX, label_count
from dmq_export.errors import ModelError

LABELS = "class_labels"
GUIDANCE = "guidance"  # distilled models take the guidance scale as an input instead of a second evaluation
SDXL_SIZES = 6
TEXT_LENGTH = 77  # of the example that a model is surveyed with; the conditioning itself decides
ENCODER_HIDDEN_STATES = "encoder_hidden_states"
REFUSED = {
    "addition_embed_type": (None, "text", "text_time"),
    "class_embed_type": (None,),
    "encoder_hid_dim_type": (None, "text_proj"),
}
Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Argument:
    """One thing a denoiser is told.

    Attributes:
        name: as in the flat mapping, see above.
        shape: of one sample's value; None for the text's length, which the text encoder decides.
        integer: whether it is a whole number, such as a label.
        optional: whether the model runs without it.
    """

    name: str
    shape: Shape
    integer: bool = False
    optional: bool = False

    def text(self) -> str:
        """``name [S, ...]`` for messages; ``S`` rows, ``L`` the text's length."""
        sizes = ("S", *("L" if size is None else str(size) for size in self.shape))
        return f"{self.name} [{', '.join(sizes)}]"


def arguments(class_name: str, config: Mapping[str, Any]) -> tuple[Argument, ...]:
    """What a model of ``class_name`` with ``config`` is told.

    Raises:
        ModelError: it is told something that this tool cannot give, such as an image.
    """
    return FAMILIES.get(class_name, _generic)(config)


def nested(conditioning: Mapping[str, Any]) -> dict[str, Any]:
    """The flat mapping as keyword arguments: names with a dot become entries of a dictionary."""
    named: dict[str, Any] = {}
    for name, value in conditioning.items():
        argument, dot, entry = name.partition(".")
        if dot:
            named.setdefault(argument, {})[entry] = value
        else:
            named[name] = value
    return named


def flat(named: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments as a flat mapping, the reverse of :func:`nested`; what is None is left out."""
    conditioning: dict[str, Any] = {}
    for name, value in named.items():
        entries = (
            {f"{name}.{entry}": item for entry, item in value.items()} if isinstance(value, dict) else {name: value}
        )
        conditioning |= {key: item for key, item in entries.items() if item is not None}
    return conditioning


def timestep_unit(class_name: str) -> float:
    """What the scheduler's timestep is divided by before the model sees it: Flux is told the share of noise."""
    return 1000.0 if class_name == FLUX else 1.0


def _generic(config: Mapping[str, Any]) -> tuple[Argument, ...]:
    text = config.get("cross_attention_dim")
    return (
        *_labels(config),
        *([] if text is None else [Argument(ENCODER_HIDDEN_STATES, (None, int(text)))]),
    )


def _labels(config: Mapping[str, Any]) -> tuple[Argument, ...]:
    return () if label_count(config) is None else (Argument(LABELS, (), integer=True),)


def _conditional_unet(config: Mapping[str, Any]) -> tuple[Argument, ...]:
    for key, allowed in REFUSED.items():
        if config.get(key) not in allowed:
            known = ", ".join(str(value) for value in allowed)
            raise ModelError(
                f"UNet2DConditionModel with {key} {config[key]!r} is told more than text and labels, which dmq-export "
                f"does not support: {known} are"
            )
    text = config.get("encoder_hid_dim") or config["cross_attention_dim"]
    width = text[0] if isinstance(text, (list, tuple)) else text
    told = [*_labels(config), Argument(ENCODER_HIDDEN_STATES, (None, int(width)))]
    if config.get("addition_embed_type") == "text_time":
        told += _text_time(config)
    if config.get("time_cond_proj_dim") is not None:
        told.append(Argument("timestep_cond", (int(config["time_cond_proj_dim"]),), optional=True))
    return tuple(told)


def _text_time(config: Mapping[str, Any]) -> list[Argument]:
    """SDXL's pooled text and six sizes (original height and width, crop top and left, target height and width)."""
    pooled = int(config["projection_class_embeddings_input_dim"]) - SDXL_SIZES * int(config["addition_time_embed_dim"])
    return [
        Argument("added_cond_kwargs.text_embeds", (pooled,)),
        Argument("added_cond_kwargs.time_ids", (SDXL_SIZES,)),
    ]


def _pixart(config: Mapping[str, Any]) -> tuple[Argument, ...]:
    told = [
        Argument(ENCODER_HIDDEN_STATES, (None, int(config["caption_channels"] or config["cross_attention_dim"]))),
        Argument("encoder_attention_mask", (None,), integer=True, optional=True),
    ]
    sized = config.get("use_additional_conditions")
    if sized or (sized is None and config["sample_size"] == 128):
        told += [
            Argument("added_cond_kwargs.resolution", (2,)),
            Argument("added_cond_kwargs.aspect_ratio", (1,)),
        ]
    return tuple(told)


def _joint(config: Mapping[str, Any]) -> tuple[Argument, ...]:
    told = [
        Argument(ENCODER_HIDDEN_STATES, (None, int(config["joint_attention_dim"]))),
        Argument("pooled_projections", (int(config["pooled_projection_dim"]),)),
    ]
    return (*told, Argument(GUIDANCE, ())) if config.get("guidance_embeds") else tuple(told)


FAMILIES: dict[str, Callable[[Mapping[str, Any]], tuple[Argument, ...]]] = {
    "UNet2DConditionModel": _conditional_unet,
    "PixArtTransformer2DModel": _pixart,
    "SD3Transformer2DModel": _joint,
    FLUX: _joint,
}
