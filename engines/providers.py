"""ONNX Runtime's execution providers: which there are, which start on this machine, and a session on one of them.

Some are part of ONNX Runtime's own build. Others are plugins: packages of their own, whose library is registered with
ONNX Runtime once per process and whose devices are then named to each session.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dmq_export.common.bundled import BUNDLED
from dmq_export.common.extras import install
from dmq_export.errors import DmqError
from engines.inputs import first_line
from engines.nvidia_driver import driver_problem
from engines.problem import Problem

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "tensorrt-rtx": "NvTensorRTRTXExecutionProvider",
}
PLUGINS = {"tensorrt-rtx": "onnxruntime_ep_nv_tensorrt_rtx"}  # provider -> the module that knows where its library is
REMEDIES = {
    "cpu": "pip install --force-reinstall onnxruntime-gpu",
    "cuda": "on a machine with an NVIDIA GPU: pip install 'onnxruntime-gpu[cuda,cudnn]'",
    "tensorrt": "on a machine with an NVIDIA GPU: pip install 'onnxruntime-gpu[cuda,cudnn]' tensorrt",
    "tensorrt-rtx": f"on a machine with an RTX GPU: {install('onnxruntime_ep_nv_tensorrt_rtx')}",
}
PROBE = BUNDLED / "digits" / "classifier.onnx"  # small enough to try a provider on
FATAL = 4  # the least that ONNX Runtime can log; what goes wrong arrives as an exception


def require_provider(provider: str) -> None:
    """Refuse a provider that does not start on this machine.

    Raises:
        DmqError: naming those that do.
    """
    if provider not in PROVIDERS:
        raise DmqError(f"ONNX Runtime has no provider {provider}: {', '.join(PROVIDERS)} are known")
    problem = provider_problem(provider)
    if problem is not None:
        there = ", ".join(name for name in PROVIDERS if provider_problem(name) is None)
        raise DmqError(
            f"ONNX Runtime has no provider {provider} here ({problem.what}): {there} can be used; otherwise "
            f"{problem.remedy}"
        )


def provider_problem(provider: str) -> Problem | None:
    """Why a provider of :data:`PROVIDERS` does not start on this machine, or None if it does."""
    if provider in PLUGINS and find_spec(PLUGINS[provider]) is not None and (no_driver := driver_problem()) is not None:
        return no_driver
    reason = _plugin_reason(provider) if provider in PLUGINS else _built_in_reason(provider)
    return None if reason is None else Problem(reason, REMEDIES[provider])


def start_session(model: Path | bytes, provider: str, threads: int | None) -> Any:
    """An ``onnxruntime.InferenceSession`` on ``provider``; whatever ONNX Runtime raises comes through.

    Args:
        model: a file, or a serialized model.
        provider: a name of :data:`PROVIDERS`; operators that it lacks run on the CPU.
        threads: for one operator; None for as many as there are cores.
    """
    import onnxruntime

    onnxruntime.set_default_logger_severity(FATAL)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = FATAL
    if threads is not None:
        options.intra_op_num_threads = threads
    source = model if isinstance(model, bytes) else str(model)
    if provider in PLUGINS:
        devices = plugin_devices(provider)
        options.add_provider_for_devices([devices[_local_rank() % len(devices)]], {})
        return onnxruntime.InferenceSession(source, options, enable_fallback=0)
    settings = {} if provider == "cpu" else {"device_id": str(_local_rank())}
    return onnxruntime.InferenceSession(source, options, providers=[(PROVIDERS[provider], settings)], enable_fallback=0)


@cache
def plugin_devices(provider: str) -> tuple[Any, ...]:
    """The devices that a plugin finds; registers its library, which may be done once per process.

    Raises:
        Exception: ONNX Runtime's own, where the library does not load.
    """
    import onnxruntime

    plugin = import_module(PLUGINS[provider])
    onnxruntime.register_execution_provider_library(plugin.get_ep_name(), plugin.get_library_path())
    return tuple(one for one in onnxruntime.get_ep_devices() if one.ep_name == plugin.get_ep_name())


def _local_rank() -> int:
    """The number that torchrun gave this process on its machine, and with it the GPU."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def _plugin_reason(provider: str) -> str | None:
    import onnxruntime

    module = PLUGINS[provider]
    if find_spec(module) is None:
        return f"{module.replace('_', '-')} is not installed"
    if not hasattr(onnxruntime, "get_ep_devices"):
        return f"onnxruntime {onnxruntime.__version__} takes no plugins"
    try:
        devices = plugin_devices(provider)
        started = bool(devices) and PROVIDERS[provider] in start_session(PROBE, provider, None).get_providers()
    except Exception as error:  # onnxruntime's exceptions have no common base but Exception
        return first_line(error).rpartition("with error: ")[2]  # what the loader says, without the path
    return None if started else "it finds no GPU that it can use"


def _built_in_reason(provider: str) -> str | None:
    import onnxruntime

    if PROVIDERS[provider] not in onnxruntime.get_available_providers():
        return "this build of onnxruntime lacks it"
    try:
        started = PROVIDERS[provider] in start_session(PROBE, provider, None).get_providers()
    except Exception:  # onnxruntime's exceptions have no common base but Exception
        started = False
    return None if started else _missing_library(provider) or "it finds no GPU that it can use"


def _missing_library(provider: str) -> str | None:
    """What the loader says of the provider; a session does not say which library is missing."""
    import onnxruntime

    try:
        ctypes.CDLL(str(Path(onnxruntime.__file__).parent / "capi" / f"libonnxruntime_providers_{provider}.so"))
    except OSError as error:
        return str(error)
    return None
