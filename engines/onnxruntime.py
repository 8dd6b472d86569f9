"""ONNX Runtime as an engine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import DmqError
from engines.denoiser import GraphDenoiser
from engines.inputs import Input, checked_inputs, first_line
from engines.providers import PROVIDERS, require_provider, start_session

NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}


class OnnxSession:
    """An ONNX model loaded into ONNX Runtime, inputs checked by name and shape.

    Args:
        model: a file, or a serialized model.
        provider: a name of :data:`engines.providers.PROVIDERS`; operators that it lacks run on the CPU.
        threads: for one operator; None for as many as there are cores.

    Raises:
        DmqError: ONNX Runtime cannot load the model, or cannot start the provider.
    """

    def __init__(self, model: Path | bytes, provider: str = "cpu", *, threads: int | None = None) -> None:
        if provider != "cpu":
            require_provider(provider)
        name = "the model" if isinstance(model, bytes) else str(model)
        try:
            self._session = start_session(model, provider, threads)
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            raise DmqError(f"ONNX Runtime cannot load {name}: {first_line(error)}") from error
        if PROVIDERS[provider] not in self._session.get_providers():
            raise DmqError(f"ONNX Runtime cannot run {name} on its {provider} provider: try --provider cpu")
        self.inputs = {
            value.name: Input(NUMPY_TYPES.get(value.type), value.shape) for value in self._session.get_inputs()
        }
        self.output_names = [value.name for value in self._session.get_outputs()]

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata properties."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name.

        Raises:
            DmqError: an input is missing, unknown, or of another shape.
        """
        outputs = self._session.run(None, checked_inputs(self.inputs, inputs))
        return dict(zip(self.output_names, outputs, strict=True))


class OnnxRuntimeDenoiser(GraphDenoiser):
    """An ONNX file in ONNX Runtime."""

    def __init__(self, path: Path, provider: str = "cpu", *, threads: int | None = None) -> None:
        self.session = OnnxSession(path, provider, threads=threads)
        super().__init__(self.session)
