"""PyTorch networks under the contract of the engines: NumPy arrays in and out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from calib.model.fake_quantized import load_fake_quantized
from calib.model.load import SourceModel
from calib.model.network import predict
from dmq_export.checkpoint import Checkpoint


class TorchDenoiser:
    """``denoise(sample, timestep, **conditioning) -> prediction`` of a network that computes with tensors.

    Args:
        network: ``(sample, timestep, **conditioning) -> prediction``, tensors on ``device``.
        device: that the arrays are moved to.
    """

    def __init__(self, network: Callable[..., Tensor], device: torch.device) -> None:
        self._network = network
        self._device = device

    def __call__(
        self, sample: NDArray[np.float32], timestep: float, **conditioning: NDArray[Any]
    ) -> NDArray[np.float32]:
        tensors = {name: torch.from_numpy(value).to(self._device) for name, value in conditioning.items()}
        with torch.inference_mode():
            prediction = self._network(torch.from_numpy(sample).to(self._device), timestep, **tensors)
        array: NDArray[np.float32] = prediction.cpu().numpy()
        return array


def fake_quantized_denoiser(checkpoint: Checkpoint, device: torch.device) -> TorchDenoiser:
    """The fake-quantized model that every export is compared with.

    Raises:
        CheckpointError: the checkpoint's tensors do not make up the network.
    """
    return TorchDenoiser(load_fake_quantized(checkpoint, device), device)


def float_denoiser(source: SourceModel) -> TorchDenoiser:
    """The float model."""
    device = next(source.network.parameters()).device

    def network(sample: Tensor, timestep: float, **conditioning: Tensor) -> Tensor:
        return predict(source.network, sample, torch.as_tensor(timestep, device=device), conditioning)

    return TorchDenoiser(network, device)
