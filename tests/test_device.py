"""Which device, and how it is asked to behave; what only a GPU can show is in test_cuda.py."""

import pytest
import torch

import calib.device
from calib.device import (
    device_name,
    evaluating,
    memory_for_us,
    memory_held,
    most_memory_held,
    own_device,
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
    assert own_device(CUDA) == torch.device("cuda", gpu)
    assert own_device(CPU) == CPU


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


@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_settings_hold_while_the_block_runs(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: fractions.append(part))
    monkeypatch.setattr(calib.device, "_total", lambda device: 80 * GIB)
    on_gpu = device.type == "cuda"
    with reproducible(device, 20 * GIB):
        assert torch.are_deterministic_algorithms_enabled() == on_gpu
        with evaluating(device):
            assert torch.get_float32_matmul_precision() == ("high" if on_gpu else "highest")
        assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.are_deterministic_algorithms_enabled()
    assert fractions == ([0.25, 1.0] if on_gpu else [])


def test_a_gpu_without_memory_left_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda part, device: None)
    monkeypatch.setattr(calib.device, "memory_held", lambda device: 3 * GIB)
    expected = r"the memory of cuda ran out, 3.0 GiB of it held here: .* less --max-memory"
    with pytest.raises(DmqError, match=expected), reproducible(CUDA):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
