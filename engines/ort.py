"""ONNX Runtime as an engine."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.bundled import BUNDLED
from dmq_export.errors import DmqError
from engines.graph_denoiser import GraphDenoiser
from engines.inputs import Input, checked_inputs, first_line

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "tensorrt": "TensorrtExecutionProvider"}
NUMPY_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(int32)": np.int32,
    "tensor(int8)": np.int8,
    "tensor(uint8)": np.uint8,
    "tensor(bool)": np.bool_,
}
PROBE = BUNDLED / "digits" / "classifier.onnx"  # small enough to try a provider on
FATAL = 4  # the least that ONNX Runtime can log; what goes wrong arrives as an exception


class OnnxSession:
    """An ONNX model loaded into ONNX Runtime, inputs checked by name and shape.

    Args:
        model: a file, or a serialized model.
        provider: a name of :data:`PROVIDERS`; operators that it lacks run on the CPU.
        threads: for one operator; None for as many as there are cores.

    Raises:
        DmqError: ONNX Runtime cannot load the model, or cannot start the provider.
    """

    def __init__(self, model: Path | bytes, provider: str = "cpu", *, threads: int | None = None) -> None:
        if provider != "cpu":
            require_provider(provider)
        name = "the model" if isinstance(model, bytes) else str(model)
        try:
            self._session = _session(model, provider, threads)
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


def require_provider(provider: str) -> None:
    """Refuse a provider that does not start on this machine.

    Raises:
        DmqError: naming those that do.
    """
    problem = provider_problem(provider)
    if problem is not None:
        there = ", ".join(name for name in PROVIDERS if provider_problem(name) is None)
        raise DmqError(f"ONNX Runtime has no provider {provider} here ({problem}): {there} can be used")


def provider_problem(provider: str) -> str | None:
    """Why ``provider`` does not start on this machine, or None if it does."""
    if provider not in PROVIDERS:
        return "no such provider"
    import onnxruntime

    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        return "this build of onnxruntime lacks it"
    try:
        starts = PROVIDERS[provider] in _session(PROBE, provider, None).get_providers()
    except Exception:  # onnxruntime's exceptions have no common base but Exception
        starts = False
    return None if starts else _missing_library(provider) or "it finds no GPU that it can use"


def _missing_library(provider: str) -> str | None:
    """What the loader says of the provider; a session does not say which library is missing."""
    import onnxruntime

    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{provider}.so"))
    except OSError as error:
        return str(error)
    return None


def _session(model: Path | bytes, provider: str, threads: int | None) -> Any:
    import onnxruntime

    onnxruntime.set_default_logger_severity(FATAL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    # torchrun numbers the processes of one machine; each takes the GPU of its number
    settings = {} if provider == "cpu" else {"device_id": os.environ.get("LOCAL_RANK", "0")}
    source = model if isinstance(model, bytes) else str(model)
    providers = [(PROVIDERS[provider], settings)]
    return onnxruntime.InferenceSession(source, options, providers=providers, enable_fallback=0)
