"""The metadata of an ONNX file, read without the onnx package and without reading the graph.

A protocol buffer is a sequence of fields, each with a number, a wire type and, for those of variable length, its size
(protobuf.dev/programming-guides/encoding). All but ``metadata_props`` are stepped over.
"""

import os
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

from dmq_export.errors import DmqError

METADATA_PROPS = 14  # of ModelProto; its entries have KEY and VALUE
KEY, VALUE = 1, 2
VARINT, SIXTY_FOUR_BITS, SIZED, THIRTY_TWO_BITS = 0, 1, 2, 5  # wire types


def onnx_metadata(path: Path) -> dict[str, str]:
    """``metadata_props`` of the ONNX file ``path``.

    Raises:
        DmqError: it cannot be read, or is no protocol buffer.
    """
    try:
        with path.open("rb") as stream:
            entries = [dict(_sized_fields(BytesIO(entry), {KEY, VALUE})) for entry in _values(stream)]
        return {entry[KEY].decode(): entry.get(VALUE, b"").decode() for entry in entries}
    except OSError as error:
        raise DmqError(f"cannot read {path}: {error.strerror}") from error
    except (KeyError, ValueError) as error:
        raise DmqError(f"{path} is no ONNX file, or a damaged one") from error


def _values(stream: BinaryIO) -> list[bytes]:
    return [value for _, value in _sized_fields(stream, {METADATA_PROPS})]


def _sized_fields(stream: BinaryIO, wanted: set[int]) -> Iterator[tuple[int, bytes]]:
    """Number and content of every ``wanted`` field of variable length up to the end of ``stream``."""
    end = stream.seek(0, os.SEEK_END)
    stream.seek(0)
    while stream.tell() < end:
        number, wire_type = divmod(_varint(stream), 8)
        if wire_type == VARINT:
            _varint(stream)
            continue
        fixed = {SIXTY_FOUR_BITS: 8, THIRTY_TWO_BITS: 4}
        if wire_type not in fixed and wire_type != SIZED:
            raise ValueError(f"wire type {wire_type}")
        size = fixed[wire_type] if wire_type in fixed else _varint(stream)
        if stream.tell() + size > end:
            raise ValueError("a field goes past the end")
        if number in wanted and wire_type == SIZED:
            yield number, stream.read(size)
        else:
            stream.seek(size, os.SEEK_CUR)


def _varint(stream: BinaryIO) -> int:
    value, shift = 0, 0
    while byte := stream.read(1):
        value |= (byte[0] & 127) << shift
        if byte[0] < 128:
            return value
        shift += 7
    raise ValueError("the file ends inside a number")
