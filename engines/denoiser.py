"""A loaded graph as a denoiser, whatever runtime executes it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engines.batching import run_batched
from engines.inputs import Input, batch_sizes


class Session(Protocol):
    """A graph in a runtime."""

    @property
    def inputs(self) -> Mapping[str, Input]:
        """By name."""

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name."""


class GraphDenoiser:
    """Runs an exported network: ``denoise(sample, timestep, **conditioning) -> prediction``, NumPy arrays.

    A batch that a graph of fixed batch does not take is padded, or cut into several.
    """

    def __init__(self, session: Session) -> None:
        self.inputs = session.inputs
        self._run = session.run
        self._sizes = batch_sizes(self.inputs)

    def __call__(
        self, sample: NDArray[np.float32], timestep: float, **conditioning: NDArray[Any]
    ) -> NDArray[np.float32]:
        inputs = {"sample": sample, "timestep": np.array(timestep, np.float32), **conditioning}
        return run_batched(self._predict, inputs, self._sizes)

    def _predict(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        prediction = next(iter(self._run(inputs).values()))
        return prediction.astype(np.float32, copy=False)  # a graph may compute in float16
