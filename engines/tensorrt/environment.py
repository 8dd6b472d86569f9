"""What TensorRT and TensorRT-RTX need on this machine to build and to run plans, and what of it is missing."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from dmq_export.common.extras import install
from dmq_export.errors import DmqError
from engines.nvidia_driver import driver_problem
from engines.problem import Problem
from engines.tensorrt.plan_file import RUNTIME_NAMES, Machine, Runtime, this_platform
from engines.tensorrt.runtime import MODULES, bindings

Need = tuple[str, str, tuple[int, ...]]  # distribution, the module it brings, the oldest version
POLYGRAPHY: Need = ("polygraphy", "polygraphy", (0, 53))
CUDA: Need = ("cuda-bindings", "cuda", (12, 8))
RUNTIMES: dict[Runtime, Need] = {
    "tensorrt": ("tensorrt", "tensorrt", (10, 9)),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt_rtx", (1, 7)),
}
TO_BUILD: dict[Runtime, tuple[Need, ...]] = {"tensorrt": (POLYGRAPHY, CUDA), "tensorrt-rtx": (POLYGRAPHY,)}


def missing(runtime: Runtime = "tensorrt") -> list[Problem]:
    """What is missing to build plans here; TensorRT needs a GPU for it, TensorRT-RTX none."""
    return _packages(runtime, TO_BUILD[runtime]) + (_gpu(runtime) if runtime == "tensorrt" else [])


def missing_to_run(runtime: Runtime) -> list[Problem]:
    """What is missing to run plans here."""
    return _packages(runtime, (CUDA,)) + _gpu(runtime)


def require_tensorrt() -> Machine:
    """This machine, which can build and run plans of TensorRT.

    Raises:
        DmqError: it cannot; the message says what is missing and how to get it.
    """
    return _machine("tensorrt", missing(), "work")


def require_runtime(runtime: Runtime) -> Machine:
    """This machine, which can run plans of ``runtime``; its GPU is the current device afterwards.

    Raises:
        DmqError: as :func:`require_tensorrt`.
    """
    return _machine(runtime, missing_to_run(runtime), "run")


def supported_capabilities() -> tuple[str, ...]:
    """Compute capabilities of the GPUs that the installed TensorRT-RTX is for, such as ``8.9``, ascending."""
    import tensorrt_rtx as rtx

    names = [name.removeprefix("SM") for name in rtx.ComputeCapability.__members__ if name.startswith("SM")]
    return tuple(f"{name[:-1]}.{name[-1]}" for name in sorted(names, key=int))


def _machine(runtime: Runtime, problems: list[Problem], what: str) -> Machine:
    if problems:
        title = RUNTIME_NAMES[runtime]
        raise DmqError(f"{title} cannot {what} here: {'; '.join(problem.text() for problem in problems)}")
    from engines.tensorrt.cuda import gpu

    name, capability = gpu()
    return Machine(runtime, bindings(runtime).__version__, this_platform(), name, capability)


def _packages(runtime: Runtime, others: tuple[Need, ...]) -> list[Problem]:
    problems = [problem for need in (RUNTIMES[runtime], *others) if (problem := _package_problem(*need))]
    return [Problem(", ".join(problems), install(MODULES[runtime]))] if problems else []


def _package_problem(distribution: str, module: str, oldest: tuple[int, ...]) -> str | None:
    wanted = ".".join(map(str, oldest))
    found = package_version(distribution)
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


def package_version(distribution: str) -> str | None:
    """The installed version; NVIDIA's packages also come by CUDA version."""
    for name in (distribution, f"{distribution}-cu13", f"{distribution}-cu12"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def _gpu(runtime: Runtime) -> list[Problem]:
    if (no_driver := driver_problem()) is not None:
        return [no_driver]
    try:
        from engines.tensorrt.cuda import gpu

        name, capability = gpu()
    except ImportError:
        return []  # already said: cuda-bindings is missing
    except DmqError as error:
        return [Problem(f"no usable NVIDIA GPU ({error})", "see what nvidia-smi says")]
    return _capability(name, capability) if runtime == "tensorrt-rtx" else []


def _capability(gpu: str, capability: str) -> list[Problem]:
    """Whether TensorRT-RTX is for this GPU; nothing where it is not installed, which is said already."""
    try:
        supported = supported_capabilities()
    except ImportError:
        return []
    if capability in supported:
        return []
    what = f"{gpu} has compute capability {capability}, TensorRT-RTX is for {', '.join(supported)}"
    return [Problem(what, "use another GPU, or TensorRT (trt-build --runtime tensorrt)")]
