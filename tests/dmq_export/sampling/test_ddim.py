"""The NumPy DDIM against diffusers': the same bits over every option that it takes.

PyTorch's square root depends on the machine: MKL's is off by one unit in the last place for a fifth of all arguments on
some CPUs. The bits are therefore compared while PyTorch rounds roots as IEEE 754 says (:func:`exact_roots`), and
diffusers as it is on this machine with a tolerance.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from dmq_export.errors import DmqError
from dmq_export.sampling.ddim import CHOICES, Ddim, DdimSettings, alphas_cumprod, unsupported
from dmq_export.sampling.loop import sample

CONFIGS = st.fixed_dictionaries(
    {
        "num_train_timesteps": st.integers(4, 1200),
        "beta_start": st.floats(1e-5, 1e-3),
        "beta_end": st.floats(5e-3, 0.03),
        "set_alpha_to_one": st.booleans(),
        "clip_sample": st.booleans(),
        "clip_sample_range": st.sampled_from([1.0, 0.7, 2.5]),
        "steps_offset": st.integers(0, 1),
        **{name: st.sampled_from(choices) for name, choices in CHOICES.items()},
    }
)


def theirs(config: dict[str, Any], steps: int) -> Any:
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    return scheduler


def same_bits(ours: np.ndarray, theirs: np.ndarray) -> None:
    assert ours.dtype == theirs.dtype == np.float32
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


@contextmanager
def exact_roots() -> Iterator[None]:
    """While the block runs, ``tensor ** 0.5`` is the nearest float32, whatever library PyTorch takes it from."""
    power = torch.Tensor.__pow__

    def exact(base: torch.Tensor, exponent: Any) -> torch.Tensor:
        return torch.from_numpy(np.asarray(np.sqrt(base.numpy()))) if exponent == 0.5 else power(base, exponent)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "__pow__", exact)
        yield


@pytest.fixture(autouse=True)
def fused_multiply_add() -> None:
    """PyTorch's linspace is fused on every CPU that can; its fallback for those that cannot rounds twice."""
    if torch.backends.cpu.get_cpu_capability() == "DEFAULT":
        pytest.skip("this CPU has no fused multiply-add, which PyTorch's own result depends on")


@given(config=CONFIGS)
@settings(max_examples=200, deadline=None)
def test_the_schedule_is_that_of_diffusers(config: dict[str, Any]) -> None:
    same_bits(alphas_cumprod(DdimSettings.from_config(config)), DDIMScheduler(**config).alphas_cumprod.numpy())


@given(config=CONFIGS, steps=st.integers(1, 60), eta=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0, 99))
@settings(max_examples=200, deadline=None)
def test_every_step_is_that_of_diffusers(config: dict[str, Any], steps: int, eta: float, seed: int) -> None:
    steps = min(steps, config["num_train_timesteps"] // 2)
    ours, reference = Ddim(DdimSettings.from_config(config), steps), theirs(config, steps)
    assert ours.timesteps == reference.timesteps.tolist()
    random = np.random.default_rng(seed)
    for index in sorted({0, len(ours.timesteps) // 2, len(ours.timesteps) - 1}):
        t = ours.timesteps[index]
        x, prediction = random.standard_normal((2, 2, 3, 5, 7), np.float32)
        streams = [np.random.default_rng([seed, i]) for i in range(2)]
        fresh = np.stack([np.random.default_rng([seed, i]).standard_normal((3, 5, 7), np.float32) for i in range(2)])
        noise = {"variance_noise": torch.from_numpy(fresh)} if eta else {}
        arguments = (torch.from_numpy(prediction), reference.timesteps[index], torch.from_numpy(x))
        with exact_roots(), np.errstate(invalid="ignore"):
            expected = reference.step(*arguments, eta=eta, **noise)
        if torch.isnan(expected.prev_sample).any():
            continue  # a square root of less than nothing; see below
        result = ours.step(prediction, t, x, eta=eta, generator=streams)
        same_bits(result.prev_sample, expected.prev_sample.numpy())
        same_bits(result.pred_original_sample, expected.pred_original_sample.numpy())
        assert ours.scale_model_input(x, t) is x


def network(x: Any, t: Any) -> Any:
    """Exact in any library: no sums whose order could differ."""
    return x * 0.75 - 0.5


@pytest.mark.parametrize("roots", [exact_roots, nullcontext])
@pytest.mark.parametrize("prediction_type", CHOICES["prediction_type"])
@pytest.mark.parametrize("spacing", CHOICES["timestep_spacing"])
def test_a_whole_trajectory_ends_where_that_of_diffusers_does(prediction_type: str, spacing: str, roots: Any) -> None:
    config = {"prediction_type": prediction_type, "timestep_spacing": spacing, "beta_schedule": "scaled_linear"}
    noise = np.random.default_rng(0).standard_normal((4, 3, 8, 8), np.float32)
    ours = sample(network, noise, Ddim(DdimSettings.from_config(config), 20), {})
    with roots():
        expected = sample(network, torch.from_numpy(noise), theirs(config, 20), {}).numpy()
    if roots is exact_roots:
        same_bits(ours, expected)
    # 20 steps, each with four coefficients that may be off by 2^-23
    np.testing.assert_allclose(ours, expected, rtol=0, atol=80 * 2.0**-23 * max(1, np.abs(expected).max()))


def test_noise_is_each_samples_own() -> None:
    ddim = Ddim(DdimSettings(), 10)
    x, prediction = np.random.default_rng(0).standard_normal((2, 3, 1, 4, 4), np.float32)

    def drawn(rows: list[int]) -> np.ndarray:
        streams = [np.random.default_rng(row) for row in rows]
        return ddim.step(prediction[rows], ddim.timesteps[0], x[rows], eta=1.0, generator=streams).prev_sample

    same_bits(drawn([0, 1, 2]), np.concatenate([drawn([0]), drawn([1, 2])]))


def test_fresh_noise_that_takes_all_of_the_variance_is_no_nan() -> None:
    """A schedule that ends in pure noise: diffusers takes the root of what rounding left below zero."""
    config = {"num_train_timesteps": 900, "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    ddim, reference = Ddim(DdimSettings.from_config(config), 2), theirs(config, 2)
    x = np.ones((1, 1, 2, 2), np.float32)
    tensor = torch.from_numpy(x)
    with exact_roots(), np.errstate(invalid="ignore"):
        expected = reference.step(tensor, reference.timesteps[0], tensor, eta=1.0, variance_noise=tensor)
    assert torch.isnan(expected.prev_sample).all()
    out = ddim.step(x, ddim.timesteps[0], x, eta=1.0, generator=[np.random.default_rng(0)])
    assert np.isfinite(out.prev_sample).all()


def test_keys_of_other_schedulers_are_left_alone() -> None:
    config = {"_class_name": "PNDMScheduler", "skip_prk_steps": True, "beta_end": 0.012, "trained_betas": None}
    assert DdimSettings.from_config(config) == DdimSettings(beta_end=0.012)


def test_the_defaults_are_those_of_diffusers() -> None:
    theirs = dict(DDIMScheduler().config)
    ours = DdimSettings()
    assert all(getattr(ours, name) == theirs[name] for name in ours.__dataclass_fields__)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"thresholding": True}, "thresholding"),
        ({"rescale_betas_zero_snr": True}, "rescale_betas_zero_snr"),
        ({"trained_betas": [0.1, 0.2]}, "trained_betas"),
        ({"beta_schedule": "sigmoid"}, "beta_schedule sigmoid"),
        ({"prediction_type": "flow"}, "prediction_type flow"),
        ({"timestep_spacing": "random"}, "timestep_spacing random"),
    ],
)
def test_what_it_does_not_do_is_refused_by_name(config: dict[str, Any], reason: str) -> None:
    assert unsupported(config) == reason
    with pytest.raises(DmqError, match=f"DDIM without diffusers has no {reason}: install diffusers"):
        DdimSettings.from_config(config)


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        ({"num_train_timesteps": 50}, 51, "does not take 51 steps: the model was trained with 50"),
        ({}, 0, "does not take 0 steps"),
        ({"num_train_timesteps": 50, "steps_offset": 1}, 50, "start at timestep 50: .* trained on 0 to 49"),
        ({"beta_start": 0.0}, 10, "betas from 0 to 0.02 are no noise schedule"),
        ({"beta_end": 1.5}, 10, "to 1.5 are no noise schedule"),
    ],
)
def test_a_schedule_without_such_steps_is_refused(config: dict[str, Any], steps: int, message: str) -> None:
    with pytest.raises(DmqError, match=message):
        Ddim(DdimSettings.from_config(config), steps)


def test_the_cosine_schedule_ends_at_its_largest_beta() -> None:
    alphas = alphas_cumprod(DdimSettings(beta_schedule="squaredcos_cap_v2"))
    assert math.isclose(1 - alphas[-1] / alphas[-2], 0.999, rel_tol=1e-4)
