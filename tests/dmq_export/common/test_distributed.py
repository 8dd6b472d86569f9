"""The share of one process."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmq_export.common.distributed import Rank
from dmq_export.errors import DmqError


def test_alone_everything_is_ours() -> None:
    assert Rank.of({}) == Rank(0, 1)
    assert Rank().share([3, 1, 2]) == [3, 1, 2]


def test_torchrun_says_which_we_are() -> None:
    assert Rank.of({"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "0"}) == Rank(2, 4)


@given(items=st.lists(st.integers(), max_size=30), count=st.integers(1, 8))
def test_the_shares_are_all_of_it_without_overlap(items: list[int], count: int) -> None:
    shares = [Rank(index, count).share(list(enumerate(items))) for index in range(count)]
    assert sorted(item for share in shares for item in share) == list(enumerate(items))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0"},
        {"WORLD_SIZE": "2"},
        {"RANK": "2", "WORLD_SIZE": "2"},
        {"RANK": "-1", "WORLD_SIZE": "2"},
        {"RANK": "a", "WORLD_SIZE": "2"},
        {"RANK": "0", "WORLD_SIZE": "0"},
    ],
)
def test_an_environment_that_makes_no_sense_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(DmqError, match=r"RANK=.* and WORLD_SIZE=.*: 0 to WORLD_SIZE - 1 is allowed"):
        Rank.of(environment)
