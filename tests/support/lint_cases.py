"""Graphs that break one rule each, and graphs that nearly do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from qdq import CHANNELS, GraphBuilder, conv_model

INT4, UINT4 = ml_dtypes.int4, ml_dtypes.uint4
FP8, FP4 = ml_dtypes.float8_e4m3fn, ml_dtypes.float4_e2m1fn
BFLOAT16 = ml_dtypes.bfloat16
IMAGE = (1, CHANNELS, 8, 8)
ROWS = (4, CHANNELS)
EDGES = [0, 0, 1, 1, 0, 0, 1, 1]  # of a Pad of an image


@dataclass(frozen=True)
class Case:
    """A graph that breaks ``rule``, or with an empty ``found`` nearly does."""

    rule: str
    found: str
    build: Callable[[], ir.Model]
    gpu: int | None = None

    def __str__(self) -> str:
        return f"{self.rule}: {self.found}"


def graph(build: Callable[[GraphBuilder], str], opset: int = 21, dtype: Any = np.float16) -> ir.Model:
    """The graph whose one output ``build`` returns."""
    b = GraphBuilder(opset, dtype)
    return b.model(build(b))


def quantized(scale: Any = 0.1, zero: Any = 0, *, dtype: Any = np.int8, x: tuple[Any, ...] = ROWS, **more: Any):
    """A lone QuantizeLinear/DequantizeLinear pair."""
    b = GraphBuilder(more.pop("opset", 21), more.pop("graph", np.float16))
    scale_type, attributes = more.pop("scale_type", None), more
    scales = b.constant(scale, scale_type)
    zeros = [b.constant(np.broadcast_to(zero, np.shape(scale)), dtype)]
    codes = b.op("QuantizeLinear", b.input("x", *x), scales, *zeros, **attributes)
    return b.model(b.op("DequantizeLinear", codes, scales, *zeros, **attributes))


def matmul(weight: Callable[[GraphBuilder], str], *, op: str = "MatMul", **more: Any) -> ir.Model:
    """A product of ``x`` and ``weight``; ``data`` makes its first input of ``x``, a pair by default."""
    b = GraphBuilder(more.pop("opset", 21), more.pop("dtype", np.float16))
    data: Callable[[GraphBuilder, str], str] = more.pop("data", GraphBuilder.pair)
    x = b.input("x", *more.pop("x", IMAGE if op.startswith("Conv") else ROWS))
    return b.model(b.op(op, data(b, x), weight(b), **more))


def conv(weight: Callable[[GraphBuilder], str] | None = None, **more: Any) -> ir.Model:
    return matmul(weight or (lambda b: b.weight(CHANNELS, CHANNELS, 3, 3)), op=more.pop("op", "Conv"), **more)


def floats(b: GraphBuilder, x: str) -> str:
    """Data that is not quantized."""
    del b
    return x


def square(b: GraphBuilder) -> str:
    """A weight with a scale per output channel."""
    return b.weight(CHANNELS, CHANNELS, axis=1)


def ones(b: GraphBuilder, *shape: int, dtype: Any = None) -> str:
    return b.constant(np.ones(shape), dtype)


def int64(b: GraphBuilder, value: Any) -> str:
    return b.constant(value, np.int64)


def single(
    op: str, *shape: Any, dtype: Any = None, more: Callable[[GraphBuilder], list[str]] | None = None, **attributes: Any
):
    """One operator."""
    opset = attributes.pop("opset", 21)
    return graph(
        lambda b: b.op(op, b.input("x", *shape, dtype=dtype), *(more(b) if more else []), **attributes), opset=opset
    )


def two_inputs(op: str, first: Any, second: Any) -> ir.Model:
    return graph(lambda b: b.op(op, b.input("x", *ROWS, dtype=first), b.input("y", *ROWS, dtype=second)))


def runtime(which: str) -> ir.Model:
    b = GraphBuilder()
    scale = b.input("scale") if which == "scale" else b.constant(0.1)
    zero = b.input("zero", dtype=np.int8) if which == "zero" else b.constant(0, np.int8)
    return b.model(b.op("QuantizeLinear", b.input("x", *ROWS), scale, zero))


def runtime_data(b: GraphBuilder, x: str) -> str:
    scale, zero = b.input("scale"), b.constant(0, np.int8)
    return b.op("DequantizeLinear", b.op("QuantizeLinear", x, scale, zero), scale, zero)


def runtime_codes(b: GraphBuilder, x: str) -> str:
    """Only QuantizeLinear's scale is computed."""
    zero = b.constant(0, np.int8)
    return b.op("DequantizeLinear", b.op("QuantizeLinear", x, b.input("scale"), zero), b.constant(0.1), zero)


def product_of_constants(b: GraphBuilder, x: str) -> str:
    scale, zero = b.op("Mul", b.constant(0.1), b.constant(2)), b.constant(0, np.int8)
    return b.op("DequantizeLinear", b.op("QuantizeLinear", x, scale, zero), scale, zero)


def vector(b: GraphBuilder, x: str) -> str:
    return b.pair(x, [0.1])


def channels(b: GraphBuilder, x: str) -> str:
    return b.pair(x, np.full(CHANNELS, 0.1), axis=1)


def stored(codes: Callable[[GraphBuilder], str]) -> Callable[[GraphBuilder], str]:
    """A weight whose ``codes`` are made in the graph."""
    return lambda b: b.op("DequantizeLinear", codes(b), b.constant(0.1))


def then(
    op: str, weight: Callable[[GraphBuilder], str], *values: Any, **attributes: Any
) -> Callable[[GraphBuilder], str]:
    """An operator behind ``weight``."""
    return lambda b: b.op(op, weight(b), *(b.constant(*value) for value in values), **attributes)


def typed(data: Any, weight: Any, op: str = "MatMul") -> ir.Model:
    """A product whose two scales have these types."""

    def dequantized(b: GraphBuilder, x: str) -> str:
        zero = b.constant(0, np.int8)
        return b.op("DequantizeLinear", b.op("QuantizeLinear", x, b.constant(0.1), zero), b.constant(0.1, data), zero)

    return matmul(
        lambda b: b.op("DequantizeLinear", ones(b, CHANNELS, CHANNELS, dtype=np.int8), b.constant(0.1, weight)),
        data=dequantized,
        op=op,
    )


def sums(
    inner: int,
    code: int,
    *,
    data: Callable[[GraphBuilder, str], str] = GraphBuilder.pair,
    smallest: float = 0.1,
    **more: Any,
) -> ir.Model:
    """A MatMul over ``inner`` elements whose weight's codes are all ``code``; ``smallest`` is its smallest scale."""
    axis = more.pop("axis", 1)

    def weight(b: GraphBuilder) -> str:
        scale = smallest if axis is None else smallest * (1 + 0.01 * np.arange(CHANNELS))
        codes = b.constant(np.full((inner, CHANNELS), code), np.int8)
        return b.op("DequantizeLinear", codes, b.constant(scale), **({} if axis is None else {"axis": axis}))

    return matmul(weight, x=(4, inner), data=data, **more)


def clip_to_six_bits(b: GraphBuilder, x: str) -> str:
    return b.pair(b.op("Clip", x, b.constant(-3.2), b.constant(3.1)))


def four_bit(rows: int, columns: int, scales: tuple[int, ...], **more: Any) -> ir.Model:
    """A product of float data and 4-bit weights."""
    axis = more.pop("axis", 0)
    return matmul(lambda b: b.blocks(rows, columns, scales=scales, axis=axis), x=(4, rows), data=floats, **more)


def w4a8(rows: int, scales: tuple[int, ...], *, dtype: Any = INT4, turned: bool = False, axis: int = 0) -> ir.Model:
    """A product of 8-bit data and a weight whose scales are a scalar, per channel or per block."""

    def weight(b: GraphBuilder) -> str:
        size = (CHANNELS, rows) if turned else (rows, CHANNELS)
        made = b.blocks(*size, scales=scales, axis=axis, dtype=dtype)
        return b.op("Transpose", made) if turned else made

    return matmul(weight, x=(4, rows))


def negative_int4() -> ir.Model:
    """As ONNX Runtime's 4-bit quantizer writes them."""
    return matmul(lambda b: b.op("DequantizeLinear", ones(b, *SQUARE, dtype=INT4), b.constant(-0.1)), data=floats)


def int4_first(rows: int, scales: tuple[int, ...]) -> ir.Model:
    return graph(lambda b: b.op("MatMul", b.blocks(rows, CHANNELS, scales=scales), b.input("x", CHANNELS, 4)))


def mixed(data: Any, weight: Any, op: str = "MatMul") -> ir.Model:
    shape = (CHANNELS, CHANNELS, 3, 3) if op == "Conv" else (CHANNELS, CHANNELS)
    return matmul(
        lambda b: b.op("DequantizeLinear", ones(b, *shape, dtype=weight), b.constant(0.1)),
        data=lambda b, x: b.pair(x, dtype=data),
        op=op,
        opset=23,
    )


def add(one_sided: bool) -> ir.Model:
    b = GraphBuilder()
    x, y = b.input("x", *ROWS), b.input("y", *ROWS)
    return b.model(b.op("Add", b.pair(x), y if one_sided else b.pair(y, 0.2)))


def concat(second: float) -> ir.Model:
    b = GraphBuilder()
    x, y = b.input("x", *ROWS), b.input("y", *ROWS)
    return b.model(b.op("Concat", b.pair(x, 0.1), b.pair(y, second), axis=0))


def padded(mode: str = "constant", *, quantize: bool = True) -> ir.Model:
    def data(b: GraphBuilder, x: str) -> str:
        x = b.op("Pad", x, int64(b, EDGES), mode=mode)
        return b.pair(x) if quantize else x

    return conv(data=data) if quantize else conv(lambda b: ones(b, CHANNELS, CHANNELS, 3, 3), data=data)


def clipped(low: float, high: float, scale: float = 0.1) -> ir.Model:
    return graph(lambda b: b.pair(b.op("Clip", b.input("x", *ROWS), b.constant(low), b.constant(high)), scale))


def clipped_codes() -> ir.Model:
    b = GraphBuilder()
    scale, zero = b.constant(0.1), b.constant(0, np.int8)
    codes = b.op("QuantizeLinear", b.input("x", *ROWS), scale, zero)
    codes = b.op("Clip", codes, b.constant(-32, np.int8), b.constant(31, np.int8))
    return b.model(b.op("DequantizeLinear", codes, scale, zero))


def biased(dtype: Any) -> ir.Model:
    b = GraphBuilder()
    bias = b.op("DequantizeLinear", ones(b, CHANNELS, dtype=dtype), b.constant(0.1))
    return b.model(b.op("Gemm", b.pair(b.input("x", *ROWS)), square(b), bias))


def several_scales(*scales: float) -> ir.Model:
    b = GraphBuilder()
    x = b.input("x", *ROWS)
    return b.model(*[b.pair(x, scale) for scale in scales])


def attention(tokens: int, *, dtype: Any = np.int8, quantize: bool = True, graph_type: Any = np.float16) -> ir.Model:
    """Attention of two heads, as an exporter writes it, its output quantized too."""
    b = GraphBuilder(21, graph_type)
    q, k, v = (b.input(name, 1, 2, tokens, 64) for name in "qkv")

    def pair(x: str) -> str:
        return b.pair(x, dtype=dtype) if quantize else x

    turned = b.op("Transpose", pair(k), perm=[0, 1, 3, 2])
    weights = b.op("Softmax", b.op("MatMul", pair(b.op("Mul", q, b.constant(0.125))), turned))
    return b.model(pair(b.op("MatMul", pair(weights), pair(v))))


def attention_operator(head: int, dtype: Any = np.float16) -> ir.Model:
    b = GraphBuilder(23, dtype)
    return b.model(b.op("Attention", *(b.input(name, 1, 2, 16, head) for name in "qkv")))


def declared(op: str, **attributes: Any) -> ir.Model:
    b = GraphBuilder(opset=23)
    x = b.input("x", *ROWS) if op == "QuantizeLinear" else b.input("x", *ROWS, dtype=np.int8)
    zero = [] if attributes.pop("bare", False) else [b.constant(0, np.int8)]
    return b.model(b.op(op, x, b.constant(0.1), *zero, **attributes))


def mismatched_zero(b: GraphBuilder) -> str:
    codes, scale = ones(b, CHANNELS, CHANNELS, dtype=np.int8), b.constant(np.full(CHANNELS, 0.1))
    return b.op("DequantizeLinear", codes, scale, b.constant([0], np.int8), axis=1)


def bad_axis(b: GraphBuilder) -> str:
    codes = ones(b, CHANNELS, CHANNELS, dtype=np.int8)
    return b.op("DequantizeLinear", codes, b.constant(np.full(CHANNELS, 0.1)), axis=2)


def layer_norm(outputs: int) -> ir.Model:
    b = GraphBuilder()
    first = b.op("LayerNormalization", b.input("x", *ROWS), ones(b, CHANNELS))
    b.nodes[-1].output.extend([f"more{index}" for index in range(outputs - 1)])
    return b.model(first)


def unused_constant(dtype: Any) -> ir.Model:
    b = GraphBuilder()
    ones(b, 2, dtype=dtype)
    return b.model(b.op("Relu", b.input("x", *ROWS)))


def untyped() -> ir.Model:
    b = GraphBuilder()
    return b.model(b.op("Relu", b.input("x", *ROWS)), typed=False)


def matmul_n_bits() -> ir.Model:
    """ONNX Runtime's operator for 4-bit weights."""
    b = GraphBuilder()
    codes, scales = b.constant(np.full((CHANNELS, 1, 16), 0x77), np.uint8), ones(b, CHANNELS)
    sizes = {"K": CHANNELS, "N": CHANNELS, "bits": 4, "block_size": 32}
    return b.model(b.op("MatMulNBits", b.input("x", *ROWS), codes, scales, domain="com.microsoft", **sizes))


def top(count: int) -> ir.Model:
    b = GraphBuilder()
    first = b.op("TopK", b.input("x", 1, 5000), int64(b, [count]))
    b.nodes[-1].output.append("indices")
    return b.model(first)


def unsigned_input(op: str, **attributes: Any) -> ir.Model:
    return single(op, *ROWS, dtype=np.uint8, **attributes)


def joined(b: GraphBuilder, *, dequantized: bool = True) -> str:
    second = b.weight(CHANNELS, 16, axis=1) if dequantized else ones(b, CHANNELS, 16)
    return b.op("Concat", b.weight(CHANNELS, 16, axis=1), second, axis=1)


def row(b: GraphBuilder) -> str:
    return b.weight(CHANNELS, CHANNELS, axis=0)


def unstated(b: GraphBuilder) -> str:
    """A weight with scales along an axis that it does not state."""
    return b.weight(CHANNELS, CHANNELS, 3, 3, axis=None, scale=np.arange(1, CHANNELS + 1))


def filled(b: GraphBuilder, x: str) -> str:
    return b.op("Pad", b.pair(x), int64(b, EDGES), b.constant(0.5))


def lone(b: GraphBuilder) -> str:
    """A weight with one scale of shape ``[1]``."""
    return b.weight(CHANNELS, CHANNELS, 3, 3, axis=None, scale=[0.1])


SQUARE = (CHANNELS, CHANNELS)
BROKEN: list[Case] = [
    # quantizers
    Case("zero-point", "a zero point other than 0", lambda: quantized(zero=3)),
    Case("zero-point", "computed at run time", lambda: runtime("zero")),
    Case("zero-point", "1 zero points for 32 scales", lambda: matmul(mismatched_zero)),
    Case("quantized-type", "UINT8 codes", lambda: matmul(stored(lambda b: ones(b, *SQUARE, dtype=np.uint8)))),
    Case("quantized-type", "UINT16 codes", lambda: declared("QuantizeLinear", output_dtype=4, bare=True)),
    Case("uint8-codes", "UINT8 codes", lambda: quantized(dtype=np.uint8)),
    Case(
        "uint8-codes", "UINT8 codes", lambda: graph(lambda b: b.op("QuantizeLinear", b.input("x", 4), b.constant(0.1)))
    ),
    Case("quantized-bias", "INT32 codes", lambda: biased(np.int32)),
    Case("scale-constant", "computed at run time", lambda: runtime("scale")),
    Case("scale-value", "a scale of 0", lambda: quantized(1e-8)),  # float16 cannot hold it
    Case("scale-value", "a scale of -0.5", lambda: quantized(-0.5)),
    Case("scale-value", "a scale of nan", lambda: quantized([np.nan], x=(1,), axis=0)),
    Case("scale-value", "an empty scale", lambda: quantized(np.zeros(0), x=(0,), axis=0)),
    Case("scale-precision", "a FLOAT16 scale below 6.1e-05", lambda: quantized(1e-5)),
    Case("scale-precision", "an infinite scale", lambda: quantized(np.inf)),
    Case("scale-type", "a FLOAT scale for FLOAT16 data", lambda: quantized(0.1, scale_type=np.float32)),
    Case("output-type", "output_dtype INT8", lambda: declared("DequantizeLinear", output_dtype=3, bare=True)),
    Case("stated-type", "output_dtype beside a zero point", lambda: declared("DequantizeLinear", output_dtype=10)),
    Case("stated-type", "precision DOUBLE", lambda: declared("QuantizeLinear", precision=11)),
    Case("scalar-data", "a scalar", lambda: quantized(x=())),
    Case(
        "constant-codes", "a scalar INT8 constant", lambda: graph(lambda b: stored(lambda b: ones(b, dtype=np.int8))(b))
    ),
    Case(
        "constant-codes",
        "INT8 constants in a Transpose",
        lambda: matmul(stored(then("Transpose", lambda b: ones(b, *SQUARE, dtype=np.int8)))),
    ),
    Case(
        "constant-codes",
        "INT8 constants in a Clip",
        lambda: matmul(stored(then("Clip", lambda b: ones(b, *SQUARE, dtype=np.int8), (-8, np.int8), (7, np.int8)))),
    ),
    Case(
        "constant-codes",
        "INT4 constants in a Transpose",
        lambda: matmul(stored(then("Transpose", lambda b: ones(b, *SQUARE, dtype=INT4))), data=floats),
    ),
    # weights
    Case(
        "scale-shape",
        "1 scales for 32 elements along axis 1",
        lambda: matmul(lambda b: b.weight(*SQUARE, scale=np.full((CHANNELS, 1), 0.1))),
    ),
    Case(
        "scale-shape", "16 scales for 32 channels", lambda: matmul(lambda b: b.weight(*SQUARE, scale=np.full(16, 0.1)))
    ),
    Case("scale-shape", "axis 2 of a tensor of rank 2", lambda: matmul(bad_axis)),
    Case("scale-shape", "128 elements in 3 blocks", lambda: four_bit(128, 32, (3, 32))),
    Case(
        "scale-shape",
        "blocks along axis 1 of 4",
        lambda: conv(lambda b: b.blocks(32, 32, 1, 1, scales=(32, 2, 1, 1), axis=1), data=floats),
    ),
    Case("scale-shape", "a scale for every element", lambda: four_bit(128, 32, (128, 32))),
    Case(
        "unstated-axis",
        "without an axis",
        lambda: matmul(lambda b: b.weight(*SQUARE, axis=None, scale=np.full(CHANNELS, 0.1))),
    ),
    Case("weight-axis", "axis 0 of the weight of a MatMul", lambda: matmul(row)),
    Case("weight-axis", "axis 1 of the weight of a Gemm", lambda: matmul(square, op="Gemm", transB=1)),
    Case(
        "weight-axis",
        "axis 1 of the weight of a Conv",
        lambda: conv(lambda b: b.weight(32, 32, 3, 3, axis=None, scale=np.arange(1, 33))),
    ),
    Case("weight-axis", "axis 0 of the weight of a MatMul", lambda: matmul(then("Transpose", square))),
    Case(
        "weight-axis",
        "scales that no axis of the weight",
        lambda: matmul(then("Reshape", lambda b: b.weight(32, 8, 4, axis=1), ([32, 32], np.int64))),
    ),
    Case("weight-vector", "a scale of shape [1]", lambda: conv(lone)),
    Case("weight-vector", "a scale of shape [1]", lambda: conv(lone, dtype=BFLOAT16)),
    Case("block-sum", "a scale per block", lambda: w4a8(128, (2, CHANNELS))),
    Case("block-sum", "a scale per block", lambda: w4a8(128, (2, CHANNELS), dtype=np.int8)),
    Case("block-transpose", "a transposed weight", lambda: w4a8(128, (CHANNELS, 2), turned=True, axis=1)),
    Case("mixed-codes", "INT8 data and FLOAT8E4M3FN weights", lambda: mixed(np.int8, FP8)),
    Case("mixed-codes", "FLOAT8E4M3FN data and INT8 weights", lambda: mixed(FP8, np.int8, "Conv")),
    Case("mixed-codes", "FLOAT8E4M3FN data and INT4 weights", lambda: mixed(FP8, INT4)),
    Case("int4-with-int8", "of one scale", lambda: w4a8(128, ())),
    Case("int4-with-int8", "of a Conv", lambda: mixed(np.int8, INT4, "Conv")),
    Case("int4-with-int8-read", "4-bit weights with 8-bit data", lambda: w4a8(128, (CHANNELS,), axis=1)),
    Case("int4-block", "a scale of shape [32]", lambda: four_bit(128, 32, (32,), axis=1)),
    Case("int4-block", "blocks of 4", lambda: four_bit(128, 32, (32, 32))),
    Case("int4-block-size", "blocks of 32", lambda: four_bit(128, 32, (4, 32))),
    Case("int4-row", "33 elements in the last axis", lambda: four_bit(128, 33, (2, 33))),
    Case("int4-count", "33 elements of 4 bits", lambda: four_bit(1, 33, (33,), axis=1)),
    Case("int4-first", "as input 0 of a MatMul", lambda: int4_first(128, (2, CHANNELS))),
    Case("int4-consumer", "as input 0 of a MatMul", lambda: int4_first(128, (2, CHANNELS))),
    Case(
        "int4-conv",
        "4-bit weights of a Conv",
        lambda: conv(lambda b: b.blocks(32, 32, 1, 1, scales=(32,)), data=floats),
    ),
    # sums
    Case("half-sum", "sums of codes of up to 81920, 32 of 32 channels above", lambda: sums(5, -128)),
    Case("half-sum", "sums of codes of up to 81920", lambda: sums(5, -128, op="Gemm")),
    Case("half-scale", "products of scales down to 1.0e-05, 32 of 32 subnormal", lambda: sums(3, 1, smallest=1e-4)),
    Case("half-sum", "sums of codes of up to 131072", lambda: w4a8(1024, (CHANNELS,), axis=1)),
    # placement
    Case("activation-scale", "a scale per channel", lambda: matmul(square, data=channels)),
    Case("activation-scale", "a scale per channel", lambda: conv(data=channels)),
    Case("activation-scale-read", "a scale per channel", lambda: quantized(np.full(CHANNELS, 0.1), axis=1)),
    Case("activation-vector", "a scale of shape [1]", lambda: conv(data=vector)),
    Case("scale-crash", "computed at run time", lambda: conv(data=runtime_data)),
    Case("runtime-scale", "computed at run time", lambda: matmul(square, data=runtime_data)),
    Case(
        "transposed-conv",
        "a quantized ConvTranspose",
        lambda: conv(lambda b: b.weight(32, 32, 3, 3, axis=1), op="ConvTranspose"),
    ),
    Case("turing-conv", "an INT8 Conv on sm75", conv_model, gpu=75),
    Case("dq-placement", "a Relu between", lambda: matmul(then("Relu", square))),
    Case("dq-placement", "a Mul between", lambda: matmul(then("Mul", square, (np.arange(1, 33),)))),
    Case("dq-placement-read", "a Transpose between", lambda: matmul(then("Transpose", row))),
    Case("dq-placement-read", "a Reshape between", lambda: matmul(then("Reshape", square, ([32, 32], np.int64)))),
    Case("joined-weights", "a Concat of dequantized weights", lambda: matmul(joined)),
    Case("both-inputs", "quantized weights with float data", lambda: matmul(square, data=floats)),
    Case(
        "both-inputs",
        "quantized weights with float data",
        lambda: matmul(square, data=lambda b, x: b.op("Relu", b.pair(x))),
    ),
    Case("both-inputs", "quantized weights with float data", lambda: conv(data=filled)),
    Case("both-inputs", "quantized data with float weights", lambda: matmul(lambda b: ones(b, *SQUARE))),
    Case("residual-add", "one quantized and one float branch", lambda: add(one_sided=True)),
    Case("concat-scales", "branches of different scales", lambda: concat(0.2)),
    Case("pad-before-op", "a Pad before a Conv", lambda: padded()),
    Case("pad-before-op", "a Pad before a Conv", lambda: padded(quantize=False)),
    Case(
        "redundant-pair",
        "QuantizeLinear directly after a DequantizeLinear",
        lambda: graph(lambda b: b.pair(b.pair(b.input("x", *ROWS)))),
    ),
    Case("shared-tensor", "3 scales for one tensor", lambda: several_scales(0.1, 0.2, 0.3)),
    Case("clip-type", "a Clip of INT8", clipped_codes),
    Case("clip-bounds", "a bound of 31.5", lambda: clipped(-3.2, 3.15)),
    Case("attention-product", "over 1024 tokens", lambda: attention(1024)),
    Case("attention-product-read", "a quantized product of two activations", lambda: attention(64)),
    # operators
    Case(
        "operator",
        "MatMulInteger",
        lambda: single("MatMulInteger", *ROWS, dtype=np.int8, more=lambda b: [ones(b, *SQUARE, dtype=np.int8)]),
    ),
    Case("operator", "Det", lambda: single("Det", *SQUARE)),
    Case("operator", "com.example::Mystery", lambda: single("Mystery", *ROWS, domain="com.example")),
    Case(
        "integer-operator",
        "MatMulInteger",
        lambda: single("MatMulInteger", *ROWS, dtype=np.int8, more=lambda b: [ones(b, *SQUARE, dtype=np.int8)]),
    ),
    Case("operator-form", "a Softmax of 1-D data", lambda: single("Softmax", 32)),
    Case("operator-form", "an ArgMin of 1-D data", lambda: single("ArgMin", 32)),
    Case("operator-form", "a ReduceMax of 0-D data", lambda: single("ReduceMax", keepdims=0)),
    Case("operator-form", "a ReduceMax of BOOL", lambda: single("ReduceMax", *ROWS, dtype=np.bool_)),
    Case(
        "operator-form",
        "a Resize with antialias",
        lambda: single(
            "Resize",
            1,
            4,
            8,
            8,
            more=lambda b: ["", b.constant([1, 1, 0.5, 0.5], np.float32)],
            mode="linear",
            antialias=1,
        ),
    ),
    Case(
        "operator-form",
        "a ScatterND that reduces by add",
        lambda: single("ScatterND", *ROWS, more=lambda b: [int64(b, [[0]]), ones(b, 1, 32)], reduction="add"),
    ),
    Case("operator-form", "a TopK of 3841", lambda: top(3841)),
    Case("operator-form", "a LayerNormalization of 3 outputs", lambda: layer_norm(3)),
    Case(
        "operator-form",
        "a MatMul of INT32",
        lambda: graph(
            lambda b: b.op("MatMul", b.input("x", *SQUARE, dtype=np.int32), b.input("y", *SQUARE, dtype=np.int32))
        ),
    ),
    Case("operator-form", "a Mul of BOOL", lambda: two_inputs("Mul", np.bool_, np.bool_)),
    Case(
        "operator-form",
        "a Cast to INT16",
        lambda: graph(lambda b: b.op("Cast", b.op("Cast", b.input("x", *ROWS), to=5), to=10)),
    ),
    Case(
        "operator-form",
        "a Cast to UINT8 inside the graph",
        lambda: graph(lambda b: b.op("Cast", b.op("Cast", b.input("x", *ROWS), to=2), to=10)),
    ),
    Case("operator-form", "a Celu", lambda: single("Celu", *ROWS)),
    Case("operator-form", "a MatMulNBits", matmul_n_bits),
    Case("uint8-input", "UINT8 in a Transpose", lambda: unsigned_input("Transpose")),
    Case("attention-operator", "an Attention of FLOAT", lambda: attention_operator(64, np.float32)),
    Case("attention-operator", "an Attention with heads of 8", lambda: attention_operator(8)),
    Case("attention-operator", "an Attention with heads of 264", lambda: attention_operator(264)),
    Case("operand-type", "operands of FLOAT16 and FLOAT", lambda: typed(np.float16, np.float32)),
    Case("operand-type", "operands of FLOAT and FLOAT16", lambda: typed(np.float32, np.float16, "Gemm")),
    Case("operand-type", "operands of FLOAT16 and FLOAT", lambda: two_inputs("Add", np.float16, np.float32)),
    # structure
    Case("constant-type", "INT16 constants", lambda: unused_constant(np.int16)),
    Case("constant-type", "UINT4 constants", lambda: quantized(dtype=UINT4)),
    Case("interface-type", "input x of type INT16", lambda: single("Cast", *ROWS, dtype=np.int16, to=10)),
    Case("interface-type", "without a type", untyped),
    Case("gpu-type", "FLOAT8E4M3FN on sm86", lambda: mixed(FP8, FP8), gpu=86),
    Case(
        "gpu-type",
        "FLOAT4E2M1 on sm89",
        lambda: matmul(lambda b: b.blocks(*SQUARE, scales=(2, CHANNELS), dtype=FP4), data=floats, opset=23),
        gpu=89,
    ),
    Case("gpu-type", "INT4 on sm75", lambda: four_bit(128, 32, (2, 32)), gpu=75),
    Case("gpu-type", "BFLOAT16 on sm75", lambda: quantized(graph=BFLOAT16), gpu=75),
    Case("opset", "a FLOAT16 scale in opset 18", lambda: quantized(opset=18)),
    Case("opset", "4-bit codes in opset 19", lambda: quantized(dtype=INT4, opset=19)),
    Case("opset-newest", "opset 23", lambda: quantized(opset=23)),
    Case("small-layer", "8 x 32 channels", lambda: matmul(lambda b: b.weight(8, 32, axis=1), x=(4, 8))),
    Case("small-layer", "a Conv of 2 groups", lambda: conv(lambda b: b.weight(32, 16, 3, 3), group=2)),
    Case("gemm-factors", "alpha 0.5, beta 1", lambda: matmul(square, op="Gemm", alpha=0.5)),
    Case(
        "gemm-rank",
        "inputs of rank 3 and 2",
        lambda: matmul(lambda b: ones(b, *SQUARE), op="Gemm", x=(2, 4, 32), data=floats),
    ),
    Case("float32-graph", "all scales FLOAT", lambda: quantized(graph=np.float32)),
]
NEAR: list[Case] = [
    Case("zero-point", "", quantized),
    Case("quantized-type", "", lambda: matmul(stored(lambda b: ones(b, *SQUARE, dtype=np.int8)))),
    Case("uint8-codes", "", lambda: declared("QuantizeLinear", output_dtype=3, bare=True)),
    Case("quantized-bias", "", lambda: biased(np.int8)),
    Case("scale-value", "", lambda: quantized(0.1, scale_type=np.float64)),  # DOUBLE becomes FLOAT
    Case("scale-value", "", negative_int4),
    Case("scale-precision", "", lambda: quantized(1e-4)),
    Case("output-type", "", lambda: declared("DequantizeLinear", output_dtype=10, bare=True)),
    Case("constant-codes", "", lambda: matmul(then("Transpose", stored(lambda b: ones(b, *SQUARE, dtype=np.int8))))),
    Case("constant-codes", "", lambda: graph(lambda b: stored(lambda b: ones(b, 1, dtype=np.int8))(b))),
    Case("scale-shape", "", lambda: four_bit(96, 32, (3, 32))),
    Case("scale-shape", "", lambda: four_bit(128, 32, (128,))),
    Case("weight-axis", "", lambda: matmul(lambda b: b.weight(*SQUARE, axis=None, scale=np.arange(1, 33)))),
    Case("weight-axis", "", lambda: matmul(lambda b: b.weight(*SQUARE, axis=-1, scale=np.arange(1, 33)))),
    Case("weight-axis", "", lambda: matmul(then("Transpose", row))),
    Case("weight-axis", "", lambda: conv(unstated, opset=12, dtype=np.float32)),  # axis 0 was the default
    Case("weight-axis", "", lambda: matmul(then("Squeeze", lambda b: b.weight(1, *SQUARE, axis=2), ([0], np.int64)))),
    Case("weight-axis", "", lambda: conv(then("Reshape", lambda b: b.weight(32, 32, 9), ([32, 32, 3, 3], np.int64)))),
    Case("weight-vector", "", lambda: conv(lone, dtype=np.float32)),
    Case("weight-vector", "", lambda: conv(lambda b: b.weight(1, CHANNELS, 3, 3))),
    Case("block-sum", "", lambda: four_bit(128, 32, (2, 32))),
    Case("block-sum", "", lambda: w4a8(128, (1, CHANNELS))),
    Case("block-transpose", "", lambda: w4a8(128, (CHANNELS,), turned=True)),
    Case("mixed-codes", "", lambda: mixed(FP8, FP8)),
    Case("int4-with-int8", "", lambda: w4a8(128, (CHANNELS,), axis=1)),
    Case("int4-count", "", lambda: four_bit(128, 33, (2, 33))),
    Case("int4-first", "", lambda: int4_first(128, (128,))),
    Case("half-sum", "", lambda: sums(3, -128)),  # 49152
    Case("half-sum", "", lambda: sums(5, -128, dtype=np.float32)),
    Case("half-sum", "", lambda: sums(5, -128, axis=None)),
    Case("half-scale", "", lambda: sums(3, 1, smallest=1e-3)),
    Case("half-scale", "", lambda: sums(3, 1, smallest=1e-4, axis=None)),
    Case("half-scale", "", lambda: sums(3, 1, smallest=1e-4, dtype=np.float32)),
    Case("half-sum", "", lambda: sums(15, -128, data=clip_to_six_bits)),  # 61440
    Case("activation-scale", "", lambda: matmul(square)),
    Case("activation-vector", "", lambda: matmul(square, data=vector)),
    Case("scale-crash", "", lambda: conv(data=runtime_codes)),
    Case("scale-crash", "", lambda: conv(data=product_of_constants)),
    Case("scale-crash", "", lambda: conv(lambda b: ones(b, CHANNELS, CHANNELS, 3, 3), data=runtime_data)),
    Case("runtime-scale", "", lambda: matmul(square, data=runtime_codes)),
    Case("transposed-conv", "", lambda: conv(lambda b: ones(b, 32, 32, 3, 3), op="ConvTranspose", data=floats)),
    Case("turing-conv", "", conv_model, gpu=80),
    Case("dq-placement", "", lambda: matmul(then("Mul", square, (2.0,)))),
    Case(
        "dq-placement",
        "",
        lambda: matmul(
            then("Slice", lambda b: b.weight(64, 32, axis=1), ([0], np.int64), ([32], np.int64), ([0], np.int64))
        ),
    ),
    Case("joined-weights", "", lambda: matmul(lambda b: joined(b, dequantized=False))),
    Case(
        "both-inputs",
        "",
        lambda: matmul(square, x=(2, 2, 32), data=lambda b, x: b.op("Reshape", b.pair(x), int64(b, [4, 32]))),
    ),
    Case("both-inputs", "", lambda: conv(data=lambda b, x: b.op("Pad", b.pair(x), int64(b, EDGES)))),
    Case("both-inputs", "", lambda: conv(data=lambda b, x: b.op("MaxPool", b.pair(x), kernel_shape=[2, 2]))),
    Case("clip-bounds", "", lambda: clipped(-3.2, 3.1)),
    Case("attention-product", "", lambda: attention(512)),
    Case("attention-product", "", lambda: attention(1024, dtype=FP8)),
    Case("operator", "", lambda: single("Relu", *ROWS, domain="com.example")),  # the parser looks at the name alone
    Case("operator-form", "", lambda: single("Softmax", 1, 32)),
    Case("operator-form", "", lambda: single("ReduceMax", 32, keepdims=0)),
    Case("operator-form", "", lambda: top(3840)),
    Case("operator-form", "", lambda: layer_norm(1)),
    Case("operator-form", "", lambda: single("Cast", *ROWS, to=2)),
    Case("uint8-input", "", lambda: unsigned_input("Cast", to=10)),
    Case("attention-operator", "", lambda: attention_operator(9)),
    Case("attention-operator", "", lambda: attention_operator(256, BFLOAT16)),
    Case("operand-type", "", lambda: typed(np.float32, np.float32)),
    Case("constant-type", "", lambda: unused_constant(np.float64)),
    Case("interface-type", "", lambda: single("Cast", *ROWS, dtype=np.float64, to=10)),
    Case("gpu-type", "", lambda: mixed(FP8, FP8), gpu=89),
    Case("gpu-type", "", lambda: mixed(FP8, FP8)),
    Case("gemm-rank", "", lambda: matmul(square, x=(2, 4, 32))),
    Case("float32-graph", "", lambda: quantized(graph=BFLOAT16)),
]
