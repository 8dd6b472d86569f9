"""ONNX Runtime as an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.errors import DmqError

NUMPY_TYPES: dict[str, type[np.generic]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
}


class OnnxSession:
    """An ONNX model loaded into ONNX Runtime, inputs checked by name and rank.

    Args:
        model: a file, or a serialized model.
        providers: execution providers in order of preference.

    Raises:
        DmqError: ONNX Runtime cannot load the model.
    """

    def __init__(self, model: Path | bytes, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors only: its warnings are not for our users
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=list(providers))
        except Exception as error:  # onnxruntime's exceptions have no common base but Exception
            name = "the model" if isinstance(model, bytes) else str(model)
            raise DmqError(f"ONNX Runtime cannot load {name}: {_first_line(error)}") from error
        self._inputs = {value.name: value for value in self._session.get_inputs()}
        self.output_names = [value.name for value in self._session.get_outputs()]

    @property
    def metadata(self) -> dict[str, str]:
        """The model's metadata properties."""
        return dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """All outputs by name.

        Raises:
            DmqError: an input is missing, unknown, or of the wrong rank.
        """
        feed = {name: self._checked(name, inputs) for name in self._inputs}
        unknown = sorted(set(inputs) - set(feed))
        if unknown:
            raise DmqError(f"the model has no input {unknown[0]!r}: it takes {', '.join(feed)}")
        return dict(zip(self.output_names, self._session.run(None, feed), strict=True))

    def _checked(self, name: str, inputs: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
        expected = self._inputs[name]
        if name not in inputs:
            raise DmqError(f"input {name} is missing: the model takes {', '.join(self._inputs)}")
        value = np.asarray(inputs[name], NUMPY_TYPES.get(expected.type), order="C")
        if value.ndim != len(expected.shape):
            raise DmqError(f"input {name} has shape {list(value.shape)}, the model takes {expected.shape}")
        return value


class OnnxRuntimeDenoiser:
    """Runs an exported network: ``denoise(sample, timestep, **conditioning) -> prediction``, NumPy arrays."""

    name = "onnxruntime"

    def __init__(self, path: Path, providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        self.session = OnnxSession(path, providers)

    def __call__(
        self, sample: NDArray[np.float32], timestep: float, **conditioning: NDArray[Any]
    ) -> NDArray[np.float32]:
        inputs = {"sample": sample, "timestep": np.array(timestep, np.float32), **conditioning}
        prediction: NDArray[np.float32] = self.session.run(inputs)[self.session.output_names[0]]
        return prediction


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
