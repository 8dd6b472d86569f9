"""Taking a network apart into float tensors and quantized layers, and putting it together without its source."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel, UNet2DConditionModel
from models import FLUX, UNET
from torch import nn

from calib.model.load import SourceModel, load_model
from calib.model.network import build_network, float_tensors, predict, replace_modules
from dmq_export.checkpoint import Checkpoint, SourceInfo
from dmq_export.errors import CheckpointError


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> SourceModel:
    return load_model(tiny_model, torch.device("cpu"))


def float_modules(source: SourceModel, checkpoint: Checkpoint) -> dict[str, nn.Module]:
    return {layer.spec.name: source.network.get_submodule(layer.spec.name) for layer in checkpoint.layers}


def test_replacing_modules_gives_back_what_was_there() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 3), nn.ReLU()))
    inner, outer = network[1][0], network[0]
    originals = replace_modules(network, {"1.0": nn.Identity(), "0": nn.Tanh()})
    assert isinstance(network[1][0], nn.Identity)
    assert isinstance(network[0], nn.Tanh)
    assert originals == {"1.0": inner, "0": outer}
    replace_modules(network, originals)
    assert (network[1][0], network[0]) == (inner, outer)


class Odd(nn.Module):
    """Everything that is easily forgotten in a state dict."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.ab = nn.Linear(2, 2), nn.Linear(2, 2)
        self.tied = nn.Embedding(2, 2)
        self.tied.weight = self.ab.weight
        self.loose = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.register_buffer("kept", torch.tensor(3))
        self.register_buffer("left_out", torch.tensor([4.0]), persistent=False)
        self.brief = nn.Parameter(torch.tensor([1.0, 2**-7]).bfloat16())


def test_float_tensors_are_all_parameters_and_buffers_outside_the_quantized_layers() -> None:
    network = Odd()
    tensors = float_tensors(network, {"a"})
    assert tensors.keys() == {"ab.weight", "ab.bias", "tied.weight", "loose", "kept", "left_out", "brief"}
    assert tensors["kept"].dtype == np.int64
    assert tensors["kept"].shape == ()
    assert tensors["left_out"].tolist() == [4.0]
    assert np.array_equal(tensors["tied.weight"], network.ab.weight.detach().numpy())


def test_bfloat16_is_widened_without_loss() -> None:
    brief = float_tensors(Odd(), set())["brief"]
    assert brief.dtype == np.float32
    assert brief.tolist() == [1.0, 2**-7]


def test_a_network_rebuilt_with_its_float_layers_is_the_float_network(
    tiny: SourceModel, tiny_checkpoint: Checkpoint
) -> None:
    network = build_network(tiny_checkpoint, float_modules(tiny, tiny_checkpoint))
    probe = tiny_checkpoint.probe
    conditioning = {name: torch.from_numpy(value) for name, value in probe.conditioning.items()}
    with torch.no_grad():
        answer = predict(network, torch.from_numpy(probe.sample[0]), torch.tensor(probe.timesteps[0]), conditioning)
    assert np.array_equal(answer.numpy(), probe.prediction[0])
    assert not any(module.training for module in network.modules())
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in network.parameters())


@pytest.mark.parametrize("name", ["conv_in.bias", "mid_block.attentions.0.group_norm.weight"])
def test_a_missing_tensor_is_named(tiny: SourceModel, tiny_checkpoint: Checkpoint, name: str) -> None:
    kept = {key: value for key, value in tiny_checkpoint.float_tensors.items() if key != name}
    with pytest.raises(CheckpointError, match=f"lacks the tensor {name} of UNet2DModel"):
        build_network(replace(tiny_checkpoint, float_tensors=kept), float_modules(tiny, tiny_checkpoint))


def test_a_missing_quantized_layer_is_named(tiny: SourceModel, tiny_checkpoint: Checkpoint) -> None:
    modules = float_modules(tiny, tiny_checkpoint)
    del modules["mid_block.resnets.0.conv1"]
    with pytest.raises(CheckpointError, match=r"lacks the tensor mid_block\.resnets\.0\.conv1\.weight of UNet2DModel"):
        build_network(tiny_checkpoint, modules)


@pytest.mark.parametrize("name", ["surplus", "conv_in.surplus", "nowhere.weight"])
def test_a_surplus_tensor_is_named(tiny: SourceModel, tiny_checkpoint: Checkpoint, name: str) -> None:
    more = tiny_checkpoint.float_tensors | {name: np.zeros(1, np.float32)}
    with pytest.raises(CheckpointError, match=f"has a tensor {name} that the network does not"):
        build_network(replace(tiny_checkpoint, float_tensors=more), float_modules(tiny, tiny_checkpoint))


def test_an_unknown_class_is_named(tiny_checkpoint: Checkpoint) -> None:
    unknown = SourceInfo("UNet9DModel", tiny_checkpoint.model.config, {}, "")
    with pytest.raises(CheckpointError, match=r"diffusers .* has no 'UNet9DModel'"):
        build_network(replace(tiny_checkpoint, model=unknown), {})


def test_flux_is_called_as_its_pipeline_calls_it(monkeypatch: pytest.MonkeyPatch) -> None:
    network = FluxTransformer2DModel(**FLUX)
    told: dict[str, torch.Tensor] = {}

    def note(hidden_states: torch.Tensor, **named: torch.Tensor) -> tuple[torch.Tensor]:
        told.update(named)
        return (hidden_states,)

    monkeypatch.setattr(network, "forward", note)
    sample, text = torch.randn(2, 9, 16), torch.randn(2, 3, 16)
    conditioning = {"encoder_hidden_states": text, "guidance": torch.ones(2)}
    assert predict(network, sample, torch.tensor(500.0), conditioning) is sample
    assert told["timestep"].tolist() == [0.5, 0.5]
    # 0, row and column of each token, as FluxPipeline._prepare_latent_image_ids has them
    assert told["img_ids"].tolist() == [[0, row, column] for row in range(3) for column in range(3)]
    assert told["txt_ids"].tolist() == [[0, 0, 0]] * 3
    assert told["guidance"] is conditioning["guidance"]


def test_names_with_a_dot_reach_into_dictionaries(monkeypatch: pytest.MonkeyPatch) -> None:
    network = UNet2DConditionModel(**UNET)
    told: dict[str, Any] = {}

    def note(sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool, **named: Any) -> tuple[torch.Tensor]:
        told.update(named, timestep=timestep)
        return (sample,)

    monkeypatch.setattr(network, "forward", note)
    sizes = torch.ones(2, 6)
    predict(network, torch.zeros(2, 4, 8, 8), torch.tensor(7.0), {"added_cond_kwargs.time_ids": sizes})
    assert told["added_cond_kwargs"] == {"time_ids": sizes}
    assert told["timestep"].tolist() == [7, 7]
