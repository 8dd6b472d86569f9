"""Whether NVIDIA's driver is here, without which its runtimes do not load or do not run."""

from __future__ import annotations

import ctypes

from engines.problem import Problem

DRIVER = "libcuda.so.1"


def driver_problem() -> Problem | None:
    """None where the driver loads."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return Problem(f"no NVIDIA driver ({DRIVER})", "use a machine with an NVIDIA GPU and its driver")
    return None
