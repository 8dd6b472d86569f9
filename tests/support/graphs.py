"""CUDA graphs without a GPU: what a recording would refuse, and what replaying it would do."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from calib.fit.cuda_graph import WARM_UP_CALLS

REFUSED = ("_local_scalar_dense", "lift_fresh", "nonzero", "repeat_interleave", "unique")


class Recording(TorchDispatchMode):
    """Notes every operation of the block with its tensors; refuses what a CUDA graph cannot record.

    That is looking at a value, a size that follows from values, and new constants.
    """

    def __init__(self) -> None:
        super().__init__()
        self._operations: list[tuple[Any, Sequence[Any], Mapping[str, Any], list[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        assert not any(word in func.name() for word in REFUSED), func.name()
        chosen = args[1] if func.name() == "aten::index.Tensor" else ()
        assert all(index is None or index.dtype != torch.bool for index in chosen), "indexed by a mask"
        given = tree_map_only(Tensor, Tensor.detach, (args, kwargs or {}))  # a shape may be changed in place later
        result = func(*args, **(kwargs or {}))
        self._operations.append((func, *given, self._made(func, result)))
        return result

    @staticmethod
    def _made(func: Any, result: Any) -> list[Tensor]:
        """Outputs with a memory of their own: no views, nothing that was changed in place."""
        returned = [value.detach() for value in tree_leaves(result) if isinstance(value, Tensor)]
        return [] if any(value.alias_info for value in func._schema.returns) else returned

    def replay(self) -> None:
        """The operations once more, on the same memory and with the numbers that were Python's then."""
        with torch.no_grad():
            for func, args, kwargs, made in self._operations:
                again = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, Tensor)]
                for own, value in zip(made, again, strict=False):
                    own.copy_(value)


class Emulated:
    """In place of ``CudaGraph``, which records on a GPU only."""

    calls = 0

    def __init__(self, function: Callable[..., None], device: torch.device) -> None:
        self._function = function
        self._warm_up = WARM_UP_CALLS
        self._recording: Recording | None = None
        self._inputs: list[Tensor] = []

    def __call__(self, *inputs: Tensor) -> None:
        Emulated.calls += 1
        self._warm_up -= 1
        if self._warm_up >= 0:
            self._function(*inputs)
        elif self._recording is None:
            self._inputs = [tensor.clone() for tensor in inputs]
            self._recording = Recording()
            with self._recording:
                self._function(*self._inputs)
        else:
            for own, tensor in zip(self._inputs, inputs, strict=True):
                own.copy_(tensor)
            self._recording.replay()
