"""Ordinary diffusers pipelines around our engines: the same pictures as from our own sampler."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.unets.unet_2d import UNet2DOutput
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from models import TINY_RECIPE, UNET, save_tiny_network
from pipelines import TEXTUAL, UNCONDITIONAL, save_tiny_pipeline

from calib.calibrate import calibrate
from calib.model.schedulers import build_scheduler
from calib.pipeline.engine_denoiser import EngineDenoiser, build_pipeline
from calib.pipeline.text_encoder import encode_prompts
from calib.pipeline.vae import decode, decoder_folder
from calib.run.plan import Resources
from dmq_export.commands.engine import Engine, open_engine
from dmq_export.commands.export import export_onnx
from dmq_export.commands.pipeline import load_pipeline
from dmq_export.commands.sampler import torch_library
from dmq_export.common.progress import Progress
from dmq_export.denoiser.conditioning import Request, conditioning_of
from dmq_export.denoiser.config import sample_shape
from dmq_export.errors import DmqError, ModelError
from dmq_export.sampling.loop import Guidance, sample

ROOT = Path(__file__).resolve().parents[3]
CPU = torch.device("cpu")
STEPS = 2
SCALE = 3.0
PROMPTS = ["a red cat", "dog"]
needs_transformers = pytest.mark.skipif(find_spec("transformers") is None, reason="needs transformers")
KINDS = [*UNCONDITIONAL, *(pytest.param(kind, marks=needs_transformers) for kind in TEXTUAL)]
EXPORTED = ["ddpm", "ldm", "dit", *(pytest.param(kind, marks=needs_transformers) for kind in ("sd", "sdxl"))]
SAMPLE_SIZE = {"flux": 8}


@dataclass(frozen=True)
class Made:
    """A tiny pipeline's folder, the checkpoint made of it, and what both are asked for."""

    kind: str
    folder: Path
    checkpoint: Path
    asked: Request


@pytest.fixture(scope="module", params=KINDS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    kind = str(request.param)
    folder = save_tiny_pipeline(kind, tmp_path_factory.mktemp(kind) / "pipeline")
    size = SAMPLE_SIZE.get(kind)
    asked = Request()
    if kind in TEXTUAL:
        embeddings = encode_prompts(folder, PROMPTS, guidance_scale=SCALE, device=CPU, sample_size=size)
        asked = Request(embeddings=embeddings, guidance_scale=SCALE)
    recipe = replace(
        TINY_RECIPE,
        samples=1,
        check_samples=1,
        steps=STEPS,
        les_iterations=0,
        rounding="nearest",
        clip=False,
        sample_size=size,
        embeddings=asked.embeddings,
        guidance_scale=asked.guidance_scale,
    )
    calibrate(folder, folder.parent / "checkpoint", recipe, Resources(CPU), Progress(show=False))
    return Made(kind, folder, folder.parent / "checkpoint", asked)


def loaded(made: Made, engine: Path | None = None) -> Any:
    """The pipeline around an exported graph, or around the checkpoint."""
    pipeline = load_pipeline(made.folder, engine or made.checkpoint)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(made: Made, pipeline: Any, noise: torch.Tensor) -> np.ndarray:
    """Pictures ``[2, H, W, C]`` in 0..1 by the pipeline, as its user calls it."""
    options: dict[str, Any] = {"num_inference_steps": STEPS, "output_type": "np"}
    if made.kind in TEXTUAL:
        options |= {"prompt": PROMPTS, "guidance_scale": SCALE, "latents": noise}
    else:  # these draw their own noise
        options |= {"generator": torch.Generator().manual_seed(7)}
        options |= {"class_labels": [0, 1], "guidance_scale": 1.0} if made.kind == "dit" else {"batch_size": 2}
    if made.kind == "pixart":
        options["use_resolution_binning"] = False
    if made.kind == "flux":
        options |= {"height": 16, "width": 16}
    pictures: np.ndarray = np.asarray(pipeline(**options).images)
    return pictures


def drawn(made: Made, engine: Engine, noise: torch.Tensor, generator: torch.Generator) -> np.ndarray:
    """The same by our own sampler and decoder."""
    config = engine.metadata.config
    asked = replace(made.asked, labels=(0, 1)) if made.kind == "dit" else made.asked
    given, without = conditioning_of(str(config["_class_name"]), config, asked, 2)
    scheduler = build_scheduler(engine.metadata.scheduler, None, STEPS, config)
    library = torch_library()
    result = sample(
        lambda x, t, **inputs: library.of_numpy(engine.denoise(library.to_numpy(x), float(t), **inputs)),
        noise,
        scheduler,
        given,
        guidance=Guidance(SCALE, without, library.concatenate) if without else None,
        step_options={"generator": generator} if made.kind == "ddpm" else {},
    )
    folder = decoder_folder(made.folder)
    pictures = result.numpy() if folder is None else decode(folder, result.numpy())
    return (pictures / 2 + 0.5).clip(0, 1).transpose(0, 2, 3, 1)


def test_a_pipeline_draws_what_our_own_sampler_draws(made: Made) -> None:
    engine = open_engine(made.checkpoint)
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(2, *sample_shape(engine.metadata.config), generator=generator)
    pictures = call(made, loaded(made), noise)
    expected = drawn(made, engine, noise, generator)
    assert pictures.shape == expected.shape
    assert expected.std() > 0.01
    # the halves of a guided batch lie the other way round, so that sums may differ in the last place
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def graph(made: Made) -> Path:
    """The exported graph of ``made``; that exports equal their checkpoints is shown for each family elsewhere."""
    path = made.folder.parent / "model.onnx"
    export_onnx(made.checkpoint, path, Progress(show=False), verify=False)
    return path


@pytest.mark.parametrize("made", EXPORTED, indirect=True)
def test_a_pipeline_around_an_exported_graph_draws_what_its_checkpoint_draws(made: Made, graph: Path) -> None:
    """Text, labels, sizes and both branches of guidance reach the graph's inputs."""
    generator = torch.Generator().manual_seed(7)
    engine = open_engine(made.checkpoint)
    noise = torch.randn(2, *sample_shape(engine.metadata.config), generator=generator)
    pictures = call(made, loaded(made, graph), noise)
    expected = call(made, loaded(made), noise)
    assert pictures.shape == expected.shape
    assert expected.std() > 0.01
    # two steps of a network this small flip no code
    np.testing.assert_allclose(pictures, expected, rtol=0, atol=1e-4)


@needs_transformers
@pytest.mark.parametrize("made", ["sd"], indirect=True)
@pytest.mark.parametrize("document", ["README.md", "docs/models.md"])
def test_the_examples_of_the_documents_run(
    document: str, made: Made, graph: Path, tiny_onnx: Path, tmp_path: Path
) -> None:
    """On tiny files under the names that the examples give."""
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.S | re.M)
    (example,) = (text for text in examples if "load_pipeline" in text)
    files = {"stable-diffusion-v1-5": made.folder, "model.onnx": graph, "digits.onnx": tiny_onnx}
    for name, there in files.items():
        (tmp_path / name).symlink_to(there)
    check = "assert image.size[0] > 0\nassert 'samples' not in globals() or len(samples) == 8"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", f"{example}\n{check}"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)


@pytest.fixture(scope="module")
def simple(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The simplest pipeline, and its engine."""
    folder = save_tiny_pipeline("ddpm", tmp_path_factory.mktemp("ddpm") / "pipeline")
    recipe = replace(TINY_RECIPE, samples=1, check_samples=1, steps=STEPS, les_iterations=0, rounding="nearest")
    calibrate(folder, folder.parent / "checkpoint", recipe, Resources(CPU), Progress(show=False))
    return Made("ddpm", folder, folder.parent / "checkpoint", Request())


def replaced_scheduler(made: Made, folder: Path, scheduler: Any) -> Path:
    shutil.copytree(made.folder, folder)
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def test_another_scheduler_than_the_calibrated_is_a_warning(simple: Made, tmp_path: Path) -> None:
    other = DDIMScheduler(num_train_timesteps=100)
    with pytest.warns(UserWarning, match="scheduler DDIMScheduler, calibrated with DDPMScheduler"):
        load_pipeline(replaced_scheduler(simple, tmp_path / "ddim", other), simple.checkpoint)
    spaced = DDPMScheduler(num_train_timesteps=100, timestep_spacing="trailing")
    with pytest.warns(UserWarning, match="2 evaluations at other timesteps than the 2 calibrated"):
        load_pipeline(replaced_scheduler(simple, tmp_path / "spaced", spaced), simple.checkpoint)


def test_the_calibrated_scheduler_is_no_warning(simple: Made) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_pipeline(simple.folder, simple.checkpoint)


def test_an_engine_of_another_model_is_refused_with_both_described(simple: Made, tmp_path: Path) -> None:
    other = save_tiny_pipeline("ddim", tmp_path / "ddim")
    expected = (
        r"of another model than .*/ddim: of a UNet2DModel that takes sample \[1, 4, 4\], "
        r"the pipeline has a UNet2DModel that takes sample \[3, 4, 4\]"
    )
    with pytest.raises(DmqError, match=expected):
        load_pipeline(other, simple.checkpoint)


def test_a_bare_denoiser_is_no_pipeline(simple: Made) -> None:
    with pytest.raises(ModelError, match=r"/unet is no pipeline: it has no model_index.json; give the folder"):
        load_pipeline(simple.folder / "unet", simple.checkpoint)


def test_a_pipeline_that_does_not_load_says_why_on_one_line(simple: Made, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(simple.folder, tmp_path / "pipeline"))
    (folder / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ModelError, match=r"the pipeline in .* does not load: .*scheduler") as caught:
        build_pipeline(folder, denoiser())
    assert "\n" not in str(caught.value)


def test_a_text_encoder_without_transformers_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_network("sd", tmp_path)
    index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index | {"unet": ["diffusers", "UNet2DConditionModel"]}))
    monkeypatch.setattr("dmq_export.common.extras.find_spec", lambda name: None)
    with pytest.raises(DmqError, match=r"needs what is not installed, transformers: pip install 'dmq-export\[text\]'"):
        encode_prompts(tmp_path, PROMPTS, guidance_scale=None, device=CPU)


# the denoiser that a pipeline sees

CONFIG: dict[str, Any] = {"_class_name": "UNet2DModel", "sample_size": 4, "in_channels": 2}
OUTPUTS = {
    "UNet2DModel": UNet2DOutput,
    "UNet2DConditionModel": UNet2DConditionOutput,
    "DiTTransformer2DModel": Transformer2DModelOutput,
    "PixArtTransformer2DModel": Transformer2DModelOutput,
    "SD3Transformer2DModel": Transformer2DModelOutput,
    "FluxTransformer2DModel": Transformer2DModelOutput,
}


class Engines:
    """Remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[np.ndarray, float, dict[str, np.ndarray]]] = []

    def __call__(self, sample: np.ndarray, timestep: float, **conditioning: np.ndarray) -> np.ndarray:
        self.asked.append((sample, timestep, conditioning))
        return -sample


def denoiser(engine: Any = None, class_name: str = "UNet2DModel", **changes: Any) -> EngineDenoiser:
    config = CONFIG | {"_class_name": class_name} | changes
    return EngineDenoiser(engine or Engines(), class_name, config)


@pytest.mark.parametrize("class_name", OUTPUTS)
def test_it_answers_as_the_model_would(class_name: str) -> None:
    engine = Engines()
    shape = (4, 2) if class_name == "FluxTransformer2DModel" else (2, 4, 4)
    x = torch.randn(3, *shape)
    adapter = denoiser(engine, class_name)
    output = adapter(x, torch.tensor([5.0, 5.0, 5.0]))
    assert type(output) is OUTPUTS[class_name]
    torch.testing.assert_close(output.sample, -x)
    torch.testing.assert_close(adapter(hidden_states=x, timestep=5, return_dict=False)[0], -x)
    unit = 1000 if class_name == "FluxTransformer2DModel" else 1
    assert [timestep for _, timestep, _ in engine.asked] == [5 * unit, 5 * unit]


def test_it_tells_the_engine_what_it_is_told_and_no_more() -> None:
    engine = Engines()
    text, size = torch.randn(1, 3), torch.ones(1, 6)
    denoiser(engine)(
        torch.zeros(1, 2, 4, 4),
        torch.tensor(5),
        encoder_hidden_states=text,
        added_cond_kwargs={"time_ids": size, "image_embeds": None},
        cross_attention_kwargs=None,
        joint_attention_kwargs={},
        timestep_cond=None,
        img_ids=torch.zeros(4, 3),
        txt_ids=torch.zeros(3, 3),
    )
    conditioning = engine.asked[0][2]
    assert conditioning.keys() == {"encoder_hidden_states", "added_cond_kwargs.time_ids"}
    np.testing.assert_array_equal(conditioning["added_cond_kwargs.time_ids"], size.numpy())


def test_what_a_network_of_fixed_size_cannot_do_is_refused() -> None:
    with pytest.raises(DmqError, match=r"samples of \[2, 4, 4\], the pipeline gave \[2, 8, 8\]: leave out"):
        denoiser()(torch.zeros(1, 2, 8, 8), 5)
    with pytest.raises(DmqError, match="takes one timestep for all samples"):
        denoiser()(torch.zeros(2, 2, 4, 4), torch.tensor([5, 6]))
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    with pytest.raises(DmqError, match="cross_attention_kwargs"):
        denoiser()(torch.zeros(1, 2, 4, 4), 5, **scaled)


def test_it_says_of_itself_what_the_model_would() -> None:
    adapter = denoiser(class_name="UNet2DConditionModel", **{**UNET, "sample_size": 4, "in_channels": 2})
    assert adapter.config.cross_attention_dim == UNET["cross_attention_dim"]
    assert (adapter.config.in_channels, adapter.dtype, adapter.device) == (2, torch.float32, CPU)
    assert adapter.to(torch.device("meta")).device.type == "meta"
    assert list(adapter.parameters()) == []
