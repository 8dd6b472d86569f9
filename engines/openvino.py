"""OpenVINO as an engine, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from engines.graph_denoiser import GraphDenoiser
from engines.openvino_session import OpenVinoSession

Precision = Literal["f32", "bf16", "f16"]
Hint = Literal["LATENCY", "THROUGHPUT"]


class OpenVinoDenoiser(GraphDenoiser):
    """An ONNX file in OpenVINO.

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
        session = OpenVinoSession(path, settings)
        self.compiled = session.compiled
        super().__init__(session)
