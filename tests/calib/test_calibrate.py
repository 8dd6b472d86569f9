"""The whole calibration of a tiny model: what is written, that it is reproducible, and that nothing is on failure."""

import json
import shutil
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from models import TINY_RECIPE, save_small_model
from torch import nn

import calib.run.plan
import calib.run.stages
from calib.calibrate import calibrate
from calib.model.fake_quantized import quantized
from calib.model.load import load_model
from calib.record.conditioning import recipe_conditioning
from calib.record.trajectories import Trajectories
from calib.run.plan import Resources
from dmq_export.bits import Bits
from dmq_export.checkpoint import MANIFEST, TENSORS, Checkpoint, load_checkpoint
from dmq_export.common.progress import Progress
from dmq_export.errors import DmqError, ModelError
from dmq_export.recipe import Recipe

RECIPE = replace(TINY_RECIPE, steps=2)
CPU = Resources(torch.device("cpu"))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def labelled_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("labelled"), num_class_embeds=3)


def run(model: Path, output: Path, recipe: Recipe = RECIPE, limits: Resources = CPU, **options: bool) -> Checkpoint:
    return calibrate(model, output, recipe, limits, Progress(show=False), **options)


@pytest.fixture(scope="module")
def calibrated(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Checkpoint]:
    """The folder of the small model's checkpoint, and what ``calibrate`` returned."""
    folder = tmp_path_factory.mktemp("calibrated") / "out"
    return folder, run(small_model, folder)


def contents(folder: Path) -> tuple[bytes, bytes]:
    return (folder / MANIFEST).read_bytes(), (folder / TENSORS).read_bytes()


def test_the_same_seed_writes_the_same_bytes_and_another_does_not(
    small_model: Path, calibrated: tuple[Path, Checkpoint], tmp_path: Path
) -> None:
    torch.manual_seed(99)
    run(small_model, tmp_path / "again")
    assert contents(tmp_path / "again") == contents(calibrated[0])
    other = run(small_model, tmp_path / "other", replace(RECIPE, seed=1))
    assert not np.isclose(other.probe.sample, calibrated[1].probe.sample).any()
    assert all(not np.array_equal(a.scale, b.scale) for a, b in zip(other.layers, calibrated[1].layers, strict=True))


def test_the_disk_limit_changes_the_number_of_passes_and_nothing_else(
    small_model: Path, calibrated: tuple[Path, Checkpoint], tmp_path: Path
) -> None:
    run(small_model, tmp_path / "out", limits=Resources(torch.device("cpu"), disk=1))
    assert contents(tmp_path / "out") == contents(calibrated[0])


def test_the_checkpoint_on_disk_is_the_one_returned(calibrated: tuple[Path, Checkpoint]) -> None:
    folder, returned = calibrated
    loaded = load_checkpoint(folder)
    for a, b in zip(returned.layers, loaded.layers, strict=True):
        assert a.spec == b.spec
        assert a.tensors().keys() == b.tensors().keys()
        assert all(np.array_equal(value, b.tensors()[name]) for name, value in a.tensors().items())
    assert returned.float_layers == loaded.float_layers
    assert returned.metrics == loaded.metrics
    assert returned.recipe == loaded.recipe == RECIPE.to_json()
    assert np.array_equal(returned.timesteps, loaded.timesteps)
    run_facts = json.loads((folder / "run.json").read_text())
    assert {"trajectories", "layer fits", "check"} <= run_facts["seconds"].keys()
    assert run_facts["peak_memory_bytes"] > 2**20


def test_every_weight_of_the_model_is_in_the_checkpoint_once(tiny_model: Path, tiny_checkpoint: Checkpoint) -> None:
    source = load_model(tiny_model, torch.device("cpu"))
    quantized = {layer.spec.name for layer in tiny_checkpoint.layers}
    kept = {
        f"{name}.{leaf}" for name in quantized for leaf in ("weight", "bias")
    } | tiny_checkpoint.float_tensors.keys()
    assert kept >= source.network.state_dict().keys()
    assert not {f"{name}.weight" for name in quantized} & tiny_checkpoint.float_tensors.keys()
    for name, value in tiny_checkpoint.float_tensors.items():
        assert np.array_equal(value, source.network.state_dict()[name].numpy())
    assert tiny_checkpoint.model.weights_sha256 == source.weights_sha256


@pytest.mark.parametrize(
    ("what", "weights", "activations"), [("weights", True, False), ("activations", False, True), ("both", True, True)]
)
def test_the_reported_sqnr_is_that_of_the_reference_on_held_out_samples(
    tiny_model: Path, tiny_checkpoint: Checkpoint, what: str, weights: bool, activations: bool
) -> None:
    probe, network = tiny_checkpoint.probe, load_model(tiny_model, torch.device("cpu")).network
    assert np.array_equal(probe.timesteps, tiny_checkpoint.timesteps)  # three steps, two samples: all of them
    metrics = tiny_checkpoint.metrics["prediction_sqnr_db"]
    assert metrics["timesteps"] == tiny_checkpoint.timesteps.tolist()
    conditioning = {name: torch.from_numpy(value) for name, value in probe.conditioning.items()}
    timesteps = torch.from_numpy(probe.timesteps)
    with quantized(network, tiny_checkpoint.layers, timesteps, weights=weights, activations=activations) as reference:
        for step, timestep in enumerate(probe.timesteps):
            exact = probe.prediction[step].astype(np.float64)
            answer = reference(torch.from_numpy(probe.sample[step]), float(timestep), **conditioning).numpy()
            expected = 10 * np.log10((exact**2).sum() / ((answer - exact) ** 2).sum())
            assert metrics[what][step] == pytest.approx(expected, abs=0.01)


def test_it_is_checked_on_other_samples_than_those_calibrated_on(small_model: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, les_iterations=0, clip=False, pts_layers="none")
    checkpoint = run(small_model, tmp_path / "out", recipe)
    network, layer = load_model(small_model, torch.device("cpu")).network, checkpoint.layers[0]
    seen: list[torch.Tensor] = []
    network.get_submodule(layer.spec.name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    network(torch.from_numpy(checkpoint.probe.sample[0]), torch.tensor(checkpoint.timesteps[0]))
    # on the calibration samples themselves this is the range, exactly
    span = float(seen[0].max().clamp(min=0) - seen[0].min().clamp(max=0))
    assert span / 255 != pytest.approx(float(layer.scale[0, 0]), rel=1e-3)


def test_the_probe_is_the_float_models_own_answer_on_other_noise(tiny_model: Path, tiny_checkpoint: Checkpoint) -> None:
    probe, network = tiny_checkpoint.probe, load_model(tiny_model, torch.device("cpu")).network
    labels = torch.from_numpy(probe.conditioning["class_labels"])
    for step, timestep in enumerate(probe.timesteps):
        with torch.no_grad():
            answer = network(torch.from_numpy(probe.sample[step]), int(timestep), class_labels=labels).sample
        assert np.array_equal(answer.numpy(), probe.prediction[step])


def test_the_probe_holds_the_first_the_middle_and_the_last_step(small_model: Path, tmp_path: Path) -> None:
    checkpoint = run(small_model, tmp_path / "out", replace(RECIPE, steps=7, check_samples=3))
    assert np.array_equal(checkpoint.probe.timesteps, checkpoint.timesteps[[0, 3, 6]])
    assert checkpoint.probe.sample.shape == (3, 2, 1, 4, 4)


def test_eight_bit_weights_stay_close_to_the_float_model(small_model: Path, tmp_path: Path) -> None:
    # enough samples that held-out ones stay inside the ranges
    recipe = replace(RECIPE, samples=64)
    eight = run(small_model, tmp_path / "w8", replace(recipe, bits=Bits(8, 8))).metrics["prediction_sqnr_db"]
    four = run(small_model, tmp_path / "w4", recipe).metrics["prediction_sqnr_db"]
    assert min(eight["both"]) > 30
    assert 10 < min(four["both"]) < min(eight["both"]) - 5
    assert min(eight["weights"]) > min(four["weights"]) + 15


def test_a_static_symmetric_recipe_writes_one_row_and_the_middle_code(small_model: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, scheme="symmetric", scales="static", bits=Bits(4, 6), pts_layers="none", clip=False)
    checkpoint = run(small_model, tmp_path / "out", recipe)
    for layer in checkpoint.layers:
        assert layer.scale.shape == layer.zero_point.shape == (1, len(layer.spec.parts))
        assert (layer.zero_point == 32).all()
        assert layer.spec.scheme == "symmetric"
        assert not layer.shift.any()
    assert len(checkpoint.timesteps) == 2
    assert min(checkpoint.metrics["prediction_sqnr_db"]["both"]) > 5


def test_a_per_step_recipe_writes_a_row_for_every_step(tiny_checkpoint: Checkpoint) -> None:
    assert {len(layer.scale) for layer in tiny_checkpoint.layers} == {len(tiny_checkpoint.timesteps)} == {3}


def test_adaround_changes_codes_and_nothing_else(small_model: Path, tmp_path: Path) -> None:
    base = replace(RECIPE, pts_layers="none")
    gptq = run(small_model, tmp_path / "gptq", base)
    learned = run(
        small_model, tmp_path / "adaround", replace(base, rounding="adaround", round_iterations=100, round_samples=4)
    )
    moved = 0
    for a, b in zip(gptq.layers, learned.layers, strict=True):
        assert all(np.array_equal(value, b.tensors()[name]) for name, value in a.tensors().items() if name != "codes")
        steps = np.abs(a.codes.astype(int) - b.codes.astype(int))
        assert steps.max() <= 1
        moved += int(steps.sum())
    assert moved > 0


@pytest.fixture(scope="module")
def uneven_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With one channel an eighth as loud as the others: one that wants a finer step."""
    folder = save_small_model(tmp_path_factory.mktemp("uneven"))
    network = UNet2DModel.from_pretrained(folder / "unet")
    with torch.no_grad():
        for layer in (network.conv_in, network.mid_block.resnets[1].conv2, network.down_blocks[0].resnets[0].conv2):
            layer.weight[0] /= 8
            layer.bias[0] /= 8
    network.save_pretrained(folder / "unet")
    return folder


@pytest.mark.parametrize("which", ["skip", "all"])
def test_the_layers_that_were_asked_for_vote_on_powers_of_two(uneven_model: Path, tmp_path: Path, which: Any) -> None:
    checkpoint = run(uneven_model, tmp_path / "out", replace(RECIPE, pts_layers=which, pts_kappa=0.0))
    reports = checkpoint.metrics["layers"]
    assert list(reports) == [layer.spec.name for layer in checkpoint.layers]
    for layer in checkpoint.layers:
        report = reports[layer.spec.name]
        voted = which == "all" or layer.spec.name.endswith("conv_shortcut")
        assert ("pts_share" in report) is voted
        assert report.get("pts_channels", 0) == (layer.shift > 0).sum()
        if voted:
            assert len(report["pts_share"]) == layer.spec.in_channels
    assert any(layer.shift.any() for layer in checkpoint.layers)


def test_guidance_calibrates_both_branches(labelled_model: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, guidance_scale=2.0, null_label=2, labels=(1,))
    checkpoint = run(labelled_model, tmp_path / "out", recipe)
    # two held-out samples with the label, then the same two without
    assert checkpoint.probe.sample.shape[1] == 2
    assert np.isfinite(checkpoint.metrics["prediction_sqnr_db"]["both"]).all()


def test_both_branches_of_guidance_vote(labelled_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three samples are asked for; with two at a time, that takes the rows of four, each with both its branches."""
    voting, count = [], calib.run.stages.count_votes

    def noted(network: nn.Module, trajectories: Trajectories, rows: range, *rest: Any, **options: Any) -> Any:
        voting.extend(trajectories.conditioning["class_labels"][rows.start : rows.stop].tolist())
        return count(network, trajectories, rows, *rest, **options)

    monkeypatch.setattr(calib.run.plan, "BATCHES", (2,))
    monkeypatch.setattr(calib.run.stages, "count_votes", noted)
    recipe = replace(RECIPE, guidance_scale=2.0, null_label=2, labels=(0, 1), samples=6, pts_samples=3)
    run(labelled_model, tmp_path / "out", recipe)
    assert voting == [0, 1, 2, 2] * 2


def test_labels_cycle_and_the_null_label_stands_in_the_other_branch(labelled_model: Path) -> None:
    source = load_model(labelled_model, torch.device("cpu"))
    asked = recipe_conditioning(source, replace(RECIPE, labels=(2, 0)), 5)
    assert asked.conditional["class_labels"].tolist() == [2, 0, 2, 0, 2]
    assert asked.unconditional == {}
    guided = recipe_conditioning(source, replace(RECIPE, guidance_scale=3.0, null_label=1), 3)
    assert guided.conditional["class_labels"].tolist() == [0, 2, 0]
    assert guided.unconditional["class_labels"].tolist() == [1, 1, 1]


def test_a_model_without_labels_is_given_none(small_model: Path) -> None:
    conditioning = recipe_conditioning(load_model(small_model, torch.device("cpu")), RECIPE, 5)
    assert (conditioning.conditional, conditioning.unconditional) == ({}, {})


BAD_RECIPES = {
    "guidance needs the label that stands for no label: give --null-label": {"guidance_scale": 2.0},
    "label 3 is unknown to the model: 0 to 2 are allowed": {"labels": (0, 3)},
    "--float-layer 'nothing' matches no layer": {"float_layers": ("nothing",)},
    "no layer is left to quantize": {"float_layers": ("*",)},
    r"eta 0\.5 was asked for, but EulerDiscreteScheduler takes none": {"eta": 0.5, "scheduler": "euler"},
    "DDIMScheduler does not take 101 steps": {"steps": 101},
}


@pytest.mark.parametrize("message", BAD_RECIPES)
def test_a_recipe_that_does_not_suit_the_model_writes_nothing(
    labelled_model: Path, tmp_path: Path, message: str
) -> None:
    with pytest.raises(DmqError, match=message):
        run(labelled_model, tmp_path / "out", replace(RECIPE, **BAD_RECIPES[message]))
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_refused_before_any_work_and_kept(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    progress = Progress(show=False)
    with pytest.raises(DmqError, match="out exists and is not empty: choose another path, or pass --fresh"):
        calibrate(small_model, tmp_path / "out", RECIPE, CPU, progress)
    assert progress.seconds == {}
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_fresh_replaces_a_checkpoint_only_when_done(
    small_model: Path, calibrated: tuple[Path, Checkpoint], tmp_path: Path
) -> None:
    output = Path(shutil.copytree(calibrated[0], tmp_path / "out"))
    (output / "notes.txt").write_text("of the old one")
    with pytest.raises(ModelError, match="takes no class labels"):
        run(small_model, output, replace(RECIPE, labels=(1,)), fresh=True)
    assert contents(output) == contents(calibrated[0])
    run(small_model, output, replace(RECIPE, seed=1), fresh=True)
    assert contents(output) != contents(calibrated[0])
    assert sorted(path.name for path in output.iterdir()) == [MANIFEST, TENSORS, "run.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fresh_replaces_nothing_but_a_checkpoint(small_model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(DmqError, match="is not empty and no checkpoint, so it is not replaced"):
        run(small_model, tmp_path / "out", fresh=True)
    assert (tmp_path / "out" / "precious").read_text() == "mine"


def test_strict_accepts_a_model_whose_float_layers_are_all_by_design(small_model: Path, tmp_path: Path) -> None:
    assert run(small_model, tmp_path / "out", strict=True).layers


class UNetWithSpareLayer(UNet2DModel):
    """A model with a layer that is never run."""

    @wraps(UNet2DModel.__init__)
    def __init__(self, **config: Any) -> None:
        super().__init__(**config)
        self.spare = nn.Linear(2, 2)


@pytest.fixture
def odd_model(small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of that class, as if diffusers had it."""
    monkeypatch.setattr(diffusers, "UNetWithSpareLayer", UNetWithSpareLayer, raising=False)
    folder = tmp_path / "odd" / "unet"
    UNetWithSpareLayer(**UNet2DModel.load_config(small_model / "unet")).save_pretrained(folder)
    DDIMScheduler(num_train_timesteps=100).save_pretrained(tmp_path / "odd" / "scheduler")
    return folder.parent


def test_strict_refuses_a_layer_that_cannot_be_quantized_by_name(odd_model: Path, tmp_path: Path) -> None:
    message = r"layer spare stays float \(never runs\) and --strict is set: accept it with --float-layer spare"
    with pytest.raises(ModelError, match=message):
        run(odd_model, tmp_path / "out", strict=True)
    assert not (tmp_path / "out").exists()


def test_without_strict_such_a_layer_stays_float(odd_model: Path, tmp_path: Path) -> None:
    checkpoint = run(odd_model, tmp_path / "out")
    assert {layer.name: layer.by_design for layer in checkpoint.float_layers}["spare"] is False
    assert "spare.weight" in checkpoint.float_tensors


def test_the_way_out_that_strict_names_works(odd_model: Path, tmp_path: Path) -> None:
    checkpoint = run(odd_model, tmp_path / "out", replace(RECIPE, float_layers=("spare",)), strict=True)
    assert {layer.name: layer.by_design for layer in checkpoint.float_layers}["spare"] is True


def test_a_model_that_takes_only_whole_timesteps_is_refused_in_words(tmp_path: Path) -> None:
    # recorded timesteps are float32, and so is the exported graph's input
    model = save_small_model(tmp_path / "model", time_embedding_type="learned", num_train_timesteps=100)
    with pytest.raises(DmqError):
        run(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
