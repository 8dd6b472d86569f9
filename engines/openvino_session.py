"""An ONNX model in OpenVINO, on the CPU, with the contract of :class:`engines.ort.OnnxSession`."""

from __future__ import annotations

from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import DmqError
from engines.inputs import Input, checked_inputs, first_line


class OpenVinoSession:
    """An ONNX model compiled by OpenVINO; what is not quantized is computed in float32.

    Args:
        model: a file, or a serialized model.

    Raises:
        DmqError: OpenVINO cannot load the model.
    """

    def __init__(self, model: Path | bytes) -> None:
        import openvino

        name = "the model" if isinstance(model, bytes) else str(model)
        try:
            core = openvino.Core()
            network = core.read_model(BytesIO(model) if isinstance(model, bytes) else str(model))
            self._compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except RuntimeError as error:
            raise DmqError(f"OpenVINO cannot load {name}: {first_line(error)}") from error
        self._inputs = {
            value.any_name: Input(
                value.element_type.to_dtype(),
                [size.get_length() if size.is_static else "any" for size in value.partial_shape],
            )
            for value in self._compiled.inputs
        }

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name.

        Raises:
            DmqError: an input is missing, unknown, or of another shape.
        """
        answers = self._compiled(checked_inputs(self._inputs, inputs))
        # values that are the same share one output under all their names
        return {name: np.array(answers[port]) for port in self._compiled.outputs for name in port.names}
