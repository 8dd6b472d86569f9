"""The traced graph becomes legible and stays what it was."""

import numpy as np
import onnx_ir as ir
import pytest

from dmq_export.batch import Batch
from dmq_export.checkpoint import Checkpoint
from dmq_export.commands.export import export_graph
from dmq_export.graph.export import serialized
from dmq_export.graph.simplify import RULES, fix_batch
from engines.onnxruntime import OnnxSession


def value(name: str, shape: list[int | str], dtype: ir.DataType = ir.DataType.FLOAT) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def keys_model() -> ir.Model:
    """What the exporter makes of the keys' transposition."""
    x = value("x", ["batch", 2, 6, 4])
    graph = ir.Graph([x], [], nodes=[], opset_imports={"": 21}, name="keys")

    def constant(name: str, *numbers: int) -> ir.Value:
        tensor = ir.tensor(np.array(numbers, np.int64), name=name)
        held = ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
        graph.register_initializer(held)
        return held

    def op(kind: str, *inputs: ir.Value, **attributes: object) -> ir.Value:
        node = ir.node(kind, inputs, attributes, num_outputs=1)
        node.outputs[0].name = f"o{len(graph)}"
        graph.append(node)
        return node.outputs[0]

    last, end, second, first = constant("a", -1), constant("b", 2**62), constant("c", -2), constant("d", -(2**62))
    shape = op("Shape", x, start=0)
    width, length = op("Slice", shape, last, end), op("Slice", shape, second, last)
    batch = op("Slice", shape, first, second)
    flat = op("Transpose", op("Reshape", x, op("Concat", last, length, width, axis=0)), perm=[0, 2, 1])
    y = op("Identity", op("Reshape", flat, op("Concat", batch, width, length, axis=0)))
    y.type = ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(y)
    return ir.Model(graph, ir_version=10)


def test_keys_are_transposed_by_one_node() -> None:
    model = keys_model()
    x = np.random.default_rng(0).standard_normal((3, 2, 6, 4)).astype(np.float32)
    (before,) = OnnxSession(serialized(model)).run({"x": x}).values()
    assert np.array_equal(before, x.swapaxes(2, 3))
    RULES.apply_to_model(model)
    (after,) = OnnxSession(serialized(model)).run({"x": x}).values()
    assert [node.op_type for node in model.graph] == ["Transpose", "Identity"]
    assert np.array_equal(after, before)


def test_a_batch_is_fixed_everywhere_it_is_named() -> None:
    model = keys_model()
    model.graph[0].outputs[0].shape = ir.Shape(["other"])
    fix_batch(model, 3)
    assert list(model.graph.inputs[0].shape) == [3, 2, 6, 4]
    assert str(model.graph[0].outputs[0].shape[0]) == "other"


@pytest.fixture(scope="module")
def model(tiny_checkpoint: Checkpoint) -> ir.Model:
    return export_graph(tiny_checkpoint, "tensorrt").model


def test_nodes_are_called_after_the_models_modules(model: ir.Model, tiny_checkpoint: Checkpoint) -> None:
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert {
        "conv_in/Conv",
        "time_embedding.linear_1/Gemm",
        "down_blocks.0.resnets.0.norm1/GroupNormalization",
        "mid_block.attentions.0/Softmax",
        "mid_block.attentions.0.to_q/output",
        "conv_out/Conv",
    } <= set(names)
    assert not any(name.startswith(("node_", "network.")) for name in names)
    assert "conv_in.weight" in model.graph.initializers


def test_every_layer_is_one_pattern(model: ir.Model, tiny_checkpoint: Checkpoint) -> None:
    for layer in tiny_checkpoint.layers:
        own = [node.op_type for node in model.graph if node.name.startswith(f"{layer.spec.name}/")]
        parts = len(layer.spec.parts)
        assert own.count("QuantizeLinear") == own.count("Conv") + own.count("MatMul") == parts
        assert own.count("DequantizeLinear") == 2 * parts


def test_no_shape_arithmetic_is_left_but_the_batch_of_the_timestep(model: ir.Model) -> None:
    kinds = [node.op_type for node in model.graph]
    assert kinds.count("Shape") == kinds.count("Expand") == 1
    assert not {"Cast", "Constant", "ConstantOfShape"} & set(kinds)


def test_a_fixed_batch_leaves_none_at_all(tiny_checkpoint: Checkpoint) -> None:
    graph = export_graph(tiny_checkpoint, "tensorrt", batch=Batch(2, 2, 2)).model.graph
    assert "Shape" not in {node.op_type for node in graph}
    assert [list(v.shape)[:1] for v in (*graph.inputs, *graph.outputs) if v.name != "timestep"] == [[2], [2], [2]]
