"""What the samples are told: labels, embeddings, both."""

from typing import Any

import numpy as np
import pytest
from models import NETWORKS, UNET

from dmq_export.denoiser.arguments import TEXT_LENGTH, arguments
from dmq_export.denoiser.conditioning import Request, conditioning_of, dummy_conditioning
from dmq_export.denoiser.embeddings import Embeddings
from dmq_export.errors import ModelError

TEXT = "encoder_hidden_states"
WORDS = Embeddings({TEXT: np.arange(2 * 16, dtype=np.float32).reshape(2, 1, 16)}, {TEXT: np.zeros((1, 1, 16))})
LABELLED = {**UNET, "num_class_embeds": 4}


def unet(request: Request, config: dict[str, Any] = UNET, count: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
    return conditioning_of("UNet2DConditionModel", config, request, count)


def test_prompts_are_cycled_and_guidance_gets_the_empty_prompt() -> None:
    conditional, unconditional = unet(Request(embeddings=WORDS, guidance_scale=2.0))
    np.testing.assert_array_equal(conditional[TEXT], WORDS.given[TEXT][[0, 1, 0]])
    np.testing.assert_array_equal(unconditional[TEXT], np.zeros((3, 1, 16)))
    assert unet(Request(embeddings=WORDS))[1] == {}


def test_labels_beside_text_stay_in_the_other_branch() -> None:
    conditional, unconditional = unet(Request(labels=(2, 1), embeddings=WORDS, guidance_scale=2.0), LABELLED)
    assert conditional.keys() == unconditional.keys() == {TEXT, "class_labels"}
    assert conditional["class_labels"].tolist() == unconditional["class_labels"].tolist() == [2, 1, 2]
    _, unconditional = unet(Request(labels=(2,), null_label=3, embeddings=WORDS, guidance_scale=2.0), LABELLED)
    assert unconditional["class_labels"].tolist() == [3, 3, 3]


def test_labels_alone_need_a_null_label_for_guidance() -> None:
    config = {"num_class_embeds": 3}
    conditional, unconditional = conditioning_of("UNet2DModel", config, Request(null_label=2, guidance_scale=2.0), 3)
    assert (conditional["class_labels"].tolist(), unconditional["class_labels"].tolist()) == ([0, 1, 0], [2, 2, 2])
    assert conditioning_of("UNet2DModel", config, Request(null_label=2), 3)[1] == {}
    with pytest.raises(ModelError, match="give --null-label"):
        conditioning_of("UNet2DModel", config, Request(guidance_scale=2.0), 3)


def test_text_for_a_model_without_is_refused_and_the_other_way_round() -> None:
    with pytest.raises(ModelError, match="UNet2DModel is told no text: leave out"):
        conditioning_of("UNet2DModel", {}, Request(embeddings=WORDS), 3)
    expected = r"UNet2DConditionModel is told what to draw by encoder_hidden_states \[S, L, 16\]: give --prompts FILE"
    with pytest.raises(ModelError, match=expected):
        unet(Request())
    with pytest.raises(ModelError, match="takes no class labels"):
        unet(Request(labels=(1,), embeddings=WORDS))


@pytest.mark.parametrize("kind", NETWORKS)
def test_made_up_numbers_have_the_shapes_and_types_of_what_is_told(kind: str) -> None:
    network = NETWORKS[kind]()
    class_name, config = type(network).__name__, dict(network.config)
    takes = arguments(class_name, config)
    sizes = {argument.name: tuple(9 if size is None else size for size in argument.shape) for argument in takes}
    conditional = dummy_conditioning(class_name, config, {name: ("batch", *shape) for name, shape in sizes.items()}, 3)
    assert {name: value.shape for name, value in conditional.items()} == {
        name: (3, *shape) for name, shape in sizes.items()
    }
    for argument in takes:
        assert conditional[argument.name].dtype == (np.int64 if argument.integer else np.float32)
        assert argument.integer or conditional[argument.name].std() > 0


def test_made_up_text_of_any_length_has_the_usual_one() -> None:
    conditional = dummy_conditioning("UNet2DConditionModel", LABELLED, {TEXT: ("batch", "length", 16)}, 2)
    assert conditional[TEXT].shape == (2, TEXT_LENGTH, 16)
    assert conditional["class_labels"].tolist() == [0, 1]
