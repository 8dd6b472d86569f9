"""The network of a checkpoint, without its source: diffusers' module tree with other ones at the quantized layers."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dmq_export.checkpoint import Checkpoint
from dmq_export.denoiser.arguments import nested, timestep_unit
from dmq_export.denoiser.config import FLUX
from dmq_export.errors import CheckpointError


def predict(network: nn.Module, sample: Tensor, timestep: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """One evaluation, called as diffusers' pipelines call the model.

    Args:
        sample: ``[N, ...]``.
        timestep: the scheduler's, ``[]`` or ``[N]``.
        conditioning: the flat mapping of :mod:`dmq_export.denoiser.arguments`, each ``[N, ...]``.

    Returns:
        The prediction ``[N, ...]``.
    """
    class_name = type(network).__name__
    named = nested(conditioning)
    if class_name == FLUX:
        named |= _position_ids(sample, named["encoder_hidden_states"])
    unit = timestep_unit(class_name)
    per_sample = timestep.expand(sample.shape[0])  # transformers insist on one timestep per sample
    output = network(sample, timestep=per_sample if unit == 1 else per_sample / unit, **named, return_dict=False)
    prediction: Tensor = output[0]
    return prediction


def _position_ids(sample: Tensor, text: Tensor) -> dict[str, Tensor]:
    """Where Flux's tokens lie: ``img_ids [tokens, 3]`` hold 0, row and column of a square, ``txt_ids [L, 3]`` zeros.

    They are no inputs: the shapes say them, and so the exported graph holds what follows from them as constants.
    """
    side = math.isqrt(sample.shape[1])
    index = torch.arange(side * side, device=sample.device)
    image = torch.stack([torch.zeros_like(index), index // side, index % side], dim=-1)
    return {"img_ids": image.float(), "txt_ids": torch.zeros(text.shape[1], 3, device=sample.device)}


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
    import diffusers  # here, for the processes that fit layers do without it

    model_class = getattr(diffusers, checkpoint.model.class_name, None)
    if model_class is None:
        raise CheckpointError(f"diffusers {diffusers.__version__} has no {checkpoint.model.class_name!r}")
    with torch.device("meta"):  # no memory and no initialisation for weights that are replaced anyway
        network: nn.Module = model_class.from_config(_known(model_class, checkpoint.model.config))
    replace_modules(network, modules)
    for name, value in checkpoint.float_tensors.items():
        _set_tensor(network, name, torch.from_numpy(value))
    for name, tensor in [*network.named_parameters(), *network.named_buffers()]:
        if tensor.is_meta:
            raise CheckpointError(f"the checkpoint lacks the tensor {name} of {checkpoint.model.class_name}")
    return network.eval().requires_grad_(False)


def _known(model_class: type, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the class takes: ours says the sample size of models that state none."""
    accepted = inspect.signature(model_class).parameters
    return {key: value for key, value in config.items() if key in accepted}


def _set_tensor(network: nn.Module, name: str, value: Tensor) -> None:
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


def _numpy(tensor: Tensor) -> NDArray[np.generic]:
    # NumPy has no bfloat16
    widened = tensor.float() if tensor.dtype == torch.bfloat16 else tensor
    array: NDArray[np.generic] = widened.detach().cpu().numpy()
    return array
