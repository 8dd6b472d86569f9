"""Codes of up to four bits, two to a byte, low nibble first (the order of ONNX and TensorRT)."""

import numpy as np
from numpy.typing import NDArray

Codes = NDArray[np.uint8]


def pack_nibbles(codes: Codes) -> Codes:
    """``[n]`` codes in 0..15 to ``[ceil(n / 2)]`` bytes; an odd count is padded with a zero nibble.

    Raises:
        ValueError: a code does not fit four bits.
    """
    flat = codes.ravel()
    if flat.size and flat.max() > 15:
        raise ValueError(f"code {flat.max()} does not fit four bits")
    padded = np.append(flat, np.zeros(flat.size % 2, np.uint8))
    return (padded[0::2] | padded[1::2] << 4).astype(np.uint8)


def unpack_nibbles(packed: Codes, shape: tuple[int, ...]) -> Codes:
    """The inverse of :func:`pack_nibbles` for codes of ``shape``.

    Raises:
        ValueError: the byte count is not that of ``shape``.
    """
    count = int(np.prod(shape))
    if packed.shape != ((count + 1) // 2,):
        raise ValueError(f"{packed.shape} bytes cannot hold codes of shape {shape}")
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).ravel()
    return nibbles[:count].reshape(shape)
