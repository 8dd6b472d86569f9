"""Drawing: which sampler runs, what each sample depends on, and that diffusers' solvers see what they would alone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from calib.model.schedulers import build_scheduler, step_options
from dmq_export.commands.engine import Engine
from dmq_export.commands.sampler import (
    Conditioning,
    SampleSettings,
    conditioning_for,
    draw_batches,
    draw_samples,
    sampler_for,
)
from dmq_export.common.progress import Progress
from dmq_export.common.seeds import stream_seed
from dmq_export.errors import DmqError
from dmq_export.metadata import ExportMetadata
from dmq_export.sampling.loop import sample
from dmq_export.sampling.names import SCHEDULERS
from dmq_export.sampling.noise import initial_noise

METADATA = ExportMetadata(
    target="portable",
    bits="w4a8",
    config={"sample_size": 4, "in_channels": 2, "num_class_embeds": 3},
    scheduler={"_class_name": "DDIMScheduler", "num_train_timesteps": 100, "clip_sample": False},
    recipe={"steps": 5, "scales": "per-step", "eta": 0.0, "guidance_scale": None},
    timesteps=(80.0, 60.0, 40.0, 20.0, 0.0),
)


def network(x: Any, t: float, class_labels: Any) -> Any:
    """Exact in any library: no sums whose order could differ."""
    return x * 0.75 - (class_labels * 0.25).reshape(-1, 1, 1, 1)


def denoise(x: np.ndarray, t: float, **conditioning: np.ndarray) -> np.ndarray:
    assert type(x) is np.ndarray
    assert x.dtype == np.float32
    assert type(t) is float
    return network(x, t, conditioning["class_labels"]).astype(np.float32)


LABELS = {"class_labels": np.arange(2)}
ENGINE = Engine("w4a8", "numpy", denoise, METADATA)


def drawn(metadata: ExportMetadata = METADATA, **settings: Any) -> np.ndarray:
    return draw_samples(replace(ENGINE, metadata=metadata), SampleSettings(**settings), Progress(show=False))


@pytest.mark.parametrize("name", [name for name in SCHEDULERS if name != "ddim"])
def test_other_schedulers_are_diffusers_own(name: str) -> None:
    result = drawn(count=3, scheduler=name, seed=2)
    scheduler = build_scheduler(METADATA.scheduler, name, 5)
    options = step_options(
        scheduler,
        eta=0.0,
        generators=[torch.Generator().manual_seed(stream_seed(2, "steps", i)) for i in range(3)],
    )
    noise = torch.from_numpy(initial_noise((2, 4, 4), range(3), 2))
    labels = {"class_labels": torch.arange(3)}
    expected = sample(lambda x, t, **c: network(x, t, **c), noise, scheduler, labels, step_options=options)
    np.testing.assert_array_equal(result, expected.numpy())


def test_ddim_is_ours_and_close_to_that_of_diffusers() -> None:
    result = drawn(count=3, seed=2)
    noise = torch.from_numpy(initial_noise((2, 4, 4), range(3), 2))
    labels = {"class_labels": torch.arange(3)}
    expected = sample(network, noise, build_scheduler(METADATA.scheduler, None, 5), labels).numpy()
    # five steps with four coefficients each, whose square roots PyTorch may round the other way
    np.testing.assert_allclose(result, expected, rtol=0, atol=20 * 2.0**-23 * np.abs(expected).max())
    assert type(sampler_for(METADATA, SampleSettings()).scheduler).__module__ == "dmq_export.sampling.ddim"


def test_what_our_ddim_lacks_diffusers_does() -> None:
    metadata = replace(METADATA, scheduler={**METADATA.scheduler, "thresholding": True})
    sampler = sampler_for(metadata, SampleSettings())
    assert type(sampler.scheduler).__module__.startswith("diffusers.")
    assert sampler.name == "DDIMScheduler"
    assert drawn(metadata, count=2).shape == (2, 2, 4, 4)


@pytest.mark.parametrize("change", [{"scheduler": "ddpm"}, {"scheduler": "ddim", "eta": 1.0}, {"scheduler": "euler"}])
def test_a_sample_depends_on_its_number_not_its_batch(change: dict[str, Any]) -> None:
    whole = drawn(count=5, batch=5, **change)
    np.testing.assert_array_equal(drawn(count=5, batch=2, **change), whole)
    assert not np.array_equal(drawn(count=5, batch=5, seed=1, **change), whole)


def test_eta_is_that_of_the_calibration_unless_asked_otherwise() -> None:
    metadata = replace(METADATA, recipe={**METADATA.recipe, "eta": 1.0})
    assert sampler_for(metadata, SampleSettings()).eta == 1.0
    assert sampler_for(metadata, SampleSettings(eta=0.0)).eta == 0.0
    assert sampler_for(metadata, SampleSettings(scheduler="euler")).eta == 0.0  # which has none
    np.testing.assert_array_equal(drawn(metadata, count=2), drawn(count=2, eta=1.0))
    assert not np.array_equal(drawn(metadata, count=2), drawn(count=2))


def test_eta_for_a_scheduler_that_has_none_is_refused() -> None:
    with pytest.raises(DmqError, match=r"eta 0.5 was asked for, but EulerDiscreteScheduler takes none"):
        drawn(scheduler="euler", eta=0.5)


def test_without_diffusers_only_ddim_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmq_export.common.extras.find_spec", lambda name: None)
    assert drawn(count=1).shape == (1, 2, 4, 4)
    with pytest.raises(DmqError, match=r"scheduler euler, as all but a plain DDIM, needs .* torch, diffusers"):
        drawn(scheduler="euler")


def test_guidance_goes_past_the_conditional_prediction() -> None:
    result = drawn(count=3, labels=(0, 1), null_label=2, guidance_scale=2.0)
    conditioning = conditioning_for(METADATA, SampleSettings(count=3, labels=(0, 1)))
    doubled = {"class_labels": 2 * conditioning.given["class_labels"] - 2}  # the toy network is linear in its label
    expected = draw_samples(ENGINE, SampleSettings(count=3), Progress(show=False), Conditioning(doubled))
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5)


def test_conditioning_of_any_kind_reaches_the_network() -> None:
    seen = []

    def told(x: np.ndarray, t: float, *, words: np.ndarray, size: np.ndarray) -> np.ndarray:
        seen.append((words[:, 0, 0].tolist(), size.tolist()))
        return x

    given = {"words": np.arange(24.0).reshape(4, 3, 2), "size": np.arange(4)}
    engine = replace(ENGINE, denoise=told)
    settings = SampleSettings(count=4, batch=3, steps=1)
    draw_samples(engine, settings, Progress(show=False), Conditioning(given))
    assert seen == [([0, 6, 12], [0, 1, 2]), ([18], [3])]


def test_labels_cycle_and_guidance_needs_the_label_for_none() -> None:
    settings = SampleSettings(count=5, labels=(0, 2), null_label=1, guidance_scale=3.0)
    conditioning = conditioning_for(METADATA, settings)
    assert conditioning.given["class_labels"].tolist() == [0, 2, 0, 2, 0]
    assert conditioning.unconditional["class_labels"].tolist() == [1] * 5
    assert conditioning.rows(range(1, 3)).given["class_labels"].tolist() == [2, 0]
    with pytest.raises(DmqError, match="give --null-label"):
        conditioning_for(METADATA, SampleSettings(guidance_scale=3.0))


def test_the_digest_tells_conditionings_apart() -> None:
    one, two = np.arange(4), np.arange(4.0)
    kinds = [
        Conditioning(),
        Conditioning({"a": one}),
        Conditioning({"b": one}),
        Conditioning({"a": two}),
        Conditioning({"a": one.reshape(2, 2)}),
        Conditioning({"a": one[::-1]}),
        Conditioning({}, {"a": one}),
    ]
    assert len({kind.digest() for kind in kinds}) == len(kinds)
    assert Conditioning({"a": one}).digest() == Conditioning({"a": one.copy()}).digest()


def test_a_batch_alone_is_that_batch_of_all() -> None:
    settings = SampleSettings(count=6, batch=4)
    conditioning = conditioning_for(METADATA, settings)
    rows = range(4, 6)
    (alone,) = draw_batches(ENGINE, settings, conditioning, [rows], Progress(show=False))
    np.testing.assert_array_equal(alone, drawn(count=6, batch=4)[4:])


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_batch_knows_nothing_of_the_one_before(name: str) -> None:
    """Solvers of higher order remember predictions; the scheduler is built once for all batches."""
    first, again = draw_batches(
        ENGINE, SampleSettings(count=2, scheduler=name), Conditioning(LABELS), [range(2)] * 2, Progress(show=False)
    )
    np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("settings", [{"count": 0}, {"batch": 0}])
def test_there_is_something_to_draw(settings: dict[str, int]) -> None:
    with pytest.raises(DmqError, match="at least 1 is needed of each"):
        SampleSettings(**settings)
