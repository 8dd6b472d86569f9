"""Small quantized graphs for the linter, built by hand as other tools build them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 32
HALF = np.float16


class GraphBuilder:
    """Collects nodes and initializers; every node is called after its operator and its place."""

    def __init__(self, opset: int = 21, dtype: type = HALF) -> None:
        self.opset = opset
        self.dtype = dtype
        self.nodes: list[onnx.NodeProto] = []
        self.initializers: list[onnx.TensorProto] = []
        self.inputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, *shape: int | str, dtype: type | None = None) -> str:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype or self.dtype))
        self.inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def constant(self, value: Any, dtype: Any = None) -> str:
        name = f"constant_{len(self.initializers)}"
        array = np.asarray(value, self.dtype if dtype is None else dtype)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def int4(self, *shape: int) -> str:
        name = f"constant_{len(self.initializers)}"
        self.initializers.append(helper.make_tensor(name, TensorProto.INT4, shape, [1] * int(np.prod(shape))))
        return name

    def op(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"layer{len(self.nodes)}/{op_type}"
        self.nodes.append(helper.make_node(op_type, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    def pair(self, x: str, scale: Any = 0.1, dtype: Any = np.int8, **attributes: Any) -> str:
        """QuantizeLinear and DequantizeLinear with a zero point of 0."""
        zero = self.constant(np.zeros_like(np.asarray(scale)), dtype)
        scales = self.constant(scale)
        codes = self.op("QuantizeLinear", x, scales, zero, **attributes)
        return self.op("DequantizeLinear", codes, scales, zero, **attributes)

    def weight(self, *shape: int, axis: int | None = 0, scale: Any = None, dtype: Any = np.int8) -> str:
        """INT8 codes and their DequantizeLinear."""
        if scale is None:
            scale = 0.1 if axis is None else 0.1 + 0.001 * np.arange(shape[axis])
        attributes = {} if axis is None else {"axis": axis}
        codes = self.constant(np.ones(shape), dtype)
        return self.op("DequantizeLinear", codes, self.constant(scale), **attributes)

    def blocks(self, *shape: int, scales: tuple[int, ...], axis: int = 0, dtype: Any = ml_dtypes.int4) -> str:
        """Codes, with a scale per block, each another, and their DequantizeLinear."""
        varied = 0.1 + 0.001 * np.arange(np.prod(scales)).reshape(scales)
        return self.op("DequantizeLinear", self.constant(np.ones(shape), dtype), self.constant(varied), axis=axis)

    def model(self, *outputs: str, typed: bool = True) -> ir.Model:
        """The graph; outputs whose type ONNX cannot infer get the builder's."""
        values = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph(self.nodes, "graph", self.inputs, values, self.initializers)
        domains = {node.domain: 1 for node in self.nodes if node.domain} | {"": self.opset}
        imports = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        model = helper.make_model(graph, opset_imports=imports, ir_version=10)
        inferred = onnx.shape_inference.infer_shapes(model).graph.output
        for value, found in zip(model.graph.output, inferred, strict=True) if typed else ():
            value.type.tensor_type.elem_type = found.type.tensor_type.elem_type or helper.np_dtype_to_tensor_dtype(
                np.dtype(self.dtype)
            )
        return ir.from_proto(model)


def conv_model(**changes: Any) -> ir.Model:
    """One 3x3 convolution in the form TensorRT takes; ``changes`` break it."""
    b = GraphBuilder(changes.get("opset", 21), changes.get("dtype", HALF))
    x = b.input("x", 1, CHANNELS, 8, 8)
    data = b.pair(x, changes.get("scale", 0.1))
    weight = b.weight(CHANNELS, CHANNELS, 3, 3)
    bias = b.constant(np.zeros(CHANNELS))
    return b.model(b.op("Conv", data, weight, bias, pads=[1, 1, 1, 1]))


def wide_model() -> ir.Model:
    """Every construct the linter looks at, each as it should be."""
    b = GraphBuilder()
    x = b.input("x", 1, CHANNELS, 8, 8)
    clipped = b.op("Clip", x, b.constant(-3.2), b.constant(3.1))
    data = b.pair(clipped, 0.1)
    convolved = b.op("Conv", data, b.weight(CHANNELS, CHANNELS, 3, 3), pads=[1, 1, 1, 1])
    transposed = b.op("ConvTranspose", x, b.constant(np.ones((CHANNELS, CHANNELS, 3, 3))), pads=[1, 1, 1, 1])
    added = b.op("Add", b.pair(convolved, 0.2), b.pair(transposed, 0.3))
    joined = b.op("Concat", b.pair(added, 0.4), b.pair(x, 0.4), axis=1)
    rows = b.op("Reshape", joined, b.constant([-1, 2 * CHANNELS], np.int64))
    product = b.op("MatMul", b.pair(rows, 0.5), b.weight(2 * CHANNELS, CHANNELS, axis=1))
    general = b.op("Gemm", b.pair(product, 0.6), b.weight(CHANNELS, CHANNELS), b.constant(np.zeros(CHANNELS)), transB=1)
    queries = b.op("MatMul", general, b.op("Transpose", general))
    four_bits = b.op("DequantizeLinear", b.int4(128, CHANNELS), b.constant(np.full((2, CHANNELS), 0.1)), axis=0)
    wide = b.op("MatMul", b.input("wide", 4, 128), four_bits)
    return b.model(queries, wide)
