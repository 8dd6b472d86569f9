"""OpenVINO as an engine, on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import DmqError
from engines.denoiser import GraphDenoiser
from engines.inputs import Input, checked_inputs, first_line

Precision = Literal["f32", "bf16", "f16"]
Hint = Literal["LATENCY", "THROUGHPUT"]
FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32"}  # of what is not quantized


class OpenVinoSession:
    """An ONNX model compiled by OpenVINO, with the contract of :class:`engines.onnxruntime.OnnxSession`.

    Args:
        model: a file, or a serialized model.
        settings: OpenVINO's own.

    Attributes:
        compiled: OpenVINO's compiled model.
        inputs: by name.

    Raises:
        DmqError: OpenVINO cannot load the model.
    """

    def __init__(self, model: Path | bytes, settings: Mapping[str, Any] = FLOAT32) -> None:
        import openvino

        try:
            core = openvino.Core()
            network = core.read_model(BytesIO(model) if isinstance(model, bytes) else str(model))
            self.compiled = core.compile_model(network, "CPU", dict(settings))
        except RuntimeError as error:
            name = "the model" if isinstance(model, bytes) else str(model)
            reason = " ".join(str(error).split()) or first_line(error)
            raise DmqError(f"OpenVINO cannot load {name}: {reason[:300]}") from error
        self.inputs = {
            value.any_name: Input(value.element_type.to_dtype(), _sizes(value.partial_shape))
            for value in self.compiled.inputs
        }
        self._request = self.compiled.create_infer_request()

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name.

        Raises:
            DmqError: an input is missing, unknown, or of another shape.
        """
        answers = self._request.infer(checked_inputs(self.inputs, inputs), share_inputs=True)
        # values that are the same share one output under all their names
        return {name: np.asarray(answers[port]) for port in self.compiled.outputs for name in port.names}


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


def _sizes(shape: Any) -> list[int | str]:
    return [size.get_length() if size.is_static else "any" for size in shape]
