"""A float16 graph: what is typed, what is not, and what is refused."""

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from layers import TIMESTEPS, conv2d, marked_model, random_input, random_layer

from dmq_export.checkpoint import Checkpoint
from dmq_export.commands.export import export_graph
from dmq_export.errors import ExportError
from dmq_export.graph.float16 import to_float16
from dmq_export.graph.integer import lower_integer
from dmq_export.graph.lower import lower

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


@pytest.fixture(scope="module")
def graph(tiny_checkpoint: Checkpoint) -> ir.Graph:
    return export_graph(tiny_checkpoint, "tensorrt", "float16").model.graph


def test_inputs_and_outputs_are_float16_but_the_timestep(graph: ir.Graph) -> None:
    types = {value.name: value.dtype for value in (*graph.inputs, *graph.outputs)}
    assert types["sample"] == types["out_sample"] == HALF
    assert types["timestep"] == FLOAT


def test_only_what_follows_from_the_timestep_alone_is_float32(graph: ir.Graph) -> None:
    for name, value in graph.initializers.items():
        users = {node.name.rpartition("/")[0] for node, _ in value.uses()}
        kept = users <= {"step", "time_proj", ""} or any(node.op_type == "Resize" for node, _ in value.uses())
        assert value.dtype != FLOAT or kept, name
    casts = [node for node in graph if node.op_type == "Cast"]
    assert len(casts) == 1  # the embedding of the timestep
    assert casts[0].outputs[0].uses()[0][0].op_type == "Gemm"


def test_a_clone_becomes_float16_alone() -> None:
    layer = random_layer(conv2d(name="a.conv"))
    model = marked_model(layer.spec, random_input(layer.spec))
    lower(model, (layer,), TIMESTEPS, lower_integer("tensorrt"))
    to_float16(model.clone())
    assert {value.dtype for value in (*model.graph.inputs, *model.graph.outputs)} == {FLOAT}


def test_scales_are_float16_and_so_is_what_they_scale(graph: ir.Graph) -> None:
    for node in graph:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            assert node.inputs[1].dtype == HALF


def lowered(scale: float) -> ir.Model:
    layer = random_layer(conv2d(name="a.conv"))
    layer = replace(layer, scale=np.full_like(layer.scale, scale))
    model = marked_model(layer.spec, random_input(layer.spec))
    lower(model, (layer,), TIMESTEPS, lower_integer("tensorrt"))
    return model


def test_a_scale_that_float16_cannot_hold_is_refused_by_name() -> None:
    to_float16(lowered(1e-3))
    with pytest.raises(ExportError, match=r"^layer a\.conv: a scale of .* below float16's smallest normal"):
        to_float16(lowered(1e-5))


def test_a_constant_beyond_float16_is_refused_by_name() -> None:
    model = lowered(1e-2)
    bias = model.graph.initializers["a.conv/product_bias"]
    bias.const_value = ir.tensor(np.full(6, 1e6, np.float32), name=bias.name)
    with pytest.raises(ExportError, match=r"^a\.conv/product_bias has a value beyond float16's 65504"):
        to_float16(model)


def test_what_overflows_on_the_way_is_refused_by_name_too() -> None:
    layer = random_layer(conv2d(name="a.conv"), steps=3)
    layer = replace(layer, weight_scale=np.full_like(layer.weight_scale, 1e5))
    model = marked_model(layer.spec, random_input(layer.spec))
    lower(model, (layer,), TIMESTEPS, lower_integer("tensorrt", "float16"))
    with pytest.raises(ExportError, match="has a value beyond float16's 65504"):
        to_float16(model)


@pytest.mark.parametrize("target", ["portable", "openvino"])
def test_the_other_targets_are_float32(tiny_checkpoint: Checkpoint, target: str) -> None:
    with pytest.raises(ExportError, match="--dtype float16 is for --target tensorrt"):
        export_graph(tiny_checkpoint, target, "float16")
