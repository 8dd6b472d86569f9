"""What each family is told, compared with what its networks take."""

import inspect
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import PixArtTransformer2DModel, UNet2DConditionModel, UNet2DModel
from hypothesis import given
from hypothesis import strategies as st
from models import NETWORKS, PIXART, SDXL, TRANSFORMER, UNET

from dmq_export.denoiser.arguments import Argument, arguments, flat, nested, timestep_unit
from dmq_export.errors import ModelError

TOLD = {
    "sd": {"encoder_hidden_states": (None, 16)},
    "sdxl": {
        "encoder_hidden_states": (None, 32),
        "added_cond_kwargs.text_embeds": (16,),
        "added_cond_kwargs.time_ids": (6,),
    },
    "dit": {"class_labels": ()},
    "pixart": {"encoder_hidden_states": (None, 16), "encoder_attention_mask": (None,)},
    "sd3": {"encoder_hidden_states": (None, 32), "pooled_projections": (32,)},
    "flux": {"encoder_hidden_states": (None, 16), "pooled_projections": (16,), "guidance": ()},
}
NAMES = st.text("abc_", min_size=1, max_size=3)


def told(network: torch.nn.Module) -> tuple[Argument, ...]:
    return arguments(type(network).__name__, dict(network.config))


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_family_is_told_what_its_forward_takes(kind: str) -> None:
    network = NETWORKS[kind]()
    assert {argument.name: argument.shape for argument in told(network)} == TOLD[kind]
    taken = inspect.signature(network.forward).parameters
    assert {argument.name.partition(".")[0] for argument in told(network)} <= taken.keys()
    integers = {argument.name for argument in told(network) if argument.integer}
    assert integers == TOLD[kind].keys() & {"class_labels", "encoder_attention_mask"}
    assert [argument.name for argument in told(network) if argument.optional] == [
        name for name in TOLD[kind] if name == "encoder_attention_mask"
    ]


def test_an_unconditional_model_is_told_nothing() -> None:
    assert arguments("UNet2DModel", dict(UNet2DModel(sample_size=8).config)) == ()


def test_a_text_and_label_model_is_told_both() -> None:
    network = UNet2DConditionModel(**UNET | {"num_class_embeds": 3, "encoder_hid_dim": 5})
    assert [argument.text() for argument in told(network)] == ["class_labels [S]", "encoder_hidden_states [S, L, 5]"]


def test_a_consistency_model_may_be_told_the_guidance() -> None:
    *_, last = told(UNet2DConditionModel(**UNET | {"time_cond_proj_dim": 7}))
    assert last == Argument("timestep_cond", (7,), optional=True)


@pytest.mark.parametrize(("size", "sized"), [(128, True), (64, False)])
def test_only_the_large_pixart_is_told_the_size_of_the_picture(size: int, sized: bool) -> None:
    # diffusers decides by the sample size where the configuration does not say
    config = PixArtTransformer2DModel(**TRANSFORMER | PIXART | {"sample_size": 8}).config
    names = [argument.name for argument in arguments("PixArtTransformer2DModel", {**config, "sample_size": size})]
    assert ("added_cond_kwargs.resolution" in names, "added_cond_kwargs.aspect_ratio" in names) == (sized, sized)
    assert PixArtTransformer2DModel(**TRANSFORMER | PIXART | {"sample_size": 128}).use_additional_conditions


@pytest.mark.parametrize(
    ("key", "value"),
    [("addition_embed_type", "image"), ("class_embed_type", "projection"), ("encoder_hid_dim_type", "image_proj")],
)
def test_a_model_that_is_told_pictures_is_refused_in_words(key: str, value: str) -> None:
    with pytest.raises(ModelError, match=f"^UNet2DConditionModel with {key} '{value}' is told more than text"):
        arguments("UNet2DConditionModel", {**UNET, key: value})


@given(st.dictionaries(NAMES, st.integers() | st.dictionaries(NAMES, st.integers(), min_size=1, max_size=3)))
def test_nested_undoes_flat(named: dict[str, Any]) -> None:
    assert nested(flat(named)) == named


def test_what_is_none_is_not_told() -> None:
    assert flat({"a": None, "b": {"c": None, "d": 1}, "e": 2}) == {"b.d": 1, "e": 2}


def test_flux_is_told_the_share_of_noise() -> None:
    assert (timestep_unit("FluxTransformer2DModel"), timestep_unit("SD3Transformer2DModel")) == (1000, 1)


def test_sdxl_is_told_what_its_configuration_leaves_for_the_text() -> None:
    config = {**UNET, **SDXL, "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
    shapes = {argument.name: argument.shape for argument in arguments("UNet2DConditionModel", config)}
    assert shapes["added_cond_kwargs.text_embeds"] == (1280,)  # that of stable-diffusion-xl-base-1.0
    assert np.prod(shapes["added_cond_kwargs.time_ids"]) == 6
