"""Tracing: one marker per layer of the right shape, quietly, or one line that says why not."""

import logging
from dataclasses import replace

import diffusers
import numpy as np
import onnx_ir as ir
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st
from layers import random_layer, specs
from oracle import operate

from calib.model.network import float_tensors
from calib.model.trace import _drop_idle_squeezes, _output_shape, trace_network
from dmq_export.bits import Bits
from dmq_export.checkpoint import Checkpoint, Probe, SourceInfo
from dmq_export.errors import ExportError
from dmq_export.graph.marker import DOMAIN, OPSET, OUTPUT
from dmq_export.layer import LayerSpec


@settings(max_examples=50, deadline=None)
@given(specs(), st.integers(5, 9), st.integers(5, 9))
def test_a_markers_output_has_the_shape_of_the_layers(spec: LayerSpec, height: int, width: int) -> None:
    sizes = {"linear": (height, spec.in_channels), "conv1d": (spec.in_channels, height)}
    shape = (2, *sizes.get(spec.kind, (spec.in_channels, height, width)))
    expected = operate(spec, np.zeros(shape), np.zeros(spec.weight_shape)).shape
    assert tuple(_output_shape(spec, list(shape))) == expected


@pytest.fixture(scope="module")
def traced_checkpoint() -> Checkpoint:
    """An unconditional model with one strided convolution and one linear layer quantized."""
    torch.manual_seed(0)
    network = UNet2DModel(
        sample_size=(8, 4),
        in_channels=2,
        out_channels=2,
        layers_per_block=1,
        block_out_channels=(4, 4),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        norm_num_groups=2,
        attention_head_dim=4,
    )
    bits = Bits(4, 8)
    down = LayerSpec("down_blocks.0.downsamplers.0.conv", "conv2d", 4, (4,), bits, (3, 3), (2, 2), (1, 1), (1, 1))
    query = LayerSpec("mid_block.attentions.0.to_q", "linear", 4, (4,), bits)
    sample = np.zeros((1, 2, 2, 8, 4), np.float32)
    return Checkpoint(
        model=SourceInfo("UNet2DModel", dict(network.config), {}, ""),
        recipe={"bits": "w4a8"},
        timesteps=np.array([5], np.float32),
        layers=(random_layer(down), random_layer(query)),
        float_layers=(),
        float_tensors=float_tensors(network, {down.name, query.name}),
        probe=Probe(np.array([5], np.float32), sample, {}, sample),
        metrics={},
        versions={},
    )


def test_a_traced_graph_has_one_marker_per_layer(
    traced_checkpoint: Checkpoint, capfd: pytest.CaptureFixture[str]
) -> None:
    model = trace_network(traced_checkpoint)
    assert capfd.readouterr() == ("", "")
    markers = {node.attributes["layer"].as_string(): node for node in model.graph if node.domain == DOMAIN}
    assert markers.keys() == {layer.spec.name for layer in traced_checkpoint.layers}
    shapes = {name: list(node.outputs[0].shape) for name, node in markers.items()}
    assert not any(isinstance(shape[0], int) for shape in shapes.values())
    assert {name: shape[1:] for name, shape in shapes.items()} == {
        "down_blocks.0.downsamplers.0.conv": [4, 4, 2],
        "mid_block.attentions.0.to_q": [8, 4],
    }
    assert {node.op_type for node in markers.values()} == {"Layer"}
    assert model.opset_imports[""] == OPSET
    # without labels there is nothing but the sample and the timestep
    assert {value.name: [str(size) for size in value.shape] for value in model.graph.inputs} == {
        "sample": ["batch", "2", "8", "4"],
        "timestep": [],
    }
    assert [value.name for value in model.graph.outputs] == [OUTPUT]
    assert not {name for name in model.graph.initializers if "to_q" in name or "downsamplers" in name}


def test_a_probe_of_one_sample_still_gives_a_dynamic_batch(traced_checkpoint: Checkpoint) -> None:
    probe = traced_checkpoint.probe
    single = replace(probe, sample=probe.sample[:, :1], prediction=probe.prediction[:, :1])
    model = trace_network(replace(traced_checkpoint, probe=single))
    assert [str(size) for size in model.graph.inputs[0].shape] == ["batch", "2", "8", "4"]


def test_an_argument_the_model_does_not_take_is_an_error(traced_checkpoint: Checkpoint) -> None:
    probe = replace(traced_checkpoint.probe, conditioning={"mystery": np.zeros((2, 1), np.float32)})
    with pytest.raises(ExportError, match=r"PyTorch cannot trace UNet2DModel to ONNX: .*mystery"):
        trace_network(replace(traced_checkpoint, probe=probe))


class UNetThatFails(UNet2DModel):
    """Explains itself at length."""

    def forward(self, *args: object, **kwargs: object) -> None:
        raise RuntimeError("the reason\nand how it came to that")


def test_a_model_that_cannot_be_traced_is_one_line_with_the_reason_and_nothing_else(
    traced_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(diffusers, "UNetThatFails", UNetThatFails, raising=False)
    checkpoint = replace(traced_checkpoint, model=replace(traced_checkpoint.model, class_name="UNetThatFails"))
    with pytest.raises(ExportError) as caught:
        trace_network(checkpoint)
    assert str(caught.value) == "PyTorch cannot trace UNetThatFails to ONNX: the reason"
    assert capfd.readouterr() == ("", "")


def test_a_sample_the_model_cannot_take_is_refused_quietly(
    traced_checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch's loggers write to stderr by handlers of their own and pass nothing on
    for name in ("torch", "torch.export"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [caplog.handler])
    probe = replace(traced_checkpoint.probe, sample=np.zeros((1, 2, 3, 8, 4), np.float32))
    with pytest.raises(ExportError, match=r"expected input.* to have 2 channels, but got 3"):
        trace_network(replace(traced_checkpoint, probe=probe))
    assert [record.message for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(("size", "kept"), [(1, True), (3, False), ("batch", True)])
def test_only_a_squeeze_that_does_nothing_is_dropped(size: int | str, kept: bool) -> None:
    x = ir.Value(name="x", shape=ir.Shape([2, size, 4]), type=ir.TensorType(ir.DataType.FLOAT))
    axes = ir.Value(name="axes", const_value=ir.tensor(np.array([1], np.int64), name="axes"))
    squeeze = ir.node("Squeeze", [x, axes], num_outputs=1)
    after = ir.node("Relu", [squeeze.outputs[0]], num_outputs=1)
    graph = ir.Graph([x], after.outputs, nodes=[squeeze, after], initializers=[axes], opset_imports={"": OPSET})
    _drop_idle_squeezes(graph)
    assert [node.op_type for node in graph] == (["Squeeze", "Relu"] if kept else ["Relu"])
    assert after.inputs[0] is (squeeze.outputs[0] if kept else x)
