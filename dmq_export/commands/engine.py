"""Opens whatever can be sampled under one contract: ``denoise(sample, timestep, **conditioning) -> prediction``.

Arrays are NumPy's: ``sample [N, C, H, W]`` float32, ``timestep`` one number for the batch, the conditioning
``[N, ...]`` by the network's input names.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dmq_export.checkpoint import MANIFEST, load_checkpoint
from dmq_export.common.bundled import model_folder
from dmq_export.common.extras import install
from dmq_export.denoiser.config import sample_shape
from dmq_export.errors import DmqError
from dmq_export.metadata import ExportMetadata, export_metadata, metadata_from_json, read_metadata

if TYPE_CHECKING:
    import torch

    from engines.inputs import Input
    from engines.onnxruntime import OnnxRuntimeDenoiser
    from engines.openvino import OpenVinoDenoiser

Backend = Literal["auto", "tensorrt", "tensorrt-rtx", "openvino", "onnxruntime", "torch"]
Denoise = Callable[..., NDArray[np.float32]]


@dataclass(frozen=True)
class Engine:
    """A network that can be sampled, and what must be known of it.

    Attributes:
        name: for tables and captions.
        backend: what executes it.
        denoise: the contract above.
        metadata: its model, and how it was calibrated.
        inputs: shapes ``[N, ...]`` of the conditioning by name; a size that is no number varies.
    """

    name: str
    backend: str
    denoise: Denoise
    metadata: ExportMetadata
    inputs: Mapping[str, Sequence[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Execution:
    """How to execute an engine.

    Attributes:
        backend: ``auto`` takes the one that the file was exported or built for.
        provider: of ONNX Runtime, see :data:`engines.providers.PROVIDERS`, or PyTorch's device; None for the CPU.
        threads: None leaves the number to the backend.
    """

    backend: Backend = "auto"
    provider: str | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.backend not in get_args(Backend):
            raise DmqError(f"no backend is called {self.backend!r}: one of {', '.join(get_args(Backend))} is")
        if self.threads is not None and self.threads < 1:
            raise DmqError(f"{self.threads} threads: at least 1 is needed")


def open_engine(
    path: str | Path, execution: Execution = Execution(), note: Callable[[str], None] = warnings.warn
) -> Engine:
    """A ``.plan``, an ``.onnx`` file, or a checkpoint folder (the PyTorch reference).

    Args:
        note: receives what the user should know of a plan's loading and first run; warned of by default.

    Raises:
        DmqError: ``path`` is none of them, does not suit the backend, or does not load.
    """
    path = Path(path)
    if path.is_dir() and (path / MANIFEST).is_file():
        return _open_checkpoint(path, execution)
    if path.suffix == ".onnx" and path.is_file():
        return _open_onnx(path, execution)
    if path.suffix == ".plan" and path.is_file():
        return _open_plan(path, execution, note)
    raise DmqError(f"{path} is no engine: give an .onnx file, a .plan, or a DMQ checkpoint folder")


def float_engine(model: str, like: Engine) -> Engine:
    """The float model, to be sampled as ``like`` is.

    Raises:
        ModelError: it does not load, or is another model than the engine was made from.
    """
    import torch

    from calib.model.denoiser import float_denoiser
    from calib.model.load import load_model

    size = like.metadata.recipe.get("sample_size")
    source = load_model(model_folder(model), torch.device("cpu"), sample_size=size)
    expected = sample_shape(like.metadata.config)
    if source.sample_shape != expected:
        raise DmqError(f"{model} makes samples of {source.sample_shape}, the engine of {expected}")
    return Engine("float", "torch", float_denoiser(source), like.metadata, like.inputs)


def _open_checkpoint(folder: Path, execution: Execution) -> Engine:
    _backend(folder, execution, ("torch",))
    import torch

    from calib.model.denoiser import fake_quantized_denoiser

    if execution.threads is not None:
        torch.set_num_threads(execution.threads)
    device = _torch_device(execution.provider)
    checkpoint = load_checkpoint(folder)
    metadata = metadata_from_json(export_metadata(checkpoint, "reference"))
    inputs = {name: ("batch", *value.shape[1:]) for name, value in checkpoint.probe.conditioning.items()}
    return Engine(metadata.bits, "torch", fake_quantized_denoiser(checkpoint, device), metadata, inputs)


def _torch_device(provider: str | None) -> torch.device:
    """The device called ``provider``: the CPU, or of several GPUs the one of this process's number.

    Raises:
        DmqError: there is no such device.
    """
    import torch

    there = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if provider not in (None, *there):
        raise DmqError(f"PyTorch {torch.__version__} has no provider {provider} here: {', '.join(there)} can be used")
    local = int(os.environ.get("LOCAL_RANK", "0"))  # as torchrun numbers the processes of a machine
    return torch.device("cuda", local) if provider == "cuda" else torch.device("cpu")


def _open_onnx(path: Path, execution: Execution) -> Engine:
    from dmq_export.graph.onnx_metadata import onnx_metadata

    metadata = read_metadata(onnx_metadata(path), path)
    made_for_openvino = metadata.target == "openvino"
    able: tuple[Backend, ...] = ("openvino", "onnxruntime") if made_for_openvino else ("onnxruntime", "openvino")
    backend = _backend(path, execution, able)
    denoiser = _onnx_denoiser(path, backend, execution)
    return Engine(metadata.bits, backend, denoiser, metadata, _conditioning(denoiser.inputs))


def _conditioning(inputs: Mapping[str, Input]) -> dict[str, Sequence[Any]]:
    return {name: one.shape for name, one in inputs.items() if name not in ("sample", "timestep")}


def _onnx_denoiser(path: Path, backend: Backend, execution: Execution) -> OpenVinoDenoiser | OnnxRuntimeDenoiser:
    if backend == "openvino":
        from engines.openvino import OpenVinoDenoiser

        return OpenVinoDenoiser(path, threads=execution.threads)
    from engines.onnxruntime import OnnxRuntimeDenoiser

    return OnnxRuntimeDenoiser(path, execution.provider or "cpu", threads=execution.threads)


def _open_plan(path: Path, execution: Execution, note: Callable[[str], None]) -> Engine:
    from engines.tensorrt.engine import TensorRtDenoiser
    from engines.tensorrt.plan_file import RUNTIME_NAMES, read_plan_metadata

    _require_able(path, execution, tuple(RUNTIME_NAMES))
    runtime = read_plan_metadata(path).runtime
    _require_able(path, execution, (runtime,))
    _require_provider(path, execution, runtime)
    denoiser = TensorRtDenoiser(path, note=note)
    if denoiser.metadata.metadata is None:
        raise DmqError(f"{path} was built from an ONNX file of another tool: its metadata lacks what sampling needs")
    metadata = metadata_from_json(denoiser.metadata.metadata)
    return Engine(metadata.bits, runtime, denoiser, metadata, _conditioning(denoiser.inputs))


def _backend(path: Path, execution: Execution, able: tuple[Backend, ...]) -> Backend:
    """The backend asked for; for ``auto`` the first of ``able`` that is installed.

    Raises:
        DmqError: the one asked for does not run ``path``, is not installed, or has no providers though one is named.
    """
    _require_able(path, execution, able)
    installed = [backend for backend in able if find_spec(backend)]
    backend = (installed or able)[0] if execution.backend == "auto" else execution.backend
    if backend not in installed:
        raise DmqError(f"{path} runs on {backend}, which is not installed: {install(backend)}")
    _require_provider(path, execution, backend)
    return backend


def _require_able(path: Path, execution: Execution, able: tuple[Backend, ...]) -> None:
    if execution.backend not in ("auto", *able):
        raise DmqError(f"{path} runs on {' or '.join(able)}, not on {execution.backend}")


def _require_provider(path: Path, execution: Execution, backend: Backend) -> None:
    if execution.provider is not None and backend not in ("onnxruntime", "torch"):
        raise DmqError(f"--provider {execution.provider} was asked for, but {path} runs on {backend}, which has none")
