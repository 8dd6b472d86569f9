"""The models that ship with the package."""

from pathlib import Path

import pytest

from dmq_export.common.bundled import model_folder
from dmq_export.common.files import read_json
from dmq_export.denoiser.config import label_count, sample_shape


def test_a_bundled_name_is_a_diffusers_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = model_folder("digits")
    config = read_json(folder / "unet" / "config.json")
    assert config["_class_name"] == "UNet2DModel"
    assert sample_shape(config) == (1, 16, 16)
    assert label_count(config) == 11  # ten digits and "any"
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    assert read_json(folder / "scheduler" / "scheduler_config.json")["_class_name"] == "DDIMScheduler"
    assert (folder / "classifier.onnx").is_file()


def test_a_folder_of_the_user_comes_before_a_bundled_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert model_folder("digits").resolve() == tmp_path / "digits"


@pytest.mark.parametrize("model", ["some/where", "/absolute/path", "no-such-model"])
def test_any_other_path_is_left_as_it_is(model: str) -> None:
    assert model_folder(model) == Path(model)
