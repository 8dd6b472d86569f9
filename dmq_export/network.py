"""The network of a checkpoint, without its source: diffusers' module tree with other modules at the quantized layers.

PyTorch's home is ``calib``; the exporter needs a module to trace, so its imports here are local.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from dmq_export.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from dmq_export.checkpoint import Checkpoint


def replace_modules(network: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """Put ``modules`` in place of the submodules of those names; returns what stood there."""
    originals = {}
    for name, module in modules.items():
        originals[name] = network.get_submodule(name)
        network.set_submodule(name, module)
    return originals


def float_tensors(network: nn.Module, quantized: set[str]) -> dict[str, NDArray[Any]]:
    """Parameters and buffers of everything outside the ``quantized`` layers, as NumPy arrays.

    Buffers that a state dict leaves out (positional tables, for one) are included: the network is rebuilt
    without running its initialisation.
    """
    named = [
        *network.named_parameters(remove_duplicate=False),
        *network.named_buffers(remove_duplicate=False),
    ]
    outside = {name: tensor for name, tensor in named if name.rpartition(".")[0] not in quantized}
    return {name: _numpy(tensor) for name, tensor in outside.items()}


def build_network(checkpoint: Checkpoint, modules: Mapping[str, nn.Module]) -> nn.Module:
    """The network in evaluation mode, ``modules`` at the quantized layers, all the rest from the checkpoint.

    Raises:
        CheckpointError: diffusers does not know the class, or a tensor is missing.
    """
    import diffusers
    import torch

    model_class = getattr(diffusers, checkpoint.model.class_name, None)
    if model_class is None:
        raise CheckpointError(f"diffusers {diffusers.__version__} has no {checkpoint.model.class_name!r}")
    with torch.device("meta"):  # no memory and no initialisation for weights that are replaced anyway
        network: nn.Module = model_class.from_config(dict(checkpoint.model.config))
    replace_modules(network, modules)
    for name, value in checkpoint.float_tensors.items():
        _set_tensor(network, name, torch.from_numpy(value))
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(f"the checkpoint lacks the tensor {name} of {checkpoint.model.class_name}")
    return network.eval().requires_grad_(False)


def _set_tensor(network: nn.Module, name: str, value: Any) -> None:
    from torch import nn

    owner, _, leaf = name.rpartition(".")
    try:
        module = network.get_submodule(owner)
        current = getattr(module, leaf)
    except AttributeError as error:
        raise CheckpointError(f"the checkpoint has a tensor {name} that the network does not") from error
    if isinstance(current, nn.Parameter):
        setattr(module, leaf, nn.Parameter(value, requires_grad=False))
    else:
        module._buffers[leaf] = value


def _numpy(tensor: Any) -> NDArray[np.generic]:
    import torch

    # NumPy has no bfloat16
    widened = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[np.generic] = widened.detach().cpu().numpy()
    return array
