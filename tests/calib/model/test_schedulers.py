"""Schedulers by name, compared with diffusers' own."""

import json
import re
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from calib.model.schedulers import build_scheduler, step_options
from dmq_export.errors import DmqError
from dmq_export.sampling.names import SCHEDULERS

# diffusers passes tensors to np.array, whose protocol torch does not follow in full yet
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CONFIG = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.35.0",
    "num_train_timesteps": 200,
    "beta_start": 0.0002,
    "beta_end": 0.03,
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
CLASSES = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "pndm": diffusers.PNDMScheduler,
    "dpmsolver++": diffusers.DPMSolverMultistepScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "unipc": diffusers.UniPCMultistepScheduler,
}
FLOW_CONFIG = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
SHIFTED = {"use_dynamic_shifting": True, "base_image_seq_len": 16, "max_image_seq_len": 64, "max_shift": 1.3}
SD3 = {"_class_name": "SD3Transformer2DModel", "sample_size": 12, "in_channels": 4, "patch_size": 2}
FLUX = {"_class_name": "FluxTransformer2DModel", "sample_size": 12, "in_channels": 16, "patch_size": 1}


def public(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings, without diffusers' notes on them."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def test_every_name_has_its_diffusers_class() -> None:
    assert {name: getattr(diffusers, class_name) for name, class_name in SCHEDULERS.items()} == CLASSES


@pytest.mark.parametrize("name", CLASSES)
def test_a_named_scheduler_takes_the_configuration_of_the_model(name: str) -> None:
    scheduler = build_scheduler(CONFIG, name, 7)
    assert type(scheduler) is CLASSES[name]
    expected = CLASSES[name](**public(CONFIG))
    expected.set_timesteps(7)
    assert scheduler.timesteps.tolist() == expected.timesteps.tolist()
    torch.testing.assert_close(scheduler.betas, expected.betas, rtol=0, atol=0)
    assert scheduler.config.prediction_type == "v_prediction"


def test_without_a_name_the_configuration_says_which() -> None:
    assert type(build_scheduler(CONFIG, None, 7)) is diffusers.PNDMScheduler


@pytest.mark.parametrize("name", CLASSES)
def test_a_scheduler_comes_back_from_its_own_json(name: str) -> None:
    scheduler = build_scheduler(CONFIG, name, 7)
    again = build_scheduler(json.loads(scheduler.to_json_string()), None, 7)
    assert type(again) is type(scheduler)
    assert again.timesteps.tolist() == scheduler.timesteps.tolist()
    assert public(again.config) == public(scheduler.config)


def test_building_leaves_the_configuration_as_it_was() -> None:
    config = dict(CONFIG)
    build_scheduler(config, "ddim", 7)
    assert config == CONFIG


def test_no_scheduler_anywhere_is_refused_with_the_names_to_choose_from() -> None:
    expected = (
        "no scheduler/scheduler_config.json: name one with --scheduler (ddim, ddpm, pndm, dpmsolver++, euler, unipc)"
    )
    with pytest.raises(DmqError, match=re.escape(expected)):
        build_scheduler({}, None, 5)


def test_an_unknown_name_is_refused_with_the_names_to_choose_from() -> None:
    with pytest.raises(DmqError, match=r"'ddrm'.*ddim, ddpm"):
        build_scheduler(CONFIG, "ddrm", 5)


@pytest.mark.parametrize("class_name", ["NoSuchScheduler", "AutoencoderTiny", "__version__"])
def test_a_class_that_is_no_scheduler_of_diffusers_is_refused(class_name: str) -> None:
    with pytest.raises(DmqError, match=f"has no scheduler '{class_name}'"):
        build_scheduler({"_class_name": class_name}, None, 5)


@pytest.mark.parametrize(("name", "steps"), [("ddim", 201), ("ddpm", 201), ("pndm", 1)])
def test_a_step_count_that_diffusers_does_not_take_is_refused(name: str, steps: int) -> None:
    with pytest.raises(DmqError, match=f"^{CLASSES[name].__name__} does not take {steps} steps: "):
        build_scheduler(CONFIG, name, steps)


@pytest.mark.parametrize(
    ("name", "steps", "changes"),
    [
        ("pndm", 250, {}),  # diffusers would evaluate timestep 0 over and over
        ("ddpm", 200, {"timestep_spacing": "leading"}),  # and look up timestep 200 of 0 to 199
        ("ddim", 200, {"timestep_spacing": "leading"}),
    ],
)
def test_steps_outside_the_schedule_are_refused(name: str, steps: int, changes: dict[str, str]) -> None:
    expected = (
        f"{CLASSES[name].__name__} does not take {steps} steps: they start at timestep .* trained on 0 to 199; take"
    )
    with pytest.raises(DmqError, match=expected):
        build_scheduler(CONFIG | changes, name, steps)


@pytest.mark.parametrize("name", CLASSES)
def test_all_timesteps_of_the_schedule_are_taken(name: str) -> None:
    scheduler = build_scheduler(CONFIG | {"steps_offset": 0}, name, 199)
    assert float(scheduler.timesteps.max()) <= 199


@pytest.mark.parametrize("missing", ["torch", "diffusers"])
def test_without_diffusers_the_user_is_told_what_does_without(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmq_export.common.extras.find_spec", lambda name: None if name == missing else name)
    with pytest.raises(DmqError, match=f"PNDMScheduler, as all but a plain DDIM, needs .* {missing}: pip install"):
        build_scheduler(CONFIG, None, 5)


@pytest.mark.parametrize(
    ("name", "accepted"),
    [
        ("ddim", {"eta", "generator"}),
        ("ddpm", {"generator"}),
        ("pndm", set()),
        ("dpmsolver++", {"generator"}),
        ("euler", {"generator"}),
        ("unipc", set()),
    ],
)
def test_a_scheduler_is_given_only_the_options_it_takes(name: str, accepted: set[str]) -> None:
    generators = (torch.Generator(), torch.Generator())
    options = step_options(build_scheduler(CONFIG, name, 5), eta=0.0, generators=generators)
    assert set(options) == accepted
    assert options.get("eta", 0.0) == 0.0
    if "generator" in accepted:
        assert options["generator"] == list(generators)


def test_ddim_is_given_its_eta() -> None:
    assert step_options(build_scheduler(CONFIG, "ddim", 5), eta=0.5, generators=[])["eta"] == 0.5


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "ddim"])
def test_eta_for_a_scheduler_that_has_none_is_refused(name: str) -> None:
    scheduler = build_scheduler(CONFIG, name, 5)
    expected = f"^eta 0.5 was asked for, but {CLASSES[name].__name__} takes none: use --scheduler ddim$"
    with pytest.raises(DmqError, match=expected):
        step_options(scheduler, eta=0.5, generators=[])


def test_a_flow_scheduler_scales_neither_the_noise_nor_the_input() -> None:
    scheduler = build_scheduler(FLOW_CONFIG, None, 4)
    sample = torch.randn(1, 2)
    assert scheduler.init_noise_sigma == 1
    assert scheduler.scale_model_input(sample, scheduler.timesteps[0]) is sample


@pytest.mark.parametrize("model", [SD3, FLUX], ids=["sd3", "flux"])
def test_a_flow_scheduler_is_shifted_by_the_picture_as_in_the_pipelines(model: dict[str, Any]) -> None:
    tokens = 36  # 12 x 12 latents in patches of 2 x 2, for Flux packed already
    mu = 0.5 + (tokens - 16) * (1.3 - 0.5) / (64 - 16)
    expected = diffusers.FlowMatchEulerDiscreteScheduler(**SHIFTED)
    sigmas = {"sigmas": np.linspace(1.0, 1 / 5, 5)} if model is FLUX else {}
    expected.set_timesteps(5, mu=mu, **sigmas)
    scheduler = build_scheduler(FLOW_CONFIG | SHIFTED, None, 5, model)
    assert scheduler.timesteps.tolist() == expected.timesteps.tolist()
    assert scheduler.sigmas.tolist() == expected.sigmas.tolist()


def test_a_shift_by_the_picture_needs_the_model() -> None:
    with pytest.raises(DmqError, match="states no sample_size and in_channels"):
        build_scheduler(FLOW_CONFIG | SHIFTED, None, 5)


@pytest.mark.parametrize(("config", "model"), [(FLOW_CONFIG, {}), ({}, SD3)], ids=["its scheduler", "its class"])
def test_a_diffusion_scheduler_for_a_flow_matching_model_is_refused(
    config: dict[str, Any], model: dict[str, Any]
) -> None:
    with pytest.raises(DmqError, match=r"^DDIMScheduler does not suit a flow-matching model: leave out --scheduler"):
        build_scheduler(config, "ddim", 5, model)
