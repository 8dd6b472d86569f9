"""Several processes that share one calibration, as ``torchrun`` starts them.

Each takes its share of the items of a stage, and all wait for each other at the stage's end. Results travel through the
work folder, which all must see; so only barriers are needed, and those go over gloo whatever the device is.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import distributed

LONGEST_STAGE = timedelta(days=7)  # torchrun ends the others when one process fails; waiting is no failure
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among ``world``."""

    rank: int = 0
    world: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def mine(self, items: Sequence[T]) -> Sequence[T]:
        """This process's share."""
        return items[self.rank :: self.world]

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world > 1:
            distributed.barrier()


@contextmanager
def torchrun_ranks() -> Iterator[Ranks]:
    """The processes of ``torchrun``; outside of it, this one alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks()
        return
    distributed.init_process_group("gloo", timeout=LONGEST_STAGE)
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """On CUDA, the GPU of this process among those of its machine."""
    if device.type != "cuda":
        return device
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
