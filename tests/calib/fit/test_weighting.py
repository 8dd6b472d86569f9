"""The adaptive timestep weight against its formula."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.fit.weighting import TimestepWeights

CPU = torch.device("cpu")


def step_weights(steps: int, *, alpha: float = 20.0, momentum: float = 0.95) -> TimestepWeights:
    return TimestepWeights(steps, alpha=alpha, momentum=momentum, device=CPU)


def formula(average: np.ndarray, alpha: float) -> np.ndarray:
    """``lambda_t = (1 - Lambda_t / sum Lambda)^alpha``."""
    return (1 - average / average.sum()) ** alpha


BATCHES = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.floats(0.0625, 128, width=32)), min_size=1, max_size=6),
    min_size=1,
    max_size=5,
)


@settings(deadline=None, max_examples=50)
@given(BATCHES, st.sampled_from([0.0, 1.0, 20.0]), st.sampled_from([0.0, 0.5, 0.95]))
def test_averages_and_weights_follow_the_formula(
    batches: list[list[tuple[int, float]]], alpha: float, momentum: float
) -> None:
    weights = step_weights(4, alpha=alpha, momentum=momentum)
    average = np.zeros(4)
    seen: set[int] = set()
    for batch in batches:
        steps = np.array([step for step, _ in batch])
        losses = np.array([loss for _, loss in batch])
        for step in set(steps.tolist()):
            mean = losses[steps == step].mean()
            average[step] = momentum * average[step] + (1 - momentum) * mean if step in seen else mean
            seen.add(step)
        rows = weights.update(torch.tensor(losses, dtype=torch.float32), torch.tensor(steps))
        expected = formula(average, alpha)
        # 1 - Lambda / sum loses digits near 0 in float32, hence the absolute tolerance
        np.testing.assert_allclose(weights.average, average, rtol=1e-5)
        np.testing.assert_allclose(weights.weights(), expected, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(rows, expected[steps], rtol=1e-4, atol=1e-6)


def test_how_often_a_step_was_drawn_does_not_matter() -> None:
    often, once = step_weights(2), step_weights(2)
    often.update(torch.tensor([3.0, 1.0, 1.0, 1.0, 1.0]), torch.tensor([0, 1, 1, 1, 1]))
    once.update(torch.tensor([3.0, 1.0]), torch.tensor([0, 1]))
    assert once.average.tolist() == [3, 1]
    assert torch.equal(often.average, once.average)


def test_the_step_that_loses_most_counts_least() -> None:
    rows = step_weights(3).update(torch.tensor([1.0, 4.0, 2.0]), torch.tensor([2, 0, 1]))
    assert rows[0] > rows[2] > rows[1]


def test_a_step_not_yet_seen_weighs_as_if_it_had_no_loss() -> None:
    weights = step_weights(3)
    weights.update(torch.tensor([1.0, 3.0]), torch.tensor([0, 2]))
    assert weights.weights()[1] == 1
    assert weights.average[1] == 0


def test_a_step_enters_with_its_first_loss_not_blended_with_zero() -> None:
    weights = step_weights(2)
    weights.update(torch.tensor([8.0]), torch.tensor([0]))
    weights.update(torch.tensor([8.0]), torch.tensor([1]))
    assert weights.average.tolist() == [8, 8]


def test_alpha_zero_weighs_all_steps_alike() -> None:
    rows = step_weights(3, alpha=0.0).update(torch.tensor([1.0, 5.0, 9.0]), torch.tensor([0, 1, 2]))
    assert rows.tolist() == [1, 1, 1]


def test_all_losses_zero_weigh_all_steps_alike() -> None:
    assert step_weights(2).update(torch.zeros(2), torch.tensor([0, 1])).tolist() == [1, 1]


def test_a_single_step_keeps_its_full_weight() -> None:
    weights = step_weights(1)
    assert weights.update(torch.tensor([2.0, 5.0]), torch.tensor([0, 0])).tolist() == [1, 1]


def test_the_weight_reported_for_a_single_step_is_the_one_applied() -> None:
    weights = step_weights(1)
    applied = weights.update(torch.tensor([2.0]), torch.tensor([0]))
    assert weights.weights().tolist() == applied.tolist()


def test_weights_are_constants_to_the_gradient() -> None:
    loss = torch.tensor([1.0, 2.0], requires_grad=True)
    assert not step_weights(2).update(loss, torch.tensor([0, 1])).requires_grad


@pytest.mark.parametrize("momentum", [0.0, 1.0])
def test_momentum_blends_between_the_new_loss_and_the_old(momentum: float) -> None:
    weights = step_weights(2, momentum=momentum)
    for loss in (2.0, 6.0):
        weights.update(torch.tensor([loss]), torch.tensor([0]))
    assert weights.average[0] == (2 if momentum else 6)
