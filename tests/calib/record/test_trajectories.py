"""The recorded calibration set is what a plain diffusers loop sees."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, PNDMScheduler
from torch import Tensor, nn

from calib.model.load import SourceModel, load_model
from calib.model.network import predict
from calib.record.conditioning import Conditioning
from calib.record.trajectories import SamplerSettings, Trajectories, _last_visits, record_trajectories
from dmq_export.errors import DmqError

STEPS = 4
NO_CONDITIONING = Conditioning({}, {})


class Toy(nn.Module):
    """Elementwise, so that no result depends on how samples are batched; ``outputs`` times the channels."""

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))
        self.outputs = outputs

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> tuple[Tensor]:
        shift = 0 if class_labels is None else class_labels.view(-1, 1, 1, 1) / 10
        answer = torch.sin(self.weight * sample + timestep.view(-1, 1, 1, 1) / 50 + shift)
        return (torch.cat([answer] * self.outputs, dim=1),)


def toy(scheduler: Any = None, outputs: int = 1) -> SourceModel:
    chosen = scheduler or DDIMScheduler(num_train_timesteps=100)
    facts = {"_class_name": type(chosen).__name__, **chosen.config}
    return SourceModel(Toy(outputs).requires_grad_(False), "Toy", {"sample_size": 2, "in_channels": 1}, facts, "")


def labels(values: list[int], null: int | None = None) -> Conditioning:
    given = torch.tensor(values)
    return Conditioning({"class_labels": given}, {} if null is None else {"class_labels": torch.full_like(given, null)})


def plain_loop(
    network: nn.Module, scheduler: Any, noise: Tensor, conditioning: Mapping[str, Tensor]
) -> tuple[list[Tensor], Tensor]:
    """What diffusers' pipelines do; the network's inputs and the sample."""
    x, seen = noise * scheduler.init_noise_sigma, []
    with torch.no_grad():
        for t in scheduler.timesteps:
            seen.append(scheduler.scale_model_input(x, t))
            output = predict(network, seen[-1], t, conditioning)
            x = scheduler.step(output, t, x).prev_sample
    return seen, x


@pytest.fixture(scope="module")
def tiny(tiny_model: Path) -> SourceModel:
    return load_model(tiny_model, torch.device("cpu"))


@pytest.fixture(scope="module")
def recorded(tiny: SourceModel) -> Trajectories:
    return record_trajectories(tiny, SamplerSettings(steps=STEPS), labels([0, 2, 1]), range(3), seed=5)


def test_the_recorded_predictions_are_what_the_network_answers(tiny: SourceModel, recorded: Trajectories) -> None:
    assert recorded.inputs.shape == recorded.predictions.shape == (STEPS, 3, 1, 8, 8)
    for t, x, expected in zip(recorded.timesteps, recorded.inputs, recorded.predictions, strict=True):
        with torch.no_grad():
            assert torch.equal(predict(tiny.network, x, t.long(), recorded.conditioning), expected)


def test_recording_equals_a_plain_ddim_loop(tiny: SourceModel, recorded: Trajectories) -> None:
    scheduler = DDIMScheduler(num_train_timesteps=100, steps_offset=1)
    scheduler.set_timesteps(STEPS)
    assert torch.equal(recorded.timesteps, scheduler.timesteps.float())
    inputs, samples = plain_loop(tiny.network, scheduler, recorded.inputs[0], recorded.conditioning)
    assert torch.equal(recorded.inputs, torch.stack(inputs))
    assert torch.equal(recorded.samples, samples)
    assert recorded.conditioning["class_labels"].tolist() == [0, 2, 1]


def test_trajectories_start_from_standard_normal_noise() -> None:
    start = record_trajectories(toy(), SamplerSettings(steps=1), NO_CONDITIONING, range(500), seed=0).inputs[0]
    # 2000 numbers: five standard errors
    assert abs(float(start.mean())) < 5 / 2000**0.5
    assert abs(float(start.std()) - 1) < 5 / 4000**0.5
    assert len(start.unique()) == start.numel()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_sample_does_not_depend_on_how_many_there_are(eta: float) -> None:
    settings, values = SamplerSettings(steps=STEPS, eta=eta), [i % 3 for i in range(70)]
    many = record_trajectories(toy(), settings, labels(values), range(70), seed=1)
    few = record_trajectories(toy(), settings, labels(values), range(33), seed=1)
    assert torch.equal(few.samples, many.samples[:33])
    assert torch.equal(few.inputs, many.inputs[:, :33])
    assert torch.equal(few.predictions, many.predictions[:, :33])
    assert many.conditioning["class_labels"].tolist() == values
    assert len(few.samples.flatten(1).unique(dim=0)) == 33


def test_the_same_seed_draws_the_same_and_another_does_not() -> None:
    settings = SamplerSettings(steps=STEPS, eta=1.0)
    first, again, other = (
        record_trajectories(toy(), settings, NO_CONDITIONING, range(2), seed=seed) for seed in (3, 3, 4)
    )
    assert torch.equal(first.inputs, again.inputs)
    assert torch.equal(first.samples, again.samples)
    assert not torch.isclose(first.inputs, other.inputs).any()


def test_eta_adds_noise_of_its_own_at_every_step() -> None:
    plain, noisy = (
        record_trajectories(toy(), SamplerSettings(steps=STEPS, eta=eta), NO_CONDITIONING, range(40), seed=2)
        for eta in (0.0, 1.0)
    )
    assert torch.equal(plain.inputs[0], noisy.inputs[0])
    scheduler = DDIMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(STEPS)
    for row in range(STEPS - 1):
        t = scheduler.timesteps[row]
        mean, deviation = ddim_step(scheduler, noisy.predictions[row], int(t), noisy.inputs[row])
        added = (noisy.inputs[row + 1] - mean) / deviation
        # 160 standard normal numbers, five standard errors
        assert abs(float(added.mean())) < 5 / 160**0.5
        assert abs(float(added.std()) - 1) < 5 / 320**0.5
        assert not torch.isclose(added, noisy.inputs[0], atol=1e-3).all()


def ddim_step(scheduler: DDIMScheduler, prediction: Tensor, t: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of x_{t-1} with eta = 1: DDIM, equations 12 and 16 (Song et al. 2021)."""
    previous = t - 100 // STEPS
    now = scheduler.alphas_cumprod[t]
    then = scheduler.alphas_cumprod[previous] if previous >= 0 else scheduler.final_alpha_cumprod
    clean = ((x - (1 - now).sqrt() * prediction) / now.sqrt()).clamp(-1, 1)
    direction = (x - now.sqrt() * clean) / (1 - now).sqrt()
    deviation = ((1 - then) / (1 - now) * (1 - now / then)).sqrt()
    return then.sqrt() * clean + (1 - then - deviation**2).sqrt() * direction, deviation


def test_a_timestep_that_pndm_visits_twice_has_one_row_of_its_last_visit() -> None:
    scheduler = PNDMScheduler(num_train_timesteps=100, skip_prk_steps=True)
    source = toy(scheduler)
    recorded = record_trajectories(source, SamplerSettings(steps=STEPS), NO_CONDITIONING, range(2), seed=0)
    scheduler.set_timesteps(STEPS)
    visited = scheduler.timesteps.tolist()
    assert len(set(visited)) < len(visited)
    assert recorded.timesteps.tolist() == sorted(set(visited), reverse=True)
    inputs, samples = plain_loop(source.network, scheduler, recorded.inputs[0], {})
    last_visit = {t: x for t, x in zip(visited, inputs, strict=True)}
    assert torch.equal(recorded.inputs, torch.stack([last_visit[t] for t in recorded.timesteps.tolist()]))
    assert torch.equal(recorded.samples, samples)


def test_rows_are_in_the_order_of_last_visits() -> None:
    assert list(_last_visits([9, 5, 9, 1, 1]).items()) == [(5, 1), (9, 2), (1, 4)]


def test_inputs_are_recorded_as_scaled_by_the_scheduler() -> None:
    scheduler = EulerDiscreteScheduler(num_train_timesteps=100)
    source = toy(scheduler)
    recorded = record_trajectories(source, SamplerSettings(steps=STEPS), NO_CONDITIONING, range(2), seed=0)
    scheduler.set_timesteps(STEPS)
    sigma = scheduler.sigmas[0]
    noise = recorded.inputs[0] * (sigma**2 + 1) ** 0.5 / scheduler.init_noise_sigma
    inputs, samples = plain_loop(source.network, scheduler, noise, {})
    torch.testing.assert_close(recorded.inputs, torch.stack(inputs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(recorded.samples, samples, rtol=1e-5, atol=1e-5)


def test_a_scheduler_by_name_takes_the_place_of_the_models_own() -> None:
    recorded = record_trajectories(
        toy(), SamplerSettings(scheduler="euler", steps=STEPS), NO_CONDITIONING, range(1), seed=0
    )
    expected = EulerDiscreteScheduler.from_config(toy().scheduler)
    expected.set_timesteps(STEPS)
    assert torch.equal(recorded.timesteps, expected.timesteps.float())


def test_guidance_records_both_branches_and_follows_their_combination() -> None:
    source, scale = toy(), 3.0
    settings = SamplerSettings(steps=STEPS, guidance_scale=scale)
    recorded = record_trajectories(source, settings, labels([0, 1], null=2), range(2), seed=0)
    assert recorded.inputs.shape == (STEPS, 4, 1, 2, 2)
    assert recorded.samples.shape == (2, 1, 2, 2)
    assert recorded.conditioning["class_labels"].tolist() == [0, 1, 2, 2]
    scheduler = DDIMScheduler(num_train_timesteps=100)
    scheduler.set_timesteps(STEPS)
    x = recorded.inputs[0, :2]
    for row, t in enumerate(scheduler.timesteps):
        assert torch.equal(recorded.inputs[row], torch.cat([x, x]))
        with_label = predict(source.network, x, t, {"class_labels": torch.tensor([0, 1])})
        without = predict(source.network, x, t, {"class_labels": torch.tensor([2, 2])})
        assert torch.equal(recorded.predictions[row], torch.cat([with_label, without]))
        x = scheduler.step(without + scale * (with_label - without), t, x).prev_sample
    assert torch.equal(recorded.samples, x)


def test_rows_stay_together_over_several_batches_with_guidance() -> None:
    source, settings = toy(), SamplerSettings(steps=2, guidance_scale=2.0)
    recorded = record_trajectories(source, settings, labels([i % 2 for i in range(40)], null=2), range(40), seed=0)
    assert sorted(recorded.conditioning["class_labels"].tolist()) == [0] * 20 + [1] * 20 + [2] * 40
    for t, x, expected in zip(recorded.timesteps, recorded.inputs, recorded.predictions, strict=True):
        assert torch.equal(predict(source.network, x, t, recorded.conditioning), expected)


def test_a_learned_variance_is_recorded_and_not_stepped_with() -> None:
    plain, learned = (
        record_trajectories(toy(outputs=outputs), SamplerSettings(steps=STEPS), NO_CONDITIONING, range(2), seed=0)
        for outputs in (1, 2)
    )
    assert learned.predictions.shape == (STEPS, 2, 2, 2, 2)
    assert torch.equal(learned.samples, plain.samples)


def test_every_evaluation_is_counted_for_progress() -> None:
    counts: list[int] = []
    settings = SamplerSettings(steps=STEPS, guidance_scale=2.0)
    record_trajectories(toy(), settings, labels([0] * 35, null=1), range(35), seed=0, advance=counts.append)
    assert sum(counts) == 2 * 35 * STEPS


def test_eta_for_a_scheduler_without_it_is_an_error() -> None:
    with pytest.raises(DmqError, match=r"eta 0\.5 was asked for, but PNDMScheduler takes none: use --scheduler ddim"):
        record_trajectories(
            toy(), SamplerSettings(scheduler="pndm", steps=STEPS, eta=0.5), NO_CONDITIONING, range(1), seed=0
        )


def test_a_model_without_a_scheduler_needs_a_name() -> None:
    bare = SourceModel(Toy(), "Toy", {"sample_size": 2, "in_channels": 1}, {}, "")
    with pytest.raises(DmqError, match="name one with --scheduler"):
        record_trajectories(bare, SamplerSettings(), NO_CONDITIONING, range(1), seed=0)
