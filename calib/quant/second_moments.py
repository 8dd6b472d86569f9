"""Second moments of a layer's patches: all that rounding its weights needs to know of its inputs.

``X^T X`` is GPTQ's Hessian ``H`` of the squared output error, but for a factor 2 (Frantar et al. 2023, equation 2).
"""

import torch
from torch import Tensor

BLOCK = 512  # columns that are multiplied at once


class SecondMoments:
    """``X^T X`` of some channels of a layer's patches.

    What was asked for last is kept: a layer's equivalent scaling and its rounding begin with the same channels.

    Args:
        patches: ``X``, ``[M, C, K]``.
    """

    def __init__(self, patches: Tensor) -> None:
        self._patches = patches
        self._kept: tuple[slice, Tensor] | None = None

    def of(self, channels: slice, tau: Tensor | None = None) -> Tensor:
        """``[n, n]``, over the ``n`` numbers of those channels' patches.

        Args:
            tau: what the patches are divided by, ``[C]``; None for nothing.
        """
        if self._kept is None or self._kept[0] != channels:
            self._kept = None  # before the next one comes
            self._kept = channels, gram(self.columns(channels))
        moments = self._kept[1]
        if tau is None:
            return moments
        factor = 1 / tau[channels].repeat_interleave(self._patches.shape[2])
        return (moments * factor).mul_(factor[:, None])

    def columns(self, channels: slice, tau: Tensor | None = None) -> Tensor:
        """The patches themselves, ``[M, n]``."""
        x = self._patches[:, channels]
        return (x if tau is None else x / tau[channels, None]).flatten(1)


def gram(x: Tensor) -> Tensor:
    """``x^T x`` of ``x [M, n]``; only what lies above the diagonal is multiplied out."""
    result = x.new_empty(x.shape[1], x.shape[1])
    for start in range(0, len(result), BLOCK):
        block = slice(start, start + BLOCK)
        torch.mm(x[:, block].T, x[:, start:], out=result[block, start:])
        result[start:, block] = result[block, start:].T.clone()
    return result
