"""Several processes that share one calibration, as ``torchrun`` starts them.

Each takes its share of the items of a stage, and all wait for each other at the stage's end. Results travel through the
work folder, which all must see; only barriers and the leader's plan are exchanged, over gloo whatever the device is.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

from torch import distributed

from dmq_export.common.distributed import Rank
from dmq_export.errors import DmqError

T = TypeVar("T")
LONGEST_STAGE = timedelta(days=7)  # torchrun ends the others when one process fails; waiting is no failure


@dataclass(frozen=True)
class ProcessGroup(Rank):
    """This process among those that share the calibration."""

    @property
    def leads(self) -> bool:
        """Whether this process writes what is written once."""
        return self.index == 0

    def wait(self) -> None:
        """Until every process has come here.

        Raises:
            DmqError: one of them has ended.
        """
        if self.count > 1:
            with _others_there():
                distributed.barrier()

    def agree(self, choose: Callable[[], T]) -> T:
        """What the leader chooses, in every process.

        Raises:
            DmqError: the leader has ended.
        """
        chosen = [choose() if self.leads else None]
        if self.count > 1:
            with _others_there():
                distributed.broadcast_object_list(chosen)
        return cast("T", chosen[0])


@contextmanager
def _others_there() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # gloo's, of a connection that is gone
        raise DmqError("another process of this calibration has ended: its own message says why") from error


@contextmanager
def process_group() -> Iterator[ProcessGroup]:
    """The processes of ``torchrun``; outside of it, this one alone.

    Raises:
        DmqError: the environment contradicts itself, or the processes do not find each other.
    """
    own = Rank.of(os.environ)
    if own.count > 1:
        try:
            distributed.init_process_group("gloo", timeout=LONGEST_STAGE)
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise DmqError(f"the processes do not find each other ({reason}): start them with torchrun") from error
    try:
        yield ProcessGroup(own.index, own.count)
    finally:
        if own.count > 1:
            distributed.destroy_process_group()
