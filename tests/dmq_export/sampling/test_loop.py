"""The sampling loop against loops written out by hand, a NumPy DDIM, and diffusers' own pipelines."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel

from calib.model.schedulers import build_scheduler, step_options
from dmq_export.sampling.loop import Evaluation, Guidance, sample
from dmq_export.sampling.names import SCHEDULERS

# diffusers passes tensors to np.array, whose protocol torch does not follow in full yet
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

TIMESTEPS = (4, 2, 1)
NOISE = np.random.default_rng(0).standard_normal((2, 3, 2, 2))
LABELS = {"label": np.array([1.0, 2.0]), "shift": np.array([0.1, -0.2])}
NO_LABELS = {"label": np.array([5.0, 5.0]), "shift": np.array([0.0, 0.3])}


def toy_scheduler() -> Any:
    """In NumPy: starts from three times the noise, shows the network a scaled sample, adds ``gain * t`` predictions."""
    return SimpleNamespace(
        timesteps=TIMESTEPS,
        init_noise_sigma=3.0,
        scale_model_input=lambda x, t: x / (1 + t),
        step=lambda prediction, t, x, gain=1.0: SimpleNamespace(prev_sample=x + gain * t * prediction),
    )


def toy_network(x: np.ndarray, t: int, *, label: np.ndarray, shift: np.ndarray) -> np.ndarray:
    return np.tanh(x * label[:, None, None, None] + t * shift[:, None, None, None])


def stacked(*dicts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([entries[name] for entries in dicts]) for name in dicts[0]}


def test_the_loop_is_the_one_written_out() -> None:
    noise = NOISE.copy()
    result = sample(toy_network, noise, toy_scheduler(), LABELS)
    x = 3 * NOISE
    x = x + 4 * toy_network(x / 5, 4, **LABELS)
    x = x + 2 * toy_network(x / 3, 2, **LABELS)
    x = x + 1 * toy_network(x / 2, 1, **LABELS)
    np.testing.assert_array_equal(result, x)
    np.testing.assert_array_equal(noise, NOISE)


def test_step_options_reach_the_scheduler() -> None:
    result = sample(toy_network, NOISE, toy_scheduler(), LABELS, step_options={"gain": 0.0})
    np.testing.assert_array_equal(result, 3 * NOISE)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5, 7.5])
def test_guidance_moves_from_the_unconditional_prediction_past_the_conditional(scale: float) -> None:
    guidance = Guidance(scale, NO_LABELS, np.concatenate)
    result = sample(toy_network, NOISE, toy_scheduler(), LABELS, guidance=guidance)
    x = 3 * NOISE
    for t in TIMESTEPS:
        conditional = toy_network(x / (1 + t), t, **LABELS)
        unconditional = toy_network(x / (1 + t), t, **NO_LABELS)
        x = x + t * (unconditional + scale * (conditional - unconditional))
    np.testing.assert_array_equal(result, x)


@pytest.mark.parametrize(("scale", "labels"), [(0.0, NO_LABELS), (1.0, LABELS)])
def test_guidance_by_zero_and_one_is_a_single_branch(scale: float, labels: dict[str, np.ndarray]) -> None:
    guided = sample(toy_network, NOISE, toy_scheduler(), LABELS, guidance=Guidance(scale, NO_LABELS, np.concatenate))
    # u + (c - u) is c up to rounding in float64, which three steps multiply by less than a hundred
    np.testing.assert_allclose(guided, sample(toy_network, NOISE, toy_scheduler(), labels), rtol=0, atol=1e-12)


def test_guidance_evaluates_both_branches_at_once() -> None:
    sizes = []

    def network(x: np.ndarray, t: int, **conditioning: np.ndarray) -> np.ndarray:
        sizes.append(len(x))
        return toy_network(x, t, **conditioning)

    sample(network, NOISE, toy_scheduler(), LABELS, guidance=Guidance(2.0, NO_LABELS, np.concatenate))
    assert sizes == [4, 4, 4]


@pytest.mark.parametrize("guidance", [None, Guidance(2.5, NO_LABELS, np.concatenate)])
def test_a_learned_variance_is_cut_off(guidance: Guidance | None) -> None:
    def with_variance(x: np.ndarray, t: int, **conditioning: np.ndarray) -> np.ndarray:
        prediction = toy_network(x, t, **conditioning)
        return np.concatenate([prediction, np.full_like(prediction, np.nan)], axis=1)

    result = sample(with_variance, NOISE, toy_scheduler(), LABELS, guidance=guidance)
    np.testing.assert_array_equal(result, sample(toy_network, NOISE, toy_scheduler(), LABELS, guidance=guidance))


def test_the_callback_sees_what_the_network_saw_and_said() -> None:
    seen: list[Evaluation] = []
    said: list[np.ndarray] = []

    def network(x: np.ndarray, t: int, **conditioning: np.ndarray) -> np.ndarray:
        assert len(seen) == len(said)
        said.append(np.concatenate([toy_network(x, t, **conditioning)] * 2, axis=1))
        return said[-1]

    guidance = Guidance(2.0, NO_LABELS, np.concatenate)
    sample(network, NOISE, toy_scheduler(), LABELS, guidance=guidance, callback=seen.append)
    assert [(evaluation.step, evaluation.timestep) for evaluation in seen] == list(enumerate(TIMESTEPS))
    np.testing.assert_array_equal(seen[0].sample, np.concatenate([3 * NOISE / 5, 3 * NOISE / 5]))
    for evaluation, prediction in zip(seen, said, strict=True):
        assert evaluation.prediction is prediction
        assert evaluation.conditioning.keys() == LABELS.keys()
        for name, value in stacked(LABELS, NO_LABELS).items():
            np.testing.assert_array_equal(evaluation.conditioning[name], value)


def test_without_guidance_the_callback_sees_one_branch() -> None:
    seen: list[Evaluation] = []
    sample(toy_network, NOISE, toy_scheduler(), LABELS, callback=seen.append)
    np.testing.assert_array_equal(seen[0].sample, 3 * NOISE / 5)
    assert seen[0].conditioning == LABELS


def ddim_in_numpy(
    network: Callable[..., np.ndarray], x: np.ndarray, steps: int, eta: float, noise: np.ndarray
) -> np.ndarray:
    """Equations 12 and 16 of Song et al. 2021, linear betas over 100 timesteps."""
    alpha = np.cumprod(1 - np.linspace(1e-4, 2e-2, 100))
    timesteps = (np.arange(steps) * (100 // steps))[::-1]
    for index, t in enumerate(timesteps):
        now, then = alpha[t], alpha[timesteps[index + 1]] if index + 1 < steps else 1.0
        prediction = network(x, t)
        sigma = eta * np.sqrt((1 - then) / (1 - now) * (1 - now / then))
        clean = (x - np.sqrt(1 - now) * prediction) / np.sqrt(now)
        x = np.sqrt(then) * clean + np.sqrt(1 - then - sigma**2) * prediction + sigma * noise[index]
    return x


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
def test_ddim_is_the_papers_with_noise_of_its_own_for_every_sample(eta: float) -> None:
    x = torch.from_numpy(NOISE.astype(np.float32))
    scheduler = build_scheduler({"num_train_timesteps": 100, "clip_sample": False}, "ddim", 5)
    generators = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    result = sample(
        lambda x, t: torch.sin(x * (1 + t / 100)),
        x,
        scheduler,
        {},
        step_options=step_options(scheduler, eta=eta, generators=generators),
    )
    streams = [torch.Generator().manual_seed(seed) for seed in (10, 11)]
    noise = [np.stack([torch.randn(3, 2, 2, generator=stream).numpy() for stream in streams]) for _ in range(5)]
    expected = ddim_in_numpy(lambda x, t: np.sin(x * (1 + t / 100)), NOISE, 5, eta, np.stack(noise))
    # float32 against float64 over five steps of a network with slope at most two
    np.testing.assert_allclose(result.numpy(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_arrives_where_an_exact_network_points(name: str) -> None:
    """All data is one point: the exact prediction leads every solver there, if the loop hands it the right inputs."""
    config = {"num_train_timesteps": 100, "timestep_spacing": "leading", "set_alpha_to_one": True, "clip_sample": False}
    scheduler = build_scheduler(config, name, 10)
    alpha = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 100, dtype=torch.float64), 0)
    point = torch.linspace(-0.9, 0.9, 12).reshape(1, 3, 2, 2)

    def exact(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = alpha[int(t)]
        return ((x - a.sqrt() * point) / (1 - a).sqrt()).float()

    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    options = step_options(scheduler, eta=0.0, generators=generators)
    result = sample(exact, torch.from_numpy(NOISE.astype(np.float32)), scheduler, {}, step_options=options)
    torch.testing.assert_close(result, point.expand(2, 3, 2, 2), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("name", "eta"), [("ddim", 1.0), ("ddpm", 0.0), ("euler", 0.0)])
def test_a_sample_does_not_depend_on_its_batch(name: str, eta: float) -> None:
    noise = torch.from_numpy(np.random.default_rng(1).standard_normal((3, 1, 4, 4)).astype(np.float32))

    def drawn(rows: list[int]) -> torch.Tensor:
        scheduler = build_scheduler({"num_train_timesteps": 100}, name, 5)
        generators = [torch.Generator().manual_seed(row) for row in rows]
        options = step_options(scheduler, eta=eta, generators=generators)
        result: torch.Tensor = sample(lambda x, t: 0.3 * x, noise[rows], scheduler, {}, step_options=options)
        return result

    # vectorised arithmetic may round the last bit differently in another batch
    torch.testing.assert_close(drawn([0, 1, 2]), torch.cat([drawn([0]), drawn([1, 2])]), rtol=0, atol=1e-6)


def unconditional_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4,),
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        norm_num_groups=2,
        add_attention=False,
    ).eval()


@pytest.mark.parametrize(("name", "eta"), [("ddim", 0.0), ("ddim", 1.0), ("ddpm", 0.0)])
def test_the_samples_are_those_of_the_pipeline_of_diffusers(name: str, eta: float) -> None:
    unet = unconditional_unet()
    config = {"num_train_timesteps": 100, "clip_sample": False, "steps_offset": 1}
    scheduler_class = getattr(diffusers, SCHEDULERS[name])
    pipeline = {"ddim": DDIMPipeline, "ddpm": DDPMPipeline}[name](unet, scheduler_class.from_config(config))
    pipeline.set_progress_bar_config(disable=True)
    settings: dict[str, Any] = {"eta": eta} if name == "ddim" else {}
    images = pipeline(
        batch_size=2,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=5,
        output_type="np",
        return_dict=False,
        **settings,
    )[0]

    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(2, 1, 8, 8, generator=generator)
    scheduler = build_scheduler(config, name, 5)
    with torch.no_grad():
        result = sample(
            lambda x, t: unet(x, t).sample, noise, scheduler, {}, step_options={"generator": generator, **settings}
        )
    ours = result.permute(0, 2, 3, 1).numpy() / 2 + 0.5
    assert ((ours > 0) & (ours < 1)).mean() > 0.3  # the rest is clamped, and equal whatever the loop does
    # the same operations in the same order
    np.testing.assert_allclose(ours.clip(0, 1), images, rtol=0, atol=1e-6)
