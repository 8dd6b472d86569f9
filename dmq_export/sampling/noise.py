"""The noise that sampling starts from and adds, the same on every backend."""

import numpy as np
from numpy.typing import NDArray

from dmq_export.common.seeds import stream_seed


def initial_noise(shape: tuple[int, ...], indices: range, seed: int) -> NDArray[np.float32]:
    """Standard normal noise ``[len(indices), *shape]``.

    Sample ``i`` depends on ``seed`` and ``i`` alone, whatever else is in the batch.
    """
    return np.stack([stream.standard_normal(shape, np.float32) for stream in noise_streams("noise", indices, seed)])


def noise_streams(name: str, indices: range, seed: int) -> list[np.random.Generator]:
    """One stream called ``name`` for each sample."""
    return [np.random.Generator(np.random.Philox(stream_seed(seed, name, i))) for i in indices]
