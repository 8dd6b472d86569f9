"""Whether NVIDIA's driver is here, without which its runtimes do not load or do not run."""

from __future__ import annotations

import ctypes

DRIVER = "libcuda.so.1"


def driver_problem() -> str | None:
    """What is missing and what to do, or None where the driver loads."""
    try:
        ctypes.CDLL(DRIVER)
    except OSError:
        return f"no NVIDIA driver ({DRIVER}): use a machine with an NVIDIA GPU and its driver"
    return None
