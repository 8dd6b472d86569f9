"""Hooks on a network's modules that are there while a block runs, and gone afterwards whatever happened in it."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch.utils.hooks import RemovableHandle


@contextmanager
def hooked(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """The block runs with the hooks that ``handles`` are of."""
    held: list[RemovableHandle] = []
    try:
        held.extend(handles)
        yield
    finally:
        for handle in held:
            handle.remove()
