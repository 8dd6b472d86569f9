"""``dmq-export doctor``: what this machine can calibrate, export, build and run, and how to get what is missing."""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from textwrap import wrap

from dmq_export import __version__
from dmq_export.common.extras import install
from dmq_export.common.table import table

INTEGER_KERNELS = ("avx2", "avx512_vnni", "avx_vnni", "amx_int8")  # CPU flags that int8 convolutions profit from
WIDTH = 100  # of a line
CUDA_TORCH = "on a machine with an NVIDIA GPU and its driver: pip install torch"


@dataclass(frozen=True)
class Finding:
    """One thing that the tool can do here, or not.

    Attributes:
        stage: of the road.
        what: it does.
        works: whether it can.
        detail: with what; or why not.
        remedy: what gets it, where it does not work.
    """

    stage: str
    what: str
    works: bool
    detail: str
    remedy: str = ""


@dataclass(frozen=True)
class Examination:
    """The result; ``machine`` by property."""

    machine: dict[str, str]
    findings: tuple[Finding, ...]

    def text(self) -> str:
        """The machine, what works, and how to get the rest; no line is longer than :data:`WIDTH` unless a word is."""
        about = "\n".join(f"{name:10}{value}" for name, value in self.machine.items())
        rows = [(one.stage, one.what, "yes" if one.works else "no", one.detail) for one in self.findings]
        lines = [about, "", _wrapped(("stage", "what", "here", "with, or why not"), rows)]
        missing = dict.fromkeys((one.what, one.remedy) for one in self.findings if not one.works)
        if missing:
            lines += ["", _wrapped(("to get", "do"), list(missing))]
        return "\n".join(lines)


def _wrapped(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A table whose last column goes on in further rows where it is too long."""
    taken = sum(max(len(row[column]) for row in (header, *rows)) + 2 for column in range(len(header) - 1))
    broken: list[tuple[str, ...]] = []
    for *cells, last in rows:
        pieces = wrap(last, WIDTH - taken, break_long_words=False, break_on_hyphens=False) or [""]
        broken.append((*cells, pieces[0]))
        broken += [(*("" for _ in cells), piece) for piece in pieces[1:]]
    return table(header, broken)


def examine() -> Examination:
    """Try what the tool needs: libraries are imported and runtimes started, not only looked up."""
    return Examination(_machine(), tuple(_findings()))


def _machine() -> dict[str, str]:
    flags = _cpu_flags()
    disk = shutil.disk_usage(Path.cwd())
    found = ", ".join(flag for flag in INTEGER_KERNELS if flag in flags)
    return {
        "system": f"{platform.platform()}, Python {platform.python_version()}, dmq-export {__version__}",
        "processor": f"{os.cpu_count()} cores, {found or 'none'} (of {', '.join(INTEGER_KERNELS)})",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "disk": f"{disk.free / 2**30:.0f} GiB free here",
    }


def _findings() -> Iterator[Finding]:
    yield _packages("calibrate", "on the CPU", ("torch", "diffusers", "safetensors"))
    yield _calibrate_cuda()
    yield _packages("calibrate", "prompts", ("transformers",))
    yield _packages("export", "ONNX", ("onnx", "onnx_ir", "onnxscript", "torch", "diffusers"))
    yield from _tensorrt()
    yield from _onnxruntime()
    yield _openvino()
    yield _packages("run", "checkpoints on torch", ("torch", "diffusers", "safetensors"))
    yield Finding("sample", "DDIM", True, "built in")
    yield _packages("sample", "all other schedulers", ("torch", "diffusers"))


def _packages(stage: str, what: str, names: tuple[str, ...]) -> Finding:
    problems = {name: problem for name in names if (problem := _import_problem(name)) is not None}
    if not problems:
        return Finding(stage, what, True, ", ".join(f"{name} {_version(name)}" for name in names))
    return Finding(stage, what, False, "; ".join(problems.values()), install(*problems))


def _calibrate_cuda() -> Finding:
    if _import_problem("torch") is not None:
        return Finding("calibrate", "on a GPU", False, "torch does not load", CUDA_TORCH)
    import torch

    if not torch.cuda.is_available():
        reason = "torch is built without CUDA" if torch.version.cuda is None else "torch finds no usable GPU"
        return Finding("calibrate", "on a GPU", False, reason, CUDA_TORCH)
    return Finding("calibrate", "on a GPU", True, torch.cuda.get_device_name())


def _tensorrt() -> Iterator[Finding]:
    """Building plans and running them, with either runtime."""
    from engines.tensorrt.cuda import gpu
    from engines.tensorrt.environment import missing, missing_to_run, package_version
    from engines.tensorrt.plan_file import RUNTIME_NAMES

    for stage, lacking in (("build", missing), ("run", missing_to_run)):
        for runtime, title in RUNTIME_NAMES.items():
            problems = lacking(runtime)
            what, version = f"{title} plans", f"{runtime} {package_version(runtime)}"
            if problems:
                reasons, remedies = "; ".join(one.what for one in problems), "; ".join(one.remedy for one in problems)
                yield Finding(stage, what, False, reasons, remedies)
            elif runtime == "tensorrt-rtx" and stage == "build":
                yield Finding(stage, what, True, f"{version}, which needs no GPU for it")
            else:
                yield Finding(stage, what, True, f"{version} on {gpu()[0]}")


def _onnxruntime() -> Iterator[Finding]:
    problem = _import_problem("onnxruntime")
    if problem is not None:
        yield Finding("run", "onnxruntime", False, problem, install("onnxruntime"))
        return
    from engines.providers import PROVIDERS, provider_problem

    for name in PROVIDERS:
        refusal = provider_problem(name)
        if refusal is None:
            yield Finding("run", f"onnxruntime, {name}", True, f"onnxruntime {_version('onnxruntime')}")
        else:
            yield Finding("run", f"onnxruntime, {name}", False, refusal.what, refusal.remedy)


def _openvino() -> Finding:
    problem = _import_problem("openvino")
    if problem is not None:
        return Finding("run", "openvino", False, problem, install("openvino"))
    import openvino

    core = openvino.Core()
    able = ", ".join(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))
    return Finding("run", "openvino", True, f"openvino {_version('openvino')}: {able}")


def _import_problem(name: str) -> str | None:
    """Why ``import name`` fails, or None."""
    try:
        import_module(name)
    except ModuleNotFoundError as error:
        return f"{error.name} is not installed"
    except Exception as error:  # a library that is there but broken may raise anything
        return f"{name} does not load: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
    return None


def _version(name: str) -> str:
    for distribution in (name, f"{name}-gpu", name.replace("_", "-")):
        try:
            return version(distribution)
        except PackageNotFoundError:
            continue
    return str(getattr(import_module(name), "__version__", ""))


def _cpu_flags() -> set[str]:
    """What /proc/cpuinfo lists; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(next((line for line in lines if line.startswith("flags")), "").split())
