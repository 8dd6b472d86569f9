"""Which runtime, of which version, on which GPU a graph is checked for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from dmq_export.errors import DmqError

Runtime = Literal["tensorrt", "tensorrt-rtx"]
Version = tuple[int, ...]
NAMES: dict[Runtime, str] = {"tensorrt": "TensorRT", "tensorrt-rtx": "TensorRT-RTX"}
DEFAULT_VERSIONS: dict[Runtime, Version] = {"tensorrt": (10, 10), "tensorrt-rtx": (1, 7, 1)}
TRIED: Version = (1, 7, 1)  # of TensorRT-RTX; every rule for it was tried with this release
RTX_GPUS = (75, 80, 86, 89, 120, 121)  # that TensorRT-RTX 1.7.1 compiles for


@dataclass(frozen=True)
class LintTarget:
    """What the rules are asked about.

    Attributes:
        runtime: whose rules.
        version: its release, such as ``(1, 7, 1)``; the beginning is enough.
        gpu: compute capability as in ``sm89``; None for the GPUs that the runtime compiles for by default.
    """

    runtime: Runtime = "tensorrt-rtx"
    version: Version = TRIED
    gpu: int | None = None

    @property
    def title(self) -> str:
        """``TensorRT-RTX 1.7.1`` or ``TensorRT-RTX 1.7.1 on sm89``."""
        name = f"{NAMES[self.runtime]} {'.'.join(map(str, self.version))}"
        return name if self.gpu is None else f"{name} on sm{self.gpu}"

    @property
    def note(self) -> str | None:
        """What a user should know of the rules for this target; None where they were tried with it."""
        if self.runtime == "tensorrt":
            return f"the rules for {self.title} were read in its headers, parser and documentation, and not run"
        if self.version[:3] != TRIED:
            return (
                f"the rules were tried with TensorRT-RTX 1.7.1; of {'.'.join(map(str, self.version))} nothing is known"
            )
        return None


def lint_target(runtime: Runtime = "tensorrt-rtx", version: str | None = None, gpu: str | None = None) -> LintTarget:
    """The target as a user writes it: ``tensorrt-rtx``, ``1.7.1``, ``sm89``.

    Raises:
        DmqError: the version or the GPU is none, or TensorRT-RTX does not compile for it.
    """
    if version is not None and not re.fullmatch(r"\d+(\.\d+)*", version):
        raise DmqError(f"--runtime-version {version} is no version such as 1.7.1 or 10.13")
    chosen = DEFAULT_VERSIONS[runtime] if version is None else tuple(map(int, version.split(".")))
    return LintTarget(runtime, chosen, None if gpu is None else _gpu(runtime, gpu))


def _gpu(runtime: Runtime, text: str) -> int:
    found = re.fullmatch(r"sm_?(\d{2,3})", text.lower())
    if found is None:
        raise DmqError(f"--gpu {text} is no compute capability such as sm89")
    capability = int(found[1])
    if runtime == "tensorrt-rtx" and capability not in RTX_GPUS:
        known = ", ".join(f"sm{each}" for each in RTX_GPUS)
        raise DmqError(f"TensorRT-RTX compiles for {known}, not for sm{capability}: choose one, or --runtime tensorrt")
    return capability
