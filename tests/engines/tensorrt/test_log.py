"""TensorRT's log, as users have posted it, becomes a layer, a reason and a remedy."""

import pytest

from engines.tensorrt.log import explain, layers_in, node_names

LAYERS = ("down_blocks.0.resnets.0.conv1", "down_blocks.0.resnets.0", "mid_block.attentions.0.to_q", "conv_out")
NO_KERNEL = """\
[08/14/2026-19:28:56] [TRT] [I] Local timing cache in use. Profiling results in this builder pass will not be stored.
[08/14/2026-19:33:23] [TRT] [E] Error[10]: Could not find any implementation for node \
down_blocks.0.resnets.0.conv1/weight_codes + down_blocks.0.resnets.0.conv1/weight + \
down_blocks.0.resnets.0.conv1/output + PWN(PWN(node_sigmoid_3), node_mul_7).
[08/14/2026-19:33:23] [TRT] [E] IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any \
implementation for node down_blocks.0.resnets.0.conv1/weight_codes + down_blocks.0.resnets.0.conv1/output.)
[!] Invalid Engine. Please ensure the engine was built correctly"""
ZERO_POINT = """\
[E] In node 12 with name: mid_block.attentions.0.to_q/codes and operator: QuantizeLinear (QuantDequantLinearHelper): \
INVALID_NODE: Assertion failed: shiftIsAllZeros(zeroPoint): TensorRT only supports symmetric quantization. The zero \
point for the QuantizeLinear/DequantizeLinear operator must be all zeros.
[!] Could not parse ONNX correctly"""
SCALE = """\
[E] In node 3 with name: conv_out/rounded_input and operator: DequantizeLinear (QuantDequantLinearHelper): \
INVALID_NODE: Assertion failed: scaleAllPositive: Scale coefficients must all be positive"""
FOREIGN = """\
[W] Skipping tactic 0x0000000000000000 due to Myelin error: autotuning failed
[E] Error Code 10: Internal Error (Could not find any implementation for node \
{ForeignNode[mid_block.attentions.0.to_q/weight...mid_block.attentions.0.to_q/output]}.)"""
WORKSPACE = """\
[W] Skipping tactic 0 due to insufficient memory on requested size of 4831838208 detected for tactic 0x00000000000003e8.
[E] Error Code 10: Internal Error (Could not find any implementation for node conv_out/output.)"""
MEMORY = """\
[E] Error Code 1: Cuda Runtime (out of memory)
[E] [virtualMemoryBuffer.cpp::resizePhysical::142] Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)"""
PROFILE = """\
[E] Error Code 4: API Usage Error (Network has dynamic or shape inputs, but no optimization profile has been \
defined)"""
MIXED = """\
[E] ITensor::getDimensions: Error Code 4: API Usage Error (node_add_3: ElementWiseOperation SUM must have same \
input types. But they are of types Half and Float.)"""
IMPORTER = """\
[E] In node 1 with name: q/QLinearConv and operator: QLinearConv (parseNode): UNSUPPORTED_NODE: No importer \
registered for op: QLinearConv"""
KERNEL = "[E] Error Code 2: Internal Error (Could not fuse 2nd input (kernel weights) of CONVOLUTION conv_out/output)"
MYELIN = (
    "[E] Error Code 9: Internal Error (Could not infer output types for operation: dequantize: conv_out/rounded_input)"
)
TYPES = """\
IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([pass.cpp:1500: run_passes] Cannot compile for target(s) sm86, \
because the model contains HW-specific datatypes: fp8_e4m3. In compileGraph at /_src/codeGenerator.cpp:2012)"""
FEW = """\
ITensor::getDimensions: Error Code 3: API Usage Error (step/row: at least 2 dimensions are required for input. In \
checkNOrMoreDims at /_src/optimizer/api/network.cpp:865)"""
INITIALIZER = """\
Failed to import initializer: In node -1 with name:  and operator:  (importInitializers): UNSUPPORTED_NODE: \
Assertion failed: ctx->getWeightsContext().convertOnnxWeights(initializer, &weights): Failed to import initializer: \
conv_out/codes"""
QUANTIZED = """\
IBuilder::buildSerializedNetwork: Error Code 4: API Usage Error (Quantized constant (conv_out/codes) is only allowed \
before DQ or PLUGIN_V2 or kPLUGIN_V3 node. In matchQuantizedConstantPluginOrDQ at /_src/qdqGraphOptimizer.cpp:4327)"""
CHECK = """\
IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([myelin_graph.h:1295: attachExceptionMsgToGraph] \
MyelinCheckException: operand.h:454: CHECK(is_tensor()) failed.  In compileGraph at /_src/codeGenerator.cpp:2012)"""
UNTYPED = """\
Assertion failed: convertDtype(output.type().tensor_type().elem_type(), &output_trt_dtype): Failed to convert ONNX \
date type to TensorRT data type."""
PLAN = """\
[E] IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion stdVersionRead == \
kSERIALIZATION_VERSION failed. The engine plan file is not compatible with this version of TensorRT, expecting \
library version 11.4.0.106 got 10.16.1.11, please rebuild.)"""


@pytest.mark.parametrize(
    ("log", "layers", "reason", "remedy"),
    [
        (NO_KERNEL, LAYERS[:1], "no kernel", "calibrate --float-layer down_blocks.0.resnets.0.conv1, export again"),
        (ZERO_POINT, (LAYERS[2],), "a zero point other than 0", "dmq-export lint"),
        (SCALE, ("conv_out",), "a scale of 0 or below", "--float-layer conv_out"),
        (FOREIGN, (LAYERS[2],), "no kernel", "--float-layer mid_block.attentions.0.to_q"),
        (WORKSPACE, ("conv_out",), "no kernel fits the workspace", "raise --workspace"),
        (MEMORY, (), "the GPU ran out of memory", "lower the largest --shapes"),
        (PROFILE, (), "an input of open size", "--shapes NAME:MIN,OPT,MAX"),
        (MIXED, (), "float types that do not agree", "export again with one --dtype"),
        (IMPORTER, ("q/QLinearConv",), "an operator that is not there", "dmq-export lint"),
        (KERNEL, ("conv_out",), "quantized weights that are not recognised", "dmq-export lint"),
        (MYELIN, ("conv_out",), "types the kernel compiler cannot infer", "--float-layer"),
        (TYPES, (), "a type that one of the GPUs does not have", "--compute-capability"),
        (FEW, (), "data of too few dimensions", "dmq-export lint"),
        (INITIALIZER, ("conv_out",), "a constant of a type that is not read", "dmq-export lint"),
        (QUANTIZED, ("conv_out",), "an integer constant that no DequantizeLinear reads", "dmq-export lint"),
        (CHECK, (), "the compiler gave up on the graph", "report it with the ONNX file"),
        (UNTYPED, (), "an input or output of the graph that states no type", "onnx.shape_inference"),
        (PLAN, (), "a plan of another TensorRT", "build again with the TensorRT that will run the plan"),
    ],
)
def test_a_log_is_explained(log: str, layers: tuple[str, ...], reason: str, remedy: str) -> None:
    failure = explain(log.splitlines(), LAYERS)
    assert failure.layers == layers
    assert reason in failure.reason
    assert remedy in failure.remedy
    assert "\n" not in failure.text()
    assert not failure.log.startswith("[")


def test_an_unknown_log_gives_its_last_error() -> None:
    log = ["[I] Building engine", "[E] Error Code 7: Internal Error (something new)", "[I] Done"]
    failure = explain(log)
    assert failure.reason == "Error Code 7: Internal Error (something new)"
    assert failure.text().startswith("Error Code 7: Internal Error (something new): report it with the ONNX file")
    assert explain([]).reason == "the log gives no reason"


def test_the_node_that_the_parser_names_counts_and_positions_in_its_source_do_not() -> None:
    failure = explain(["something new. In parse at /_src/parser.cpp:12)"], LAYERS, "conv_out/product")
    assert (failure.layers, failure.log) == (("conv_out",), "something new)")


def test_colours_and_times_are_left_out() -> None:
    assert (
        explain(["\x1b[91m[E] Error Code 7: Internal Error (new)\x1b[0m"]).log == "Error Code 7: Internal Error (new)"
    )


def test_the_longest_layer_that_begins_a_name_is_meant() -> None:
    fused = "down_blocks.0.resnets.0.conv1/output + PWN(down_blocks.0.resnets.0/act, other)"
    assert layers_in(fused, LAYERS) == LAYERS[:2]
    assert layers_in("conv_output/x", LAYERS) == ()
    assert layers_in("/m/a/b/Conv", ("/m/a", "/m/a/b")) == ("/m/a/b",)


def test_fused_names_come_apart() -> None:
    assert node_names("a/b + PWN(PWN(c.d), e) || f") == ["a/b", "c.d", "e", "f"]
    assert node_names("{ForeignNode[a/x...b/y]}") == ["a/x", "b/y"]
    assert node_names("[ONNX Layer: a/x]\x1e[ONNX Layer: b]") == ["a/x", "b"]
