"""OpenVINO as an engine, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engines.inputs import batch_sizes
from engines.openvino_session import OpenVinoSession
from engines.pieces import in_pieces

Precision = Literal["f32", "bf16", "f16"]
Hint = Literal["LATENCY", "THROUGHPUT"]


class OpenVinoDenoiser:
    """Runs an exported network: ``denoise(sample, timestep, **conditioning) -> prediction``, NumPy arrays.

    A batch that a graph of fixed batch does not take is padded, or cut into several.

    Args:
        path: an ONNX file.
        threads: None for as many as there are cores.
        precision: of what is not quantized. ``f32`` keeps to the arithmetic of the graph; OpenVINO's own default
            on CPUs with AMX is ``bf16``.
        hint: what OpenVINO tunes for.

    Raises:
        DmqError: OpenVINO cannot load the model.
    """

    def __init__(
        self, path: Path, *, threads: int | None = None, precision: Precision = "f32", hint: Hint = "LATENCY"
    ) -> None:
        settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": hint}
        if threads is not None:
            settings["INFERENCE_NUM_THREADS"] = threads
        self._session = OpenVinoSession(path, settings)
        self.compiled, self.inputs = self._session.compiled, self._session.inputs
        self._sizes = batch_sizes(self.inputs)

    def __call__(
        self, sample: NDArray[np.float32], timestep: float, **conditioning: NDArray[Any]
    ) -> NDArray[np.float32]:
        inputs = {"sample": sample, "timestep": np.array(timestep, np.float32), **conditioning}
        return in_pieces(self._run, inputs, self._sizes)

    def _run(self, inputs: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        (prediction,) = self._session.run(inputs).values()
        return prediction.astype(np.float32, copy=False)  # a graph may compute in float16
