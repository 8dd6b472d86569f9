"""What the samples are told: labels, embeddings, both."""

from typing import Any

import numpy as np
import pytest
from models import NETWORKS, UNET

from dmq_export.denoiser.arguments import TEXT_LENGTH, arguments
from dmq_export.denoiser.conditioning import Asked, made_up, told
from dmq_export.denoiser.embeddings import Embeddings
from dmq_export.errors import ModelError

TEXT = "encoder_hidden_states"
WORDS = Embeddings({TEXT: np.arange(2 * 16, dtype=np.float32).reshape(2, 1, 16)}, {TEXT: np.zeros((1, 1, 16))})
LABELLED = {**UNET, "num_class_embeds": 4}


def unet(asked: Asked, config: dict[str, Any] = UNET, count: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    return told("UNet2DConditionModel", config, asked, count)


def test_prompts_are_cycled_and_guidance_gets_the_empty_prompt() -> None:
    given, without = unet(Asked(embeddings=WORDS, guidance_scale=2.0))
    np.testing.assert_array_equal(given[TEXT], WORDS.given[TEXT][[0, 1, 0]])
    np.testing.assert_array_equal(without[TEXT], np.zeros((3, 1, 16)))
    assert unet(Asked(embeddings=WORDS))[1] == {}


def test_labels_beside_text_stay_in_the_other_branch() -> None:
    given, without = unet(Asked(labels=(2, 1), embeddings=WORDS, guidance_scale=2.0), LABELLED)
    assert given.keys() == without.keys() == {TEXT, "class_labels"}
    assert given["class_labels"].tolist() == without["class_labels"].tolist() == [2, 1, 2]
    _, without = unet(Asked(labels=(2,), null_label=3, embeddings=WORDS, guidance_scale=2.0), LABELLED)
    assert without["class_labels"].tolist() == [3, 3, 3]


def test_labels_alone_need_a_null_label_for_guidance() -> None:
    config = {"num_class_embeds": 3}
    given, without = told("UNet2DModel", config, Asked(null_label=2, guidance_scale=2.0), 3)
    assert (given["class_labels"].tolist(), without["class_labels"].tolist()) == ([0, 1, 0], [2, 2, 2])
    assert told("UNet2DModel", config, Asked(null_label=2), 3)[1] == {}
    with pytest.raises(ModelError, match="give --null-label"):
        told("UNet2DModel", config, Asked(guidance_scale=2.0), 3)


def test_text_for_a_model_without_is_refused_and_the_other_way_round() -> None:
    with pytest.raises(ModelError, match="UNet2DModel is told no text: leave out"):
        told("UNet2DModel", {}, Asked(embeddings=WORDS), 3)
    expected = r"UNet2DConditionModel is told what to draw by encoder_hidden_states \[S, L, 16\]: give --prompts FILE"
    with pytest.raises(ModelError, match=expected):
        unet(Asked())
    with pytest.raises(ModelError, match="takes no class labels"):
        unet(Asked(labels=(1,), embeddings=WORDS))


@pytest.mark.parametrize("kind", NETWORKS)
def test_made_up_numbers_have_the_shapes_and_types_of_what_is_told(kind: str) -> None:
    network = NETWORKS[kind]()
    class_name, config = type(network).__name__, dict(network.config)
    takes = arguments(class_name, config)
    sizes = {argument.name: tuple(9 if size is None else size for size in argument.shape) for argument in takes}
    given = made_up(class_name, config, {name: ("batch", *shape) for name, shape in sizes.items()}, 3)
    assert {name: value.shape for name, value in given.items()} == {name: (3, *shape) for name, shape in sizes.items()}
    for argument in takes:
        assert given[argument.name].dtype == (np.int64 if argument.integer else np.float32)
        assert argument.integer or given[argument.name].std() > 0


def test_made_up_text_of_any_length_has_the_usual_one() -> None:
    given = made_up("UNet2DConditionModel", LABELLED, {TEXT: ("batch", "length", 16)}, 2)
    assert given[TEXT].shape == (2, TEXT_LENGTH, 16)
    assert given["class_labels"].tolist() == [0, 1]
