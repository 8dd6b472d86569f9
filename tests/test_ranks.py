"""Shares of several processes; that they end with the same bytes is in test_resume.py."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from calib.ranks import Ranks, own_device, torchrun_ranks


@given(st.lists(st.integers()), st.integers(1, 5))
def test_every_item_belongs_to_one_process(items: list[int], world: int) -> None:
    shares = [list(Ranks(rank, world).mine(items)) for rank in range(world)]
    assert sorted(item for share in shares for item in share) == sorted(items)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_outside_of_torchrun_a_process_is_alone_and_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    with torchrun_ranks() as ranks:
        assert ranks == Ranks(0, 1)
        assert ranks.leads
        ranks.wait()  # for nobody


def test_every_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device(torch.device("cuda")) == torch.device("cuda", 3)
    assert own_device(torch.device("cpu")) == torch.device("cpu")
