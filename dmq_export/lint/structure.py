"""Rules for the graph around the quantizers."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from dmq_export.lint.finding import Rule
from dmq_export.lint.view import QdqGraph, attribute, dequantized, element_type, shape

Breaches = Iterator[tuple[ir.Node | None, str]]
NEWEST_OPSET = 22  # of the parser of TensorRT 10.10; later ones take more and do not say how much
IMPORTED = frozenset(  # types of constants, inputs and outputs
    {
        ir.DataType.BFLOAT16,
        ir.DataType.BOOL,
        ir.DataType.DOUBLE,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT4E2M1,
        ir.DataType.FLOAT8E4M3FN,
        ir.DataType.INT32,
        ir.DataType.INT4,
        ir.DataType.INT64,
        ir.DataType.INT8,
        ir.DataType.UINT8,
    }
)
OLDEST_GPU = {  # of each type
    ir.DataType.BFLOAT16: 80,
    ir.DataType.INT4: 80,
    ir.DataType.FLOAT8E4M3FN: 89,
    ir.DataType.FLOAT4E2M1: 120,
}
SMALL, MULTIPLE = 16, 8  # channels below and besides which NVIDIA's own quantizer leaves an operator float


def _needed_opset(graph: QdqGraph) -> Breaches:
    needs = [
        (13, "a scale per channel", [each for each in graph.quantizers if shape(each.scale) not in ((), (1,), None)])
    ]
    halves = [each for each in graph.quantizers if element_type(each.scale) == ir.DataType.FLOAT16]
    needs.append((19, "a FLOAT16 scale", halves))
    needs.append((21, "4-bit codes", [each for each in graph.quantizers if each.type == ir.DataType.INT4]))
    for opset, what, users in needs:
        if users and graph.opset < opset:
            yield users[0].node, f"{what} in opset {graph.opset}, which {opset} introduced"


def _new_opset(graph: QdqGraph) -> Breaches:
    if graph.opset > NEWEST_OPSET:
        yield None, f"opset {graph.opset}"


def _constant_types(graph: QdqGraph) -> Breaches:
    for each in graph.model.graphs():
        for value in each.initializers.values():
            if value.const_value is not None and value.const_value.dtype not in IMPORTED:
                reader = next((use.node for use in value.uses()), None)
                yield reader, f"{value.const_value.dtype.name} constants"
    for node in graph.of_type("Constant"):
        kind = element_type(node.outputs[0])
        if kind is not None and kind not in IMPORTED:
            yield node, f"{kind.name} constants"


def _interface_types(graph: QdqGraph) -> Breaches:
    for value in graph.model.graph.inputs:
        if value.dtype is not None and value.dtype not in IMPORTED:
            yield None, f"input {value.name} of type {value.dtype.name}"
    for name in graph.untyped_outputs:
        yield None, f"output {name} without a type"


def _gpu_types(graph: QdqGraph) -> Breaches:
    gpu = graph.target.gpu
    found: dict[ir.DataType, ir.Node] = {}
    for node in graph.nodes if gpu is not None else ():
        for value in (*node.inputs, *node.outputs):
            kind = element_type(value) if value is not None else None
            if kind in OLDEST_GPU:
                found.setdefault(kind, node)
    for each in graph.quantizers if gpu is not None else ():
        found.setdefault(each.type, each.node)
    for kind, node in found.items():
        if gpu is not None and gpu < _oldest_gpu(graph, kind):
            yield node, f"{kind.name} on sm{gpu}"


def _oldest_gpu(graph: QdqGraph, kind: ir.DataType) -> int:
    """Data centers have FLOAT4E2M1 from sm100 on, which is no RTX GPU."""
    if kind == ir.DataType.FLOAT4E2M1 and graph.target.runtime == "tensorrt":
        return 100
    return OLDEST_GPU.get(kind, 0)


def _small_layers(graph: QdqGraph) -> Breaches:
    for node in graph.weighted:
        weight = dequantized(node.inputs[1])
        sizes = shape(weight.data) if weight is not None and weight.of_weight else None
        if sizes is None or len(sizes) < 2:
            continue
        groups = int(attribute(node, "group", 1))
        channels = [size for size in (sizes[:2] if node.op_type.startswith("Conv") else sizes[-2:]) if size is not None]
        if groups > 1:
            yield node, f"a {node.op_type} of {groups} groups"
        elif any(size < SMALL or size % MULTIPLE for size in channels):
            yield node, f"a {node.op_type} of {' x '.join(map(str, channels))} channels"


def _gemm_factors(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Gemm"):
        alpha, beta = (attribute(node, name, 1.0) for name in ("alpha", "beta"))
        if (alpha, beta) != (1.0, 1.0) and element_type(node.outputs[0]) == ir.DataType.FLOAT16:
            yield node, f"alpha {alpha:g}, beta {beta:g}"


def _gemm_ranks(graph: QdqGraph) -> Breaches:
    for node in graph.of_type("Gemm"):
        ranks = [len(sizes) for sizes in map(shape, node.inputs[:2]) if sizes is not None]
        if any(rank != 2 for rank in ranks):
            yield node, f"inputs of rank {' and '.join(map(str, ranks))}"


def _float_type(graph: QdqGraph) -> Breaches:
    if graph.quantizers and all(element_type(each.scale) == ir.DataType.FLOAT for each in graph.quantizers):
        yield None, "all scales FLOAT"


RULES = (
    Rule(
        "constant-type",
        "refused",
        "refused",
        "constants of FLOAT, FLOAT16, BFLOAT16, DOUBLE, INT8, INT4, FLOAT8E4M3FN, FLOAT4E2M1, INT32, INT64, UINT8 or "
        "BOOL, used or not",
        "onnx --target tensorrt writes INT8; elsewhere store the constant in another type",
        _constant_types,
    ),
    Rule(
        "interface-type",
        "refused",
        "refused",
        "inputs of a type that the runtime has, and outputs that state theirs",
        "state the type of every output; cast inputs outside",
        _interface_types,
    ),
    Rule(
        "gpu-type",
        "refused",
        "refused",
        "BFLOAT16 and INT4 from sm80, FLOAT8E4M3FN from sm89, FLOAT4E2M1 from sm100 and sm120",
        "choose a newer GPU with --gpu, or another type",
        _gpu_types,
    ),
    Rule(
        "opset",
        None,
        "refused",
        "opset 13 for scales per channel, 19 for FLOAT16 scales, 21 for 4-bit codes",
        "export with a newer opset",
        _needed_opset,
    ),
    Rule(
        "opset-newest",
        None,
        "slower",
        f"opset {NEWEST_OPSET} at most is documented for TensorRT 10.10; later releases take more",
        "export with an older opset",
        _new_opset,
        until=(11,),
    ),
    Rule(
        "small-layer",
        "slower",
        "slower",
        f"{SMALL} channels or more on both sides, multiples of {MULTIPLE}, one group: others often run faster in float",
        "measure with the layer left float (calibrate --float-layer NAME)",
        _small_layers,
        tried=False,
    ),
    Rule(
        "gemm-factors",
        None,
        "refused",
        "alpha and beta of 1 in a float16 Gemm: others become float32 constants",
        "multiply the factors into weights and bias",
        _gemm_factors,
    ),
    Rule("gemm-rank", "refused", "refused", "matrices; MatMul takes more dimensions", "use MatMul", _gemm_ranks),
    Rule(
        "float32-graph",
        "slower",
        "slower",
        "a float16 graph: all but the 8-bit kernels runs in the types that the graph states, and attention is one "
        "kernel in 16 bits only",
        "export with --dtype float16",
        _float_type,
    ),
)
