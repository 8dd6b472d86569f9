"""A chain of operations that is repeated; the recording itself needs a GPU: test_cuda.py."""

import torch
from torch import Tensor

from calib.fit.cuda_graph import CudaGraph


def test_on_the_cpu_every_call_is_a_call() -> None:
    total = torch.zeros(2)

    def add(first: Tensor, second: Tensor) -> None:
        total.add_(first * second)

    replayed = CudaGraph(add, torch.device("cpu"))
    for number in range(6):
        replayed(torch.full((2,), float(number)), torch.tensor([1.0, 2.0]))
    assert total.tolist() == [15.0, 30.0]
