"""Repeats a chain of small operations without starting each of them anew: as a CUDA graph, where there is a GPU."""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # calls before the recording, in which libraries allocate what they need


class CudaGraph:
    """``function``, of tensors of always the same shapes, without a result: it changes tensors in place.

    On CUDA the first calls run as they are, then one is recorded, and it and all that follow are replayed. So the
    function must not look at a value, and what it makes of anything but its arguments is the same in every call.
    """

    def __init__(self, function: Callable[..., None], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._calls = 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> None:
        self._calls += 1
        if self._device.type != "cuda":
            self._function(*inputs)
        elif self._calls <= WARM_UP_CALLS:
            self._warm_up(inputs)
        else:
            self._replay(inputs)

    def _warm_up(self, inputs: tuple[Tensor, ...]) -> None:
        aside = _aside(self._device)  # gradients remember their stream, and a recording has one of its own
        aside.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(aside):
            self._function(*inputs)
        torch.cuda.current_stream(self._device).wait_stream(aside)

    def _replay(self, inputs: tuple[Tensor, ...]) -> None:
        if self._graph is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._function(*self._inputs)
        for own, tensor in zip(self._inputs, inputs, strict=True):
            own.copy_(tensor)
        self._graph.replay()


@cache
def _aside(device: torch.device) -> torch.cuda.Stream:
    """One stream for all warm-ups: cuBLAS keeps a workspace of 32 MiB for every stream that it was ever used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
