"""Hooks come and go with a block."""

import pytest
import torch
from torch import nn

from calib.model.hooks import hooked


def test_hooks_are_there_in_the_block_and_gone_after_it_even_if_it_fails() -> None:
    layers, seen = [nn.Linear(1, 1), nn.Linear(1, 1)], []

    def note(module: nn.Module, *_: object) -> None:
        seen.append(module)
        raise KeyError

    with pytest.raises(KeyError), hooked(layer.register_forward_hook(note) for layer in layers):
        layers[0](torch.ones(1))
    layers[0](torch.ones(1))
    assert seen == [layers[0]]
    assert not any(layer._forward_hooks for layer in layers)


def test_hooks_registered_before_one_fails_are_gone_too() -> None:
    layer = nn.Linear(1, 1)

    def register():
        yield layer.register_forward_hook(lambda *_: None)
        raise KeyError

    with pytest.raises(KeyError), hooked(register()):
        pass
    assert not layer._forward_hooks
