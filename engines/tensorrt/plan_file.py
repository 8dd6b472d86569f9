"""A TensorRT plan and what is known of it.

A plan is executable code: deserializing one from a stranger is running his program. Beside ``model.plan`` lies
``model.engine.json``, and a plan whose hash, TensorRT, GPU or platform is not what that file says is refused
before TensorRT sees it. The hash protects against damage and mix-ups; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from dmq_export.errors import DmqError
from dmq_export.files import atomic_files, read_json
from engines.tensorrt.profile import ShapeRange

SCHEMA = 1
HardwareCompatibility = Literal["none", "same-compute-capability", "ampere-plus"]
AMPERE = (8, 0)


@dataclass(frozen=True)
class Machine:
    """What a plan depends on.

    Attributes:
        tensorrt: version, such as ``10.16.1.11``.
        gpu: the device's name.
        compute_capability: such as ``9.0``.
        platform: operating system and processor.
    """

    tensorrt: str
    gpu: str
    compute_capability: str
    platform: str


@dataclass(frozen=True)
class PlanFacts:
    """The content of ``engine.json``.

    Attributes:
        sha256: of the plan.
        machine: it was built on.
        version_compatible, hardware_compatible: how far it may travel.
        stripped: whether the weights must be refitted from the ONNX file.
        onnx_sha256: of the ONNX file, and of its external data where there is some, by name.
        shapes: range of every input.
        settings: the builder's other settings.
        layers: counts of the engine's layers by type, see :mod:`engines.tensorrt.inspector`.
        facts: what the ONNX file says of the model; None for files of other tools.
        versions: of the tool and its libraries.
    """

    sha256: str
    machine: Machine
    version_compatible: bool
    hardware_compatible: HardwareCompatibility
    stripped: bool
    onnx_sha256: Mapping[str, str]
    shapes: Mapping[str, ShapeRange]
    settings: Mapping[str, Any]
    layers: Mapping[str, int]
    facts: Mapping[str, Any] | None
    versions: Mapping[str, str]


def facts_path(plan: Path) -> Path:
    """``model.engine.json`` for ``model.plan``."""
    return plan.with_suffix(".engine.json")


def this_platform() -> str:
    """Operating system and processor, as :class:`Machine` states them."""
    return f"{platform.system()} {platform.machine()}"


def save_plan(content: bytes | memoryview, path: Path, facts: PlanFacts) -> None:
    """Write the plan and its facts: both or neither.

    Raises:
        DmqError: the folder cannot be written.
    """
    companion = facts_path(path)
    with atomic_files(path, companion.name) as scratch:
        scratch.write_bytes(content)
        text = json.dumps({"schema": SCHEMA, **asdict(facts)}, indent=1)
        scratch.with_name(companion.name).write_text(text + "\n", encoding="utf-8")


def read_facts(path: Path) -> PlanFacts:
    """What the file beside the plan ``path`` says.

    Raises:
        DmqError: the plan or the file is missing, of another schema, or damaged.
    """
    companion = facts_path(path)
    if not path.is_file():
        raise DmqError(f"{path} is not a file: build a plan with dmq-export trt-build")
    if not companion.is_file():
        raise DmqError(f"{path} has no {companion.name} beside it, so nothing vouches for it: build the plan again")
    content = read_json(companion)
    if content.pop("schema", None) != SCHEMA:
        raise DmqError(f"{companion} is not of schema {SCHEMA}: build the plan again")
    try:
        return _facts(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DmqError(f"{companion} is damaged ({type(error).__name__} {error}): build the plan again") from error


def read_plan(path: Path, machine: Machine) -> tuple[bytes, PlanFacts]:
    """The plan's bytes, once it is known that they are what was built and that ``machine`` can run them.

    Raises:
        DmqError: see :func:`read_facts`; the hash differs, or the plan was built for another machine.
    """
    facts = read_facts(path)
    content = path.read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != facts.sha256:
        raise DmqError(
            f"{path} has the sha256 {found[:12]}..., {facts_path(path).name} records {facts.sha256[:12]}...: it was "
            "changed or replaced; build the plan again"
        )
    reason = mismatch(facts, machine)
    if reason:
        raise DmqError(f"{path} {reason}: build the plan again on this machine")
    return content, facts


def mismatch(facts: PlanFacts, machine: Machine) -> str | None:
    """Why ``machine`` cannot run the plan, or None."""
    built = facts.machine
    if built.platform != machine.platform:
        return f"was built for {built.platform}, this is {machine.platform}"
    versions = _version(built.tensorrt), _version(machine.tensorrt)
    if facts.version_compatible and versions[1] < versions[0]:
        return f"was built with TensorRT {built.tensorrt}, newer than the {machine.tensorrt} here"
    if not facts.version_compatible and built.tensorrt != machine.tensorrt:
        return (
            f"was built with TensorRT {built.tensorrt}, here is {machine.tensorrt} (--version-compatible would allow)"
        )
    return _gpu_mismatch(facts, machine)


def _gpu_mismatch(facts: PlanFacts, machine: Machine) -> str | None:
    built = facts.machine
    there, here = _version(built.compute_capability), _version(machine.compute_capability)
    if facts.hardware_compatible == "ampere-plus":
        return (
            None if here >= AMPERE else f"needs compute capability 8.0, {machine.gpu} has {machine.compute_capability}"
        )
    if there != here:
        return (
            f"was built for compute capability {built.compute_capability}, {machine.gpu} has "
            f"{machine.compute_capability}"
        )
    if facts.hardware_compatible == "none" and built.gpu != machine.gpu:
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


def _facts(content: Mapping[str, Any]) -> PlanFacts:
    fields = dict(content)
    fields["machine"] = Machine(**fields["machine"])
    fields["shapes"] = {
        name: ShapeRange(*(tuple(shape[which]) for which in ("minimum", "optimum", "maximum")))
        for name, shape in fields["shapes"].items()
    }
    if fields["hardware_compatible"] not in get_args(HardwareCompatibility):
        raise ValueError(f"hardware_compatible {fields['hardware_compatible']!r}")
    if not all(isinstance(text, str) for text in (fields["sha256"], *asdict(fields["machine"]).values())):
        raise TypeError("the hash and what describes the machine must be texts")
    if not all(isinstance(fields[name], bool) for name in ("version_compatible", "stripped")):
        raise TypeError("version_compatible and stripped must be true or false")
    return PlanFacts(**fields)
