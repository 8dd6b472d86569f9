"""Independent random streams named by what they are for, never by the order in which they are drawn."""

import hashlib


def stream_seed(seed: int, *keys: str | int) -> int:
    """A 63-bit seed for the stream called ``keys`` under the user's ``seed``."""
    text = "/".join(str(key) for key in (seed, *keys))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
