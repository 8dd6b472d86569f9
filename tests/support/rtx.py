"""Graphs that TensorRT-RTX's compiler takes or refuses, small enough to compile within a second."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from qdq import GraphBuilder, conv_model

from dmq_export.lint.view import with_types

needs_rtx = pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")


def saved(model: ir.Model, path: Path) -> Path:
    """The parser wants to know the types of outputs, which the builder of the tests does not state."""
    ir.save(with_types(model), path)
    return path


def open_model() -> ir.Model:
    """One quantized matrix product, of any batch, and a float one."""
    b = GraphBuilder()
    x = b.input("x", "batch", 4, 32)
    product = b.op("MatMul", b.pair(x), b.weight(32, 32, axis=1))
    return b.model(b.op("MatMul", product, b.constant(np.ones((32, 8)))))


def float_product() -> ir.Model:
    """A convolution that passes the linter and that the compiler runs in float: its scale is a vector of one."""
    return conv_model(scale=[0.1])


def one_dimension() -> ir.Model:
    b = GraphBuilder()
    return b.model(b.op("ArgMin", b.input("x", 8), axis=0, keepdims=0))


def transposed_codes() -> ir.Model:
    b = GraphBuilder()
    codes = b.op("Transpose", b.constant(np.ones((32, 32)), np.int8), perm=[1, 0])
    weight = b.op("DequantizeLinear", codes, b.constant(np.full(32, 0.1)), axis=1)
    return b.model(b.op("MatMul", b.pair(b.input("x", 4, 32)), weight))


def small_heads() -> ir.Model:
    """Attention with heads of 8, which crashes the builder."""
    b = GraphBuilder(23)
    x = b.input("x", 1, 2, 16, 8)
    return b.model(b.op("Attention", x, x, x))


REFUSED: dict[str, tuple[Callable[[], ir.Model], str]] = {
    "parser": (one_dimension, "layer layer0/ArgMin: data of too few dimensions"),
    "builder": (transposed_codes, "constant_0: an integer constant that no DequantizeLinear reads directly"),
    "crash": (small_heads, "the builder crashed (exit status -11)"),
}
