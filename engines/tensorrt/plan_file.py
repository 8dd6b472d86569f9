"""A plan of TensorRT or TensorRT-RTX, and what is known of it.

A plan is executable code: deserializing one from a stranger is running his program. Beside ``model.plan`` lies
``model.engine.json``, and a plan whose hash, runtime, version, GPU or platform is not what that file says is refused
before the runtime sees it. The hash protects against damage and mix-ups; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dmq_export.common.files import atomic_files, read_json
from dmq_export.errors import DmqError
from engines.tensorrt.profile import ShapeRange
from engines.tensorrt.summary import KernelSummary

SCHEMA = 3
Runtime = Literal["tensorrt", "tensorrt-rtx"]
RuntimeChoice = Literal["auto", "tensorrt", "tensorrt-rtx"]
RUNTIME_NAMES: dict[Runtime, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
HardwareCompatibility = Literal["none", "same-compute-capability", "ampere-plus"]
AMPERE = (8, 0)


@dataclass(frozen=True)
class Machine:
    """A runtime and what it runs on: what a plan depends on.

    Attributes:
        runtime: whose plans these are.
        version: of the runtime, such as ``10.16.1.11``.
        platform: operating system and processor.
        gpu: the device's name; None where TensorRT-RTX built without one.
        compute_capability: of that GPU, such as ``9.0``.
    """

    runtime: Runtime
    version: str
    platform: str
    gpu: str | None = None
    compute_capability: str | None = None

    @property
    def title(self) -> str:
        """``TensorRT-RTX 1.7.1.116``."""
        return f"{RUNTIME_NAMES[self.runtime]} {self.version}"


@dataclass(frozen=True)
class PlanMetadata:
    """The content of ``engine.json``.

    Attributes:
        sha256: of the plan.
        machine: it was built on.
        capabilities: compute capabilities of the GPUs that a plan of TensorRT-RTX runs on, such as ``8.9``; empty for
            TensorRT, whose plans are for the GPU of ``machine``.
        version_compatible, hardware_compatible: how far a plan of TensorRT may travel.
        stripped: whether the weights must be refitted from the ONNX file.
        onnx_sha256: of the ONNX file, and of its external data where there is some, by name.
        shapes: range of every input.
        settings: the builder's other settings.
        layers: counts of the layers of TensorRT's engine by type, see :mod:`engines.tensorrt.inspector`.
        kernels: what TensorRT-RTX's engine is made of; None for TensorRT.
        float16: the same of the graph without its quantizers, where that was asked for.
        metadata: what the ONNX file says of the model; None for files of other tools.
        versions: of the tool and its libraries.
    """

    sha256: str
    machine: Machine
    capabilities: tuple[str, ...]
    version_compatible: bool
    hardware_compatible: HardwareCompatibility
    stripped: bool
    onnx_sha256: Mapping[str, str]
    shapes: Mapping[str, ShapeRange]
    settings: Mapping[str, Any]
    layers: Mapping[str, int]
    metadata: Mapping[str, Any] | None
    versions: Mapping[str, str]
    kernels: KernelSummary | None = None
    float16: KernelSummary | None = None

    @property
    def runtime(self) -> Runtime:
        return self.machine.runtime


def metadata_path(plan: Path) -> Path:
    """``model.engine.json`` for ``model.plan``."""
    return plan.with_suffix(".engine.json")


def this_platform() -> str:
    """Operating system and processor, as :class:`Machine` states them."""
    return f"{platform.system()} {platform.machine()}"


def save_plan(content: bytes | memoryview, path: Path, metadata: PlanMetadata) -> None:
    """Write the plan and its metadata: both or neither.

    Raises:
        DmqError: the folder cannot be written, or has no room.
    """
    companion = metadata_path(path)
    text = json.dumps({"schema": SCHEMA, **asdict(metadata)}, indent=1)
    try:
        with atomic_files(path, companion.name) as scratch:
            scratch.write_bytes(content)
            scratch.with_name(companion.name).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DmqError(f"cannot write {path} ({len(content)} bytes): {error.strerror}") from error


def read_plan_metadata(path: Path) -> PlanMetadata:
    """What the file beside the plan ``path`` says.

    Raises:
        DmqError: the plan or the file is missing, of another schema, or damaged.
    """
    companion = metadata_path(path)
    if not path.is_file():
        raise DmqError(f"{path} is not a file: build a plan with dmq-export trt-build")
    if not companion.is_file():
        raise DmqError(f"{path} has no {companion.name} beside it, so nothing vouches for it: build the plan again")
    content = read_json(companion)
    if content.pop("schema", None) != SCHEMA:
        raise DmqError(f"{companion} is not of schema {SCHEMA}: build the plan again")
    try:
        return _plan_metadata(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DmqError(f"{companion} is damaged ({type(error).__name__} {error}): build the plan again") from error


def read_plan(path: Path, machine: Machine) -> tuple[bytes, PlanMetadata]:
    """The plan's bytes, once it is known that they are what was built and that ``machine`` can run them.

    Raises:
        DmqError: see :func:`read_plan_metadata`; the hash differs, or the plan was built for another machine.
    """
    metadata = read_plan_metadata(path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != metadata.sha256:
        raise DmqError(
            f"{path} has the sha256 {found[:12]}..., {metadata_path(path).name} records {metadata.sha256[:12]}...: "
            "it was changed or replaced; build the plan again"
        )
    reason = mismatch(metadata, machine)
    if reason:
        raise DmqError(f"{path} {reason}: build the plan again on this machine")
    return content, metadata


def mismatch(metadata: PlanMetadata, machine: Machine) -> str | None:
    """Why ``machine`` cannot run the plan, or None."""
    built = metadata.machine
    if built.runtime != machine.runtime:
        return f"was built with {built.title}, this is {machine.title}"
    if built.runtime == "tensorrt-rtx":
        return _rtx_mismatch(metadata, machine)
    if built.platform != machine.platform:
        return f"was built for {built.platform}, this is {machine.platform}"
    versions = _version(built.version), _version(machine.version)
    if metadata.version_compatible and versions[1] < versions[0]:
        return f"was built with {built.title}, newer than the {machine.version} here"
    if not metadata.version_compatible and built.version != machine.version:
        return f"was built with {built.title}, here is {machine.version} (--version-compatible would allow)"
    return _gpu_mismatch(metadata, machine)


def _rtx_mismatch(metadata: PlanMetadata, machine: Machine) -> str | None:
    """NVIDIA documents such plans as portable between Linux and Windows, and between the GPUs they were built for."""
    if metadata.machine.version != machine.version:
        return f"was built with {metadata.machine.title}, here is {machine.version}"
    if machine.compute_capability not in metadata.capabilities:
        return (
            f"was built for compute capability {', '.join(metadata.capabilities)}, {machine.gpu} has "
            f"{machine.compute_capability} (--compute-capability names others)"
        )
    return None


def _gpu_mismatch(metadata: PlanMetadata, machine: Machine) -> str | None:
    built = metadata.machine
    there, here = _version(built.compute_capability or ""), _version(machine.compute_capability or "")
    if metadata.hardware_compatible == "ampere-plus":
        return (
            None if here >= AMPERE else f"needs compute capability 8.0, {machine.gpu} has {machine.compute_capability}"
        )
    if there != here:
        return (
            f"was built for compute capability {built.compute_capability}, {machine.gpu} has "
            f"{machine.compute_capability}"
        )
    if metadata.hardware_compatible == "none" and built.gpu != machine.gpu:
        return f"was built for {built.gpu}, here is {machine.gpu} (--hardware-compatible would allow)"
    return None


def _version(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``10.13.3.9.post1`` to ``(10, 13, 3, 9)``."""
    numbers: list[int] = []
    for piece in text.split("."):
        if not piece.isdigit():
            break
        numbers.append(int(piece))
    return tuple(numbers)


def _plan_metadata(content: Mapping[str, Any]) -> PlanMetadata:
    fields = dict(content)
    fields["machine"] = _machine(fields["machine"])
    fields["capabilities"] = tuple(fields["capabilities"])
    fields["shapes"] = {
        name: ShapeRange(*(tuple(shape[which]) for which in ("minimum", "optimum", "maximum")))
        for name, shape in fields["shapes"].items()
    }
    for name in ("kernels", "float16"):
        fields[name] = None if fields[name] is None else KernelSummary.from_json(fields[name])
    if fields["hardware_compatible"] not in get_args(HardwareCompatibility):
        raise ValueError(f"hardware_compatible {fields['hardware_compatible']!r}")
    if not all(isinstance(text, str) for text in (fields["sha256"], *fields["capabilities"])):
        raise TypeError("the hash and the compute capabilities must be texts")
    if not all(isinstance(fields[name], bool) for name in ("version_compatible", "stripped")):
        raise TypeError("version_compatible and stripped must be true or false")
    return PlanMetadata(**fields)


def _machine(content: Mapping[str, Any]) -> Machine:
    machine = Machine(**content)
    if machine.runtime not in get_args(Runtime):
        raise ValueError(f"runtime {machine.runtime!r}")
    gpu = () if machine.runtime == "tensorrt-rtx" and machine.gpu is None else (machine.gpu, machine.compute_capability)
    if not all(isinstance(text, str) for text in (machine.version, machine.platform, *gpu)):
        raise TypeError("what describes the machine must be texts")
    return machine
