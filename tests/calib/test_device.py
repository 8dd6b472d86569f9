"""Which device, and how it is asked to behave; what only a GPU can show is in test_cuda.py."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import calib.device
from calib.device import (
    device_name,
    evaluating,
    memory_for_us,
    memory_held,
    most_memory_held,
    own_gpu,
    processes_here,
    reproducible,
)
from dmq_export.errors import DmqError

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30


@pytest.mark.parametrize(("rank", "gpu"), [("0", 0), ("3", 3), ("5", 1)])
def test_processes_take_the_gpus_in_turn(rank: str, gpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", rank)
    assert own_gpu() == torch.device("cuda", gpu)


def test_processes_that_share_a_device_share_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU's numbers are made up: there is none."""
    monkeypatch.setattr(calib.device, "current_memory", lambda: GIB)
    monkeypatch.setattr(calib.device, "available_memory", lambda: 6 * GIB)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (12 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 2 * GIB)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert processes_here() == 1
    assert (memory_for_us(CPU), memory_for_us(CUDA)) == (7 * GIB, 14 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # two of them on one GPU
    assert (memory_for_us(CPU), memory_for_us(CUDA)) == (3 * GIB, 8 * GIB)
    monkeypatch.setattr(calib.device, "available_memory", lambda: None)
    assert memory_for_us(CPU) == float("inf")


def test_on_the_cpu_memory_is_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calib.device, "current_memory", lambda: GIB)
    monkeypatch.setattr(calib.device, "peak_memory", lambda: 2 * GIB)
    assert (memory_held(CPU), most_memory_held(CPU)) == (GIB, 2 * GIB)
    assert device_name(CPU) == "cpu"


class Gpus:
    """Four of them, made up; the calls that need a GPU's number insist on it, as PyTorch does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
        self.current: list[torch.device] = []
        self.fractions: list[float] = []
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
        monkeypatch.setattr(torch.cuda, "device", self.use)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.set_fraction)
        monkeypatch.setattr(calib.device, "_total", lambda device: 80 * GIB)
        monkeypatch.setattr(calib.device, "memory_held", lambda device: 3 * GIB)

    @contextmanager
    def use(self, device: torch.device) -> Iterator[None]:
        self.current.append(device)
        yield
        self.current.pop()

    def set_fraction(self, fraction: float, device: torch.device) -> None:
        if device.index is None:
            raise ValueError("Expected a torch.device with a specified index")
        self.fractions.append(fraction)


def test_settings_hold_while_the_block_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus, products = Gpus(monkeypatch, rank=2), torch.backends.cuda.matmul
    before = products.fp32_precision
    with reproducible(CUDA, 20 * GIB):
        assert gpus.current == [torch.device("cuda", 2)]
        assert torch.are_deterministic_algorithms_enabled()
        with evaluating(CUDA):
            assert products.fp32_precision == "tf32"
        assert products.fp32_precision == before != "tf32"
    assert not torch.are_deterministic_algorithms_enabled()
    assert gpus.fractions == [0.25, 1.0]
    assert gpus.current == []


def test_on_the_cpu_no_setting_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = Gpus(monkeypatch, rank=0)
    with reproducible(CPU, 20 * GIB), evaluating(CPU):
        assert not torch.are_deterministic_algorithms_enabled()
        assert torch.get_float32_matmul_precision() == "highest"
        assert gpus.current == gpus.fractions == []


def test_a_gpu_without_memory_left_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Gpus(monkeypatch, rank=1)
    expected = r"the memory of cuda:1 ran out, 3.0 GiB of it held here: .* less --max-memory"
    with pytest.raises(DmqError, match=expected), reproducible(CUDA):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
