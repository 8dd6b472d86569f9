"""The float16 graph that an engine is compared with: what a lowered graph was before it was quantized."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DModel
from layers import SPECS, TIMESTEPS, conv2d, linear, marked_model, random_input, random_layer
from oracle import add_bias, dequantize_weight, operate, shift_of_columns
from qdq import GraphBuilder, conv_model
from rtx import needs_rtx

from dmq_export.batch import Batch
from dmq_export.bits import Bits
from dmq_export.checkpoint import Checkpoint
from dmq_export.commands.export import export_graph
from dmq_export.errors import ExportError
from dmq_export.graph.export import serialized
from dmq_export.graph.float_twin import float_twin
from dmq_export.graph.integer import lower_integer
from dmq_export.graph.lower import lower
from dmq_export.layer import QuantizedLayer
from dmq_export.metadata import METADATA_KEY
from engines.onnxruntime import OnnxSession
from engines.tensorrt.compiler import Compiled, Request, compile_onnx

FITTING = {name: spec for name, spec in SPECS.items() if spec.bits.weight < 8}
HALF = 2e-3  # of the largest output: half precision's rounding of the weights, of the input and of sums


def lowered(layer: QuantizedLayer, x: np.ndarray) -> ir.Model:
    model = marked_model(layer.spec, x)
    lower(model, (layer,), TIMESTEPS, lower_integer("tensorrt"))
    model.metadata_props[METADATA_KEY] = "{}"
    return model


def plain_output(layer: QuantizedLayer, x: np.ndarray) -> np.ndarray:
    """``op(x / tau, w^) + b``: the layer without the rounding of its input."""
    weight = dequantize_weight(layer)
    if layer.spec.groups == 1:
        tau = layer.tau.reshape(-1, *(1,) * (weight.ndim - 2))
    else:
        tau = shift_of_columns(layer.spec, layer.tau, weight.ndim)
    return add_bias(layer, operate(layer.spec, x.astype(np.float64), weight / tau))


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("scheme", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("activation", [8, 6])
@pytest.mark.parametrize("name", FITTING)
def test_a_layer_becomes_its_one_operator_again(name: str, activation: int, scheme: str, steps: int) -> None:
    spec = replace(FITTING[name], bits=Bits(FITTING[name].bits.weight, activation), scheme=scheme)
    layer = random_layer(spec, steps=steps)
    x = random_input(spec).astype(np.float16)
    twin = float_twin(lowered(layer, x))
    operators = [node.op_type for node in twin.graph if node.op_type != "Identity"]
    assert operators == (["MatMul", "Add"] if spec.kind == "linear" else ["Conv"])
    (found,) = OnnxSession(serialized(twin)).run({"sample": x, "timestep": TIMESTEPS[0]}).values()
    expected = plain_output(layer, x)
    assert np.abs(found - expected).max() <= HALF * np.abs(expected).max()


@pytest.mark.parametrize("spec", [conv2d(), linear()])
def test_a_layer_without_a_bias_has_none_again(spec: object) -> None:
    layer = random_layer(spec, bias=False)  # type: ignore[arg-type]
    twin = float_twin(lowered(layer, random_input(layer.spec)))
    (node,) = (node for node in twin.graph if node.op_type != "Identity")
    assert len(node.inputs) == 2


def test_a_network_becomes_what_was_traced(tiny_checkpoint: Checkpoint) -> None:
    """As many operators as a plain export has, and the predictions of the quantized graph up to its rounding."""
    exported = export_graph(tiny_checkpoint, "tensorrt", "float16").model
    before = Counter(node.op_type for node in exported.graph)
    twin = float_twin(exported)
    assert Counter(node.op_type for node in exported.graph) == before
    kinds = Counter(node.op_type for node in twin.graph)
    convolutions = sum(layer.spec.kind == "conv2d" for layer in tiny_checkpoint.layers)
    assert kinds["Conv"] == convolutions + 2  # the first and the last one
    assert not set(kinds) & {"QuantizeLinear", "DequantizeLinear", "Pad", "Clip", "Max", "Min", "ArgMin", "Split"}
    probe = tiny_checkpoint.probe
    inputs = {"sample": probe.sample[0].astype(np.float16), "timestep": probe.timesteps[0], **probe.conditioning}
    (found,) = OnnxSession(serialized(twin)).run(inputs).values()
    (quantized,) = OnnxSession(serialized(exported)).run(inputs).values()
    error = found.astype(np.float64) - quantized
    assert 0 < np.sqrt((error**2).mean() / (found.astype(np.float64) ** 2).mean()) < 0.2


def test_a_graph_of_another_tool_loses_its_quantizers() -> None:
    """On inputs that quantize without error, both are one float convolution of the dequantized weights."""
    model = conv_model()
    x = (np.random.default_rng(0).integers(-127, 128, (1, 32, 8, 8)) * np.float32(0.1)).astype(np.float16)
    (expected,) = OnnxSession(serialized(model)).run({"x": x}).values()
    twin = float_twin(model)
    assert [node.op_type for node in twin.graph] == ["Conv"]
    (found,) = OnnxSession(serialized(twin)).run({"x": x}).values()
    np.testing.assert_allclose(found, expected, atol=HALF * np.abs(expected).max())


def test_weights_become_what_they_stand_for() -> None:
    b = GraphBuilder()
    scale = np.linspace(0.1, 0.4, 32)
    blocks = np.repeat(np.linspace(0.1, 0.2, 4)[:, None], 32, 1)
    x = b.pair(b.input("x", 4, 256))
    quarter = b.op("DequantizeLinear", b.int4(256, 32), b.constant(blocks), axis=0, block_size=64)
    model = b.model(b.op("MatMul", x, b.weight(256, 32, axis=1, scale=scale)), b.op("MatMul", x, quarter))
    per_channel, per_block = (node.inputs[1].const_value.numpy() for node in float_twin(model).graph)
    assert per_channel.dtype == per_block.dtype == np.float16
    np.testing.assert_array_equal(per_channel, np.broadcast_to(scale.astype(np.float16), (256, 32)))
    np.testing.assert_array_equal(per_block, np.repeat(blocks.astype(np.float16), 64, 0))


def test_a_float32_graph_becomes_float16() -> None:
    twin = float_twin(conv_model(dtype=np.float32))
    assert twin.graph.inputs[0].dtype == ir.DataType.FLOAT16
    assert {value.dtype for value in twin.graph.initializers.values()} == {ir.DataType.FLOAT16}


def test_codes_that_come_from_outside_have_no_float_graph() -> None:
    b = GraphBuilder()
    codes = b.input("x", 4, 16, dtype=np.int8)
    data = b.op("DequantizeLinear", codes, b.constant(0.1))
    with pytest.raises(ExportError, match="layer0/DequantizeLinear dequantizes what no QuantizeLinear made"):
        float_twin(b.model(b.op("MatMul", data, b.weight(16, 32, axis=1))))


def test_it_can_be_written_and_read(tmp_path: Path) -> None:
    ir.save(float_twin(conv_model()), tmp_path / "m.onnx", external_data="m.onnx.data")
    assert [node.op_type for node in ir.load(tmp_path / "m.onnx").graph] == ["Conv"]


@needs_rtx
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # PyTorch's exporter
def test_the_compiler_makes_of_it_what_it_makes_of_pytorchs_own_export(
    tiny_model: Path, tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    ir.save(
        float_twin(export_graph(tiny_checkpoint, "tensorrt", "float16", Batch(2, 2, 2)).model), tmp_path / "twin.onnx"
    )
    plain_export(tiny_model, tiny_checkpoint.probe.sample[0][:2], tmp_path / "plain.onnx")
    twin, plain = (compile_onnx(Request(tmp_path / f"{name}.onnx")) for name in ("twin", "plain"))
    assert isinstance(twin, Compiled)
    assert isinstance(plain, Compiled)
    assert twin.table.kinds == plain.table.kinds
    assert twin.table.activation_bytes == plain.table.activation_bytes
    assert abs(twin.table.constant_bytes - plain.table.constant_bytes) < 0.02 * plain.table.constant_bytes


def plain_export(folder: Path, sample: np.ndarray, path: Path) -> None:
    """The float16 network as PyTorch exports it, with nothing of ours."""

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = UNet2DModel.from_pretrained(folder / "unet").half()

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return self.unet(sample, timestep, labels, return_dict=False)[0]

    inputs = torch.from_numpy(sample).half(), torch.tensor(10.0), torch.tensor([0, 1])
    program = torch.onnx.export(Network().eval(), inputs, dynamo=True, opset_version=21, verbose=False)
    program.save(path)
