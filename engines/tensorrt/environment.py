"""What TensorRT needs on this machine, and what of it is missing."""

from __future__ import annotations

import ctypes
from importlib.metadata import PackageNotFoundError, version

from dmq_export.errors import DmqError
from dmq_export.extras import install
from engines.tensorrt.plan_file import Machine, this_platform

INSTALL = install("tensorrt")
# distribution, the module it brings, the oldest version
NEEDED = (("tensorrt", "tensorrt", (10, 9)), ("polygraphy", "polygraphy", (0, 53)), ("cuda-bindings", "cuda", (12, 8)))


def missing() -> list[str]:
    """What is missing to build and run plans here, each with how to get it; empty where nothing is."""
    packages = [problem for problem in (_package_problem(*need) for need in NEEDED) if problem]
    found = [f"{', '.join(packages)}: {INSTALL}"] if packages else []
    gpu = _gpu_problem()
    return [*found, gpu] if gpu else found


def require_tensorrt() -> Machine:
    """This machine, which can build and run plans.

    Raises:
        DmqError: it cannot; the message says what is missing and how to get it.
    """
    problems = missing()
    if problems:
        raise DmqError(f"TensorRT cannot work here: {'; '.join(problems)}")
    import tensorrt as trt

    from engines.tensorrt.cuda import gpu

    name, capability = gpu()
    return Machine("tensorrt", trt.__version__, this_platform(), name, capability)


def _package_problem(distribution: str, module: str, oldest: tuple[int, ...]) -> str | None:
    wanted = ".".join(map(str, oldest))
    found = _version(distribution)
    if found is None:
        return f"{distribution} {wanted} or later is not installed"
    numbers = tuple(int(piece) for piece in found.split(".")[:2] if piece.isdigit())
    if numbers < oldest:
        return f"{distribution} {found} is too old ({wanted} is needed)"
    try:
        __import__(module)
    except (ImportError, OSError) as error:
        return f"{distribution} {found} does not load ({str(error).splitlines()[0]})"
    return None


def _version(distribution: str) -> str | None:
    """The installed version; TensorRT's own packages also come by CUDA version."""
    for name in (distribution, f"{distribution}-cu13", f"{distribution}-cu12"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _gpu_problem() -> str | None:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1): use a machine with an NVIDIA GPU and its driver"
    try:
        from engines.tensorrt.cuda import gpu

        gpu()
    except ImportError:
        return None  # already said: cuda-bindings is missing
    except DmqError as error:
        return f"no usable NVIDIA GPU ({error}): see what nvidia-smi says"
    return None
