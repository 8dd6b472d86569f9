"""What a denoiser takes, from its configuration."""

import pytest
from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from models import tiny_unet

from dmq_export.denoiser.config import image_tokens, label_count, labels_for, sample_shape
from dmq_export.errors import ModelError

TINY_TRANSFORMER = {
    "num_attention_heads": 1,
    "attention_head_dim": 4,
    "in_channels": 2,
    "num_layers": 1,
    "norm_num_groups": 1,
    "sample_size": 4,
    "num_embeds_ada_norm": 5,
}


@pytest.mark.parametrize(("size", "expected"), [(8, (3, 8, 8)), ([8, 16], (3, 8, 16)), ((4, 2), (3, 4, 2))])
def test_a_sample_is_channels_height_width(size: object, expected: tuple[int, int, int]) -> None:
    assert sample_shape({"in_channels": 3, "sample_size": size}) == expected


def test_a_diffusers_configuration_states_the_shape() -> None:
    assert sample_shape(tiny_unet().config) == (1, 8, 8)


def test_flux_takes_squares_of_latents_as_tokens() -> None:
    config = {"_class_name": "FluxTransformer2DModel", "in_channels": 64, "sample_size": 128}
    assert sample_shape(config) == (4096, 64)  # FLUX.1 at 1024 x 1024
    assert image_tokens(config) == 4096


def test_a_transformer_cuts_its_sample_into_patches() -> None:
    config = {"_class_name": "SD3Transformer2DModel", "in_channels": 16, "sample_size": (128, 64), "patch_size": 2}
    assert image_tokens(config) == 64 * 32


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"in_channels": 3},
        {"sample_size": 8},
        {"in_channels": None, "sample_size": 8},
        {"in_channels": 3, "sample_size": None},
        {"in_channels": 3, "sample_size": [8]},
        {"in_channels": 3, "sample_size": [8, 8, 8]},
    ],
)
def test_a_configuration_without_a_shape_is_refused(config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="states no sample_size and in_channels"):
        sample_shape(config)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        ({}, None),
        ({"num_class_embeds": None}, None),
        ({"num_class_embeds": 11}, 11),
        ({"num_class_embeds": None, "num_embeds_ada_norm": 7}, 7),
    ],
)
def test_the_configuration_counts_the_labels(config: dict[str, object], count: int | None) -> None:
    assert label_count(config) == count


def test_a_transformer_conditioned_on_text_alone_takes_no_labels() -> None:
    # PixArt's configuration has num_embeds_ada_norm as well, but its forward has no class_labels
    network = PixArtTransformer2DModel(**TINY_TRANSFORMER, cross_attention_dim=4, caption_channels=4, out_channels=2)
    assert label_count(network.config) is None


def test_a_transformer_knows_the_label_that_stands_for_none() -> None:
    config = DiTTransformer2DModel(**TINY_TRANSFORMER).config  # its table of 5 classes has a sixth row for no class
    assert labels_for(config, (), 5, 7) == [0, 1, 2, 3, 4, 0, 1]
    with pytest.raises(ModelError, match="label 6 is unknown"):
        labels_for(config, (), 6, 7)


def test_labels_are_cycled_in_the_order_given() -> None:
    assert labels_for({"num_class_embeds": 4}, (3, 0, 1), None, 7) == [3, 0, 1, 3, 0, 1, 3]


@settings(deadline=None, max_examples=50)
@given(st.integers(2, 9), st.data())
def test_without_labels_all_but_the_null_label_take_turns(known: int, data: st.DataObject) -> None:
    null_label = data.draw(st.none() | st.integers(0, known - 1))
    usable = known - (null_label is not None)
    given_labels = labels_for({"num_class_embeds": known}, (), null_label, 2 * usable)
    assert given_labels is not None
    assert given_labels[:usable] == given_labels[usable:]
    assert sorted([*given_labels[:usable], *([] if null_label is None else [null_label])]) == list(range(known))


def test_a_null_label_that_is_asked_for_is_used() -> None:
    assert labels_for({"num_class_embeds": 3}, (2, 0), 2, 3) == [2, 0, 2]


def test_a_model_without_labels_gets_none() -> None:
    assert labels_for({}, (), None, 5) is None


@pytest.mark.parametrize(("labels", "null_label"), [((0,), None), ((), 0)])
def test_labels_for_a_model_that_takes_none_are_refused(labels: tuple[int, ...], null_label: int | None) -> None:
    with pytest.raises(ModelError, match="takes no class labels: leave out --labels and --null-label"):
        labels_for({}, labels, null_label, 5)


@pytest.mark.parametrize(
    ("labels", "null_label", "named"), [((0, 3), None, 3), ((-1,), None, -1), ((), 3, 3), ((), -1, -1)]
)
def test_a_label_the_model_does_not_know_is_refused(
    labels: tuple[int, ...], null_label: int | None, named: int
) -> None:
    with pytest.raises(ModelError, match=f"^label {named} is unknown to the model: 0 to 2 are allowed$"):
        labels_for({"num_class_embeds": 3}, labels, null_label, 5)


def test_a_null_label_that_leaves_no_other_is_refused() -> None:
    with pytest.raises(ModelError, match="label"):
        labels_for({"num_class_embeds": 1}, (), 0, 3)
