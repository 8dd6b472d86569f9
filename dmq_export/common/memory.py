"""What this process has taken, and what it may take."""

import re
import resource
import sys
from pathlib import Path

from dmq_export.errors import DmqError


def peak_memory(*, of_children: bool = False) -> int:
    """The most memory this process has held so far, in bytes; or the largest of its finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if of_children else resource.RUSAGE_SELF)
    return usage.ru_maxrss if sys.platform == "darwin" else usage.ru_maxrss * 1024  # macOS counts bytes, Linux KiB


def peak_gpu_memory() -> int | None:
    """The most that PyTorch has held on a GPU so far, in bytes; None where it has not been there."""
    torch = sys.modules.get("torch")  # not imported for this
    if torch is None or not torch.cuda.is_initialized():
        return None
    return max(int(torch.cuda.max_memory_allocated(gpu)) for gpu in range(torch.cuda.device_count()))


def peaks() -> dict[str, int]:
    """The most memory of this process so far, and on a GPU if it has been there, as JSON values."""
    on_gpu = peak_gpu_memory()
    return {"peak_memory_bytes": peak_memory()} | ({} if on_gpu is None else {"peak_gpu_memory_bytes": on_gpu})


def current_memory() -> int:
    """The memory this process holds now, in bytes; where the system does not say, the most it has held."""
    return _kilobytes(Path("/proc/self/status"), "VmRSS:") or peak_memory()


def available_memory() -> int | None:
    """What the machine can still give without swapping, in bytes; None where the system does not say."""
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _kilobytes(path: Path, field: str) -> int | None:
    if not path.is_file():
        return None
    for line in path.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return None


def parse_size(text: str) -> int:
    """Bytes of ``8GB``, ``1.5GiB`` or ``800M``; a plain number is bytes, and every unit is a power of 1024.

    Raises:
        DmqError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", text.strip(), re.IGNORECASE)
    if not match or not float(match[1]):
        raise DmqError(f"{text!r} is no size: write 800M, 8GB or 1.5GiB")
    return int(float(match[1]) * 1024 ** " KMGT".index(match[2].upper() or " "))


def in_words(size: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.1f} {unit}" if size < 100 and unit != "B" else f"{size:.0f} {unit}"
