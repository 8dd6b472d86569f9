"""The device a calibration runs on: which it is, that it gives the same bytes every time, and its memory."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from dmq_export.common.memory import available_memory, current_memory, in_words, peak_memory
from dmq_export.errors import DmqError

FLOAT_BYTES = torch.float32.itemsize
CUBLAS_CONFIG = ("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS may add in another order every time


def processes_here() -> int:
    """Processes of torchrun that share this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def own_gpu() -> torch.device:
    """The GPU of this process among those of its machine; processes beyond their number share them."""
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())


def device_name(device: torch.device) -> str:
    """``cpu``, or the name of the GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@contextmanager
def reproducible(device: torch.device, memory: int | None = None) -> Iterator[None]:
    """While the block runs, CUDA gives the same bytes every time, within ``memory`` bytes if there is such a limit.

    There, ``cuda`` without a number is this process's own GPU.

    Raises:
        DmqError: the GPU's memory runs out.
    """
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault(*CUBLAS_CONFIG)
    gpu = own_gpu()
    filling: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # nothing here reads such memory, and filling it takes time
    if memory is not None:
        torch.cuda.set_per_process_memory_fraction(min(1.0, memory / _total(gpu)), gpu)
    try:
        with torch.cuda.device(gpu):
            yield
    except torch.OutOfMemoryError as error:
        raise DmqError(
            f"the memory of {gpu} ran out, {in_words(memory_held(gpu))} of it held here: free some, or pass "
            "--fresh and less --max-memory, which makes smaller steps"
        ) from error
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]
        torch.cuda.set_per_process_memory_fraction(1.0, gpu)


def _total(device: torch.device) -> int:
    size: int = torch.cuda.get_device_properties(device).total_memory
    return size


@contextmanager
def evaluating(device: torch.device) -> Iterator[None]:
    """While the block runs the network or blocks of it, products on CUDA take TF32, as convolutions do anyway.

    Its error is some thousandth: far below that of any quantizer, and the float model that a calibration is compared
    with makes it too. Layers that are fitted on their own take full precision.
    """
    if device.type != "cuda":
        yield
        return
    products: Any = torch.backends.cuda.matmul
    before, products.fp32_precision = products.fp32_precision, "tf32"
    try:
        yield
    finally:
        products.fp32_precision = before


def memory_held(device: torch.device) -> int:
    """Bytes that this process holds of a GPU, or of the main memory."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else current_memory()


def most_memory_held(device: torch.device) -> int:
    """The most it has held so far."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else peak_memory()


def memory_for_us(device: torch.device) -> float:
    """Bytes that this process holds or can get, if all of its machine that share the device get as many."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        sharing = -(-processes_here() // torch.cuda.device_count())
        return torch.cuda.memory_reserved(device) + free / sharing
    available = available_memory()
    return float("inf") if available is None else current_memory() + available / processes_here()
