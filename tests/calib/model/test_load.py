"""Loading a diffusers folder: what is read, and one clear line for everything that cannot be."""

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import save_tiny_network, tiny_unet
from safetensors.torch import load_file, save_file

from calib.model.load import load_model
from calib.model.network import predict
from dmq_export.errors import ModelError

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def pipeline(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model's folder, to be damaged."""
    return Path(shutil.copytree(tiny_model, tmp_path / "pipeline"))


def change_config(denoiser: Path, **changes: object) -> None:
    config = json.loads((denoiser / "config.json").read_text()) | changes
    (denoiser / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def one_line(folder: Path) -> str:
    """The message with which the folder is refused."""
    with pytest.raises(ModelError) as caught:
        load_model(folder, CPU)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_the_network_is_the_saved_one_ready_for_evaluation(tiny_model: Path) -> None:
    source = load_model(tiny_model, CPU)
    expected = tiny_unet().state_dict()
    assert source.network.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in source.network.state_dict().items())
    assert not any(module.training for module in source.network.modules())
    assert not any(parameter.requires_grad for parameter in source.network.parameters())


def test_the_facts_of_the_folder_are_kept(tiny_model: Path) -> None:
    source = load_model(tiny_model, CPU)
    assert source.class_name == "UNet2DModel"
    assert source.sample_shape == (1, 8, 8)
    assert source.config["num_class_embeds"] == 3
    assert source.scheduler["_class_name"] == "DDIMScheduler"
    assert source.scheduler["num_train_timesteps"] == 100
    assert json.loads(json.dumps(dict(source.config))) == source.config


def test_the_configuration_does_not_remember_where_the_model_lay(pipeline: Path) -> None:
    change_config(pipeline / "unet", _name_or_path="/home/someone/model")
    assert "someone" not in json.dumps(dict(load_model(pipeline, CPU).config))


@pytest.mark.parametrize("name", ["unet", "transformer"])
def test_a_denoisers_own_folder_loads_like_its_pipeline(pipeline: Path, name: str) -> None:
    denoiser = (pipeline / "unet").rename(pipeline / name)
    whole, alone = load_model(pipeline, CPU), load_model(denoiser, CPU)
    assert whole.weights_sha256 == alone.weights_sha256
    assert whole.scheduler == alone.scheduler != {}
    assert whole.config == alone.config


def test_a_denoiser_without_a_scheduler_beside_it_has_none(pipeline: Path, tmp_path: Path) -> None:
    alone = Path(shutil.copytree(pipeline / "unet", tmp_path / "elsewhere" / "unet"))
    assert load_model(alone, CPU).scheduler == {}


def test_sharded_weights_load(tmp_path: Path) -> None:
    tiny_unet().save_pretrained(tmp_path / "unet", max_shard_size="40KB")
    assert len(list((tmp_path / "unet").glob("*.safetensors"))) > 1
    network, expected = load_model(tmp_path, CPU).network, tiny_unet().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_load_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    half = tiny_unet().to(dtype)
    half.save_pretrained(tmp_path / "unet")
    loaded = load_model(tmp_path, CPU).network.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32}
    assert all(torch.equal(loaded[name], value.float()) for name, value in half.state_dict().items())


def test_the_hash_follows_the_weights_and_nothing_else(pipeline: Path) -> None:
    before = load_model(pipeline, CPU).weights_sha256
    (pipeline / "unet" / "README.md").write_text("other files do not matter")
    assert load_model(pipeline, CPU).weights_sha256 == before
    tensors = load_file(pipeline / "unet" / WEIGHTS)
    tensors["conv_in.bias"][0] += 1
    save_file(tensors, pipeline / "unet" / WEIGHTS)
    assert load_model(pipeline, CPU).weights_sha256 != before


def test_predict_is_the_network_without_its_wrapping() -> None:
    network = tiny_unet().eval()
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        prediction = predict(network, x, torch.tensor(7), {"class_labels": labels})
        assert torch.equal(prediction, network(x, 7, class_labels=labels).sample)


def test_a_missing_folder_is_named_with_a_way_to_get_one(tmp_path: Path) -> None:
    message = one_line(tmp_path / "absent")
    assert message.startswith(f"{tmp_path / 'absent'} is not a folder")
    assert "hf download" in message


def test_a_file_is_no_model_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is not a folder" in one_line(tmp_path / "model.safetensors")


def test_a_folder_of_something_else_says_what_was_looked_for(tmp_path: Path) -> None:
    assert "no config.json, unet/config.json or transformer/config.json" in one_line(tmp_path)


@pytest.mark.parametrize("name", ["DDIMScheduler", "logging", "BertModel", "__version__", 3])
def test_a_class_that_is_no_model_is_named(pipeline: Path, name: object) -> None:
    change_config(pipeline / "unet", _class_name=name)
    assert re.search(rf"unet/config.json names '{name}', which is no model of diffusers \d", one_line(pipeline))


def test_a_config_without_a_class_is_refused(pipeline: Path) -> None:
    change_config(pipeline / "unet", _class_name=None)
    assert "unet/config.json names no diffusers class (_class_name is missing)" in one_line(pipeline)


@pytest.mark.parametrize(("text", "why"), [("{", "not valid JSON"), ("[1]", "a JSON list, an object was expected")])
def test_a_damaged_config_is_named(pipeline: Path, text: str, why: str) -> None:
    (pipeline / "unet" / "config.json").write_text(text)
    message = one_line(pipeline)
    assert "unet/config.json" in message
    assert why in message


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_tensor(path: Path) -> None:
    tensors = load_file(path)
    del tensors["conv_in.weight"]
    save_file(tensors, path)


def reshape_tensor(path: Path) -> None:
    save_file(load_file(path) | {"conv_in.weight": torch.zeros(8, 2, 3, 3)}, path)


@pytest.mark.parametrize(
    "damage", [truncate, lambda path: path.write_bytes(b"no tensors"), reshape_tensor, drop_tensor]
)
def test_weights_that_do_not_load_are_refused(pipeline: Path, damage: Callable[[Path], object]) -> None:
    damage(pipeline / "unet" / WEIGHTS)
    assert one_line(pipeline).startswith(f"the model in {pipeline / 'unet'} does not load: ")


def test_a_folder_without_weights_says_so(pipeline: Path) -> None:
    (pipeline / "unet" / WEIGHTS).unlink()
    assert one_line(pipeline) == (
        f"{pipeline / 'unet'} holds no weights (*.safetensors or *.bin): download all of its files"
    )


@pytest.mark.parametrize("number", [torch.nan, -torch.inf])
def test_weights_that_are_no_numbers_are_refused_by_name(pipeline: Path, number: float) -> None:
    path = pipeline / "unet" / WEIGHTS
    tensors = load_file(path)
    tensors["mid_block.resnets.0.conv1.weight"].view(-1)[3] = number
    save_file(tensors, path)
    assert "hold NaN or infinity, in mid_block.resnets.0.conv1.weight: train it again" in one_line(pipeline)


def test_tensors_that_the_model_has_no_use_for_are_told(
    pipeline: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    path, notices = pipeline / "unet" / WEIGHTS, []
    save_file(load_file(path) | {"a": torch.zeros(2), "b": torch.zeros(2)}, path)
    load_model(pipeline, CPU, notice=notices.append)
    folder = pipeline / "unet"
    assert notices == [f"{folder} has weights that the UNet2DModel of its config.json has no place for: a and 1 more"]
    assert capfd.readouterr() == ("", "")  # diffusers' own words are of no help
    assert caplog.text == ""


@pytest.mark.parametrize("damage", [drop_tensor, reshape_tensor])
def test_the_tensor_that_does_not_fit_is_named(pipeline: Path, damage: Callable[[Path], object]) -> None:
    damage(pipeline / "unet" / WEIGHTS)
    assert "conv_in.weight" in one_line(pipeline)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickled_weights_file_runs_no_code(pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "unet" / WEIGHTS).unlink()
    torch.save({"conv_in.weight": Bomb(tmp_path / "ran")}, pipeline / "unet" / "diffusion_pytorch_model.bin")
    assert pickle.loads(pickle.dumps(Bomb(tmp_path / "armed"))) is None
    assert (tmp_path / "armed").exists()
    assert "does not load" in one_line(pipeline)
    assert not (tmp_path / "ran").exists()


def test_flux_is_given_the_size_that_its_configuration_leaves_open(tmp_path: Path) -> None:
    folder = save_tiny_network("flux", tmp_path)
    assert load_model(folder, CPU, sample_size=8).sample_shape == (16, 16)
    assert load_model(folder, CPU).config["sample_size"] == 128  # that of its pipeline
    with pytest.raises(ModelError, match=r"^sample size 7: Flux packs 2x2 latents"):
        load_model(folder, CPU, sample_size=7)


def test_a_model_that_states_its_sample_size_is_given_none(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match=r"^UNet2DModel's config.json states its sample size, 8: leave out"):
        load_model(tiny_model, CPU, sample_size=8)
