"""The adaptive timestep weight: steps that already lose much count less, so that they don't drown the rest.

DMQ, section 3.2: ``lambda_t = (1 - Lambda_t / sum Lambda)^alpha`` with ``Lambda_t`` a moving average of the loss.
"""

import torch
from torch import Tensor


class TimestepWeights:
    """Moving averages ``Lambda [T]`` of the mean loss of each step, and the weights they give.

    The *mean* loss of a step enters, so that it does not matter how often the step was drawn; a step not yet
    seen weighs as if it had no loss.
    """

    def __init__(self, steps: int, *, alpha: float, momentum: float, device: torch.device) -> None:
        self.alpha = alpha
        self.momentum = momentum
        self.average = torch.zeros(steps, device=device)
        self._seen = torch.zeros(steps, dtype=torch.bool, device=device)

    def update(self, loss: Tensor, step: Tensor) -> Tensor:
        """Take in ``loss [B]`` of rows at ``step [B]``; returns the weights ``lambda [B]`` of those rows."""
        # sums as a product: it adds in the same order every time, on a GPU too
        drawn_at = (step[:, None] == torch.arange(len(self.average), device=step.device)).to(loss.dtype)
        count = drawn_at.sum(0)
        mean = loss.detach() @ drawn_at / count.clamp(min=1)
        drawn = count > 0
        blended = torch.lerp(mean, self.average, self.momentum)
        self.average.copy_(torch.where(drawn, torch.where(self._seen, blended, mean), self.average))
        self._seen |= drawn
        return self.weights()[step]

    def weights(self) -> Tensor:
        """``lambda [T]``, each in 0..1; a single step, which has all the loss, weighs 1."""
        if len(self.average) == 1:
            return torch.ones_like(self.average)
        total = self.average.sum().clamp(min=torch.finfo(self.average.dtype).tiny)
        return (1 - self.average / total) ** self.alpha
