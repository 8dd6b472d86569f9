"""Which share of the work is this process's, as torchrun and accelerate tell it through the environment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from dmq_export.errors import DmqError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Rank:
    """Process ``index`` of ``count``."""

    index: int = 0
    count: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Rank":
        """From ``RANK`` and ``WORLD_SIZE``; without them the only process.

        Raises:
            DmqError: they are no numbers, only one is set, or they contradict each other.
        """
        texts = [environment.get(name) for name in ("RANK", "WORLD_SIZE")]
        if texts == [None, None]:
            return cls()
        numbers = [int(text) if text and text.isdigit() else -1 for text in texts]
        if not 0 <= numbers[0] < numbers[1]:
            raise DmqError(
                f"the environment says RANK={texts[0]} and WORLD_SIZE={texts[1]}: 0 to WORLD_SIZE - 1 is allowed; "
                "start through torchrun or accelerate launch, or unset both"
            )
        return cls(*numbers)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """Every ``count``-th item, from the ``index``-th on."""
        return items[self.index :: self.count]
