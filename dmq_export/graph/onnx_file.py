"""Reading ONNX files, our own and others'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir as ir

from dmq_export.errors import DmqError
from dmq_export.metadata import METADATA_KEY

Sizes = tuple[int | str, ...]  # of a tensor; a name stands for a size that varies


def load_onnx(path: Path) -> ir.Model:
    """The model in ``path``; weights in an external-data file are read when they are used.

    Raises:
        DmqError: it is missing, is no ONNX model, or its external data is missing or lies outside its folder.
    """
    if not path.is_file():
        raise DmqError(f"{path} is not a file: give an ONNX model")
    try:
        model = ir.load(path)
    except Exception as error:  # protobuf's and onnx_ir's errors have no common base but Exception
        raise DmqError(f"{path} is not an ONNX model: {type(error).__name__}") from error
    if not model.graph.outputs:  # an empty file is a valid message of protobuf
        raise DmqError(f"{path} is not an ONNX model: it has no outputs")
    for data in external_files(model, path.parent):
        if not data.resolve().is_relative_to(path.parent.resolve()):
            raise DmqError(f"{path} keeps weights in {data}, outside its folder: such files are not read")
        if not data.is_file():
            raise DmqError(f"{path} keeps weights in {data}, which is missing: put it beside the model")
    return model


def external_files(model: ir.Model, folder: Path) -> list[Path]:
    """The external-data files that ``model``, which lies in ``folder``, refers to."""
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    locations = {str(tensor.location) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return [folder / location for location in sorted(locations)]


def input_sizes(model: ir.Model) -> dict[str, Sizes]:
    """Name and shape of every input that is not a weight.

    Raises:
        DmqError: an input has no name or no shape.
    """
    sizes: dict[str, Sizes] = {}
    for value in model.graph.inputs:
        if value.is_initializer():
            continue
        if value.name is None or value.shape is None:
            raise DmqError(f"the model's input {value.name or '(unnamed)'} states no shape")
        sizes[value.name] = tuple(
            size if isinstance(size, int) else size.value or f"{value.name}.{axis}"
            for axis, size in enumerate(value.shape)
        )
    return sizes


def metadata_of(model: ir.Model) -> dict[str, Any] | None:
    """What our export says of the model, or None for a model of another tool.

    Raises:
        DmqError: the metadata is there and no JSON object.
    """
    text = model.metadata_props.get(METADATA_KEY)
    if text is None:
        return None
    try:
        metadata = json.loads(text)
    except ValueError as error:
        raise DmqError(f"the model's {METADATA_KEY!r} metadata is damaged: {error}") from error
    if not isinstance(metadata, dict):
        raise DmqError(f"the model's {METADATA_KEY!r} metadata is damaged: an object was expected")
    return metadata
