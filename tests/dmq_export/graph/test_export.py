"""The exported file: valid, standard, self-describing, free of this machine, and whole or absent."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from layers import linear, random_layer
from models import TINY_RECIPE, save_small_model

from calib.calibrate import calibrate
from calib.model.fake_quantized import load_fake_quantized
from calib.run.plan import Resources
from dmq_export.checkpoint import Checkpoint, save_checkpoint
from dmq_export.commands.export import export_graph, export_onnx
from dmq_export.common.progress import Progress
from dmq_export.errors import CheckFailedError, DmqError
from dmq_export.graph.compare import rms_ratio
from dmq_export.graph.export import data_path, layer_bytes, loadable, save_onnx, serialized, weight_bytes
from dmq_export.graph.node_builder import NodeBuilder
from dmq_export.metadata import METADATA_KEY
from engines.onnxruntime import OnnxSession


@pytest.fixture(scope="module")
def model(tiny_onnx: Path) -> ir.Model:
    return ir.load(tiny_onnx)


@pytest.fixture(scope="module")
def session(tiny_onnx: Path) -> OnnxSession:
    return OnnxSession(tiny_onnx)


def test_the_file_passes_onnx_own_checker(tiny_onnx: Path) -> None:
    onnx.checker.check_model(tiny_onnx, full_check=True)


def test_only_standard_operators_of_one_opset(model: ir.Model) -> None:
    assert dict(model.opset_imports) == {"": 21}
    assert {node.domain for node in model.graph} == {""}
    assert not model.functions


def test_inputs_and_output_are_those_of_the_diffusers_model_with_any_batch(model: ir.Model) -> None:
    inputs = {value.name: (value.dtype, [str(size) for size in value.shape]) for value in model.graph.inputs}
    assert inputs == {
        "sample": (ir.DataType.FLOAT, ["batch", "1", "8", "8"]),
        "timestep": (ir.DataType.FLOAT, []),
        "class_labels": (ir.DataType.INT64, ["batch"]),
    }
    (output,) = model.graph.outputs
    assert (output.name, output.dtype) == ("out_sample", ir.DataType.FLOAT)
    assert [str(size) for size in output.shape] == ["batch", "1", "8", "8"]


@pytest.mark.parametrize("batch", [1, 3])
def test_any_batch_runs_and_is_the_reference(session: OnnxSession, tiny_checkpoint: Checkpoint, batch: int) -> None:
    rng = np.random.default_rng(0)
    sample, labels = rng.standard_normal((batch, 1, 8, 8), np.float32), np.arange(batch) % 3
    timestep = float(tiny_checkpoint.timesteps[1])
    answer = session.run({"sample": sample, "timestep": np.float32(timestep), "class_labels": labels})["out_sample"]
    reference = load_fake_quantized(tiny_checkpoint, torch.device("cpu"))
    expected = reference(torch.from_numpy(sample), timestep, class_labels=torch.from_numpy(labels)).numpy()
    assert answer.shape == expected.shape == (batch, 1, 8, 8)
    # a code that flips at a tie travels on; a wrong batch axis or label would be off by all of it
    assert rms_ratio(answer - expected, expected) < 0.05


def test_no_trace_of_this_machine_is_in_the_file(tiny_onnx: Path, model: ir.Model) -> None:
    content = tiny_onnx.read_bytes()
    for path in (str(Path(__file__).parents[3]), sys.prefix, str(Path(torch.__file__).parent), str(Path.home())):
        if len(path) > 2:
            assert path.encode() not in content
    for word in (b"site-packages", b".py", b'File "', b"stack_trace"):
        assert word not in content
    assert not any(node.metadata_props or node.doc_string for node in model.graph)


def test_the_file_says_what_it_is(session: OnnxSession, tiny_checkpoint: Checkpoint) -> None:
    metadata = json.loads(session.metadata[METADATA_KEY])
    assert metadata["target"] == "portable"
    assert metadata["model"] == "UNet2DModel"
    assert metadata["bits"] == "w4a8"
    assert metadata["timesteps"] == tiny_checkpoint.timesteps.tolist()
    assert metadata["config"]["num_class_embeds"] == 3
    assert metadata["scheduler"]["_class_name"] == "DDIMScheduler"
    assert metadata["recipe"] == tiny_checkpoint.recipe
    assert metadata["weights_sha256"] == tiny_checkpoint.model.weights_sha256


def test_the_file_names_its_producer_and_its_network(model: ir.Model) -> None:
    assert model.producer_name == "dmq-export"
    assert model.graph.name == "UNet2DModel"


def test_weights_of_quantized_layers_are_there_in_four_bits_and_in_no_other_form(
    model: ir.Model, tiny_checkpoint: Checkpoint
) -> None:
    initializers = {name: value.const_value for name, value in model.graph.initializers.items()}
    for layer in tiny_checkpoint.layers:
        own = {name: tensor for name, tensor in initializers.items() if name.startswith(f"{layer.spec.name}/")}
        codes = [tensor for name, tensor in own.items() if "/weight_codes" in name]
        assert {tensor.dtype for tensor in codes} == {ir.DataType.UINT4}
        assert sum(tensor.size for tensor in codes) == layer.codes.size
        floats = [tensor.size for tensor in own.values() if tensor.dtype == ir.DataType.FLOAT]
        assert max(floats) < layer.codes.size
    quantized = {layer.spec.name for layer in tiny_checkpoint.layers}
    assert not any(f"{name}.weight" in other for name in quantized for other in initializers)


def test_layer_bytes_are_those_of_the_layers_own_initializers(model: ir.Model, tiny_checkpoint: Checkpoint) -> None:
    chosen = (tiny_checkpoint.layers[0], tiny_checkpoint.layers[-1])
    expected = 0
    for layer in chosen:
        assert len(layer.spec.parts) == 1 + layer.spec.name.endswith("conv_shortcut")
        outputs = layer.spec.out_channels * len(layer.spec.parts)
        expected += -(-layer.codes.size // 2) + 4 * outputs + -(-outputs // 2)  # 4-bit codes, s_w, 4-bit z_w
        expected += 4 * layer.bias.size + 4 * layer.tau.size + 5 * layer.scale.size  # float32, s and uint8 z
    counted = layer_bytes(model, chosen)
    # besides: shapes, part indices and powers of two, at most one number per channel
    extra = sum(16 + 8 * layer.spec.in_channels for layer in chosen)
    assert expected <= counted <= expected + extra
    assert layer_bytes(model, ()) == 0


def test_layer_bytes_leave_out_a_layer_of_a_longer_name() -> None:
    layer, longer = random_layer(linear(name="to_k")), random_layer(linear(name="to_k_proj"))
    graph = ir.Graph([], [], nodes=[])
    for name in ("to_k", "to_k_proj"):
        NodeBuilder(graph, name).constant("scale", np.zeros(3, np.float32))
    model = ir.Model(graph, ir_version=10)
    assert layer_bytes(model, (layer,)) == layer_bytes(model, (longer,)) == 12


def test_a_file_read_back_serializes_to_the_same_model(tiny_onnx: Path, model: ir.Model) -> None:
    assert onnx.load_model_from_string(serialized(model)) == onnx.load(tiny_onnx)


def test_exporting_again_gives_the_same_file(tiny_onnx: Path, tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_onnx(export_graph(tiny_checkpoint).model, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx").read_bytes() == tiny_onnx.read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["again.onnx"]


def test_saving_replaces_an_older_file(model: ir.Model, tiny_onnx: Path, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"older")
    save_onnx(model, tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx").read_bytes() == tiny_onnx.read_bytes()


def test_saving_where_there_is_no_folder_is_an_error_that_names_it(model: ir.Model, tmp_path: Path) -> None:
    with pytest.raises(DmqError, match=r"cannot write .*absent/model\.onnx"):
        save_onnx(model, tmp_path / "absent" / "model.onnx")


@pytest.mark.filterwarnings("ignore:invalid value encountered in cast")
def test_a_graph_that_is_not_the_reference_is_not_written(tmp_path: Path) -> None:
    source, folder, output = tmp_path / "source", tmp_path / "checkpoint", tmp_path / "model.onnx"
    checkpoint = calibrate(
        save_small_model(source), folder, TINY_RECIPE, Resources(torch.device("cpu")), Progress(show=False)
    )
    # a probe of NaN, for which no graph can be proved right
    probe = replace(checkpoint.probe, sample=np.full_like(checkpoint.probe.sample, np.nan))
    save_checkpoint(replace(checkpoint, probe=probe), folder, run={}, replace_existing=True)
    output.write_bytes(b"older")
    with pytest.raises(CheckFailedError):
        export_onnx(folder, output, Progress(show=False))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint", "model.onnx", "source"]
    assert output.read_bytes() == b"older"


def test_weights_too_large_for_one_file_lie_in_one_beside_it(
    model: ir.Model, tiny_onnx: Path, session: OnnxSession, tmp_path: Path
) -> None:
    path = tmp_path / "large.onnx"
    save_onnx(model, path, largest=weight_bytes(model) - 1)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["large.onnx", "large.onnx.data"]
    assert data_path(path).stat().st_size + path.stat().st_size >= weight_bytes(model)
    located = {
        entry.value
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert located == {"large.onnx.data"}
    onnx.checker.check_model(path, full_check=True)
    rng = np.random.default_rng(0)
    inputs = {
        "sample": rng.standard_normal((2, 1, 8, 8), np.float32),
        "timestep": np.float32(34),
        "class_labels": np.array([0, 2]),
    }
    np.testing.assert_array_equal(OnnxSession(path).run(inputs)["out_sample"], session.run(inputs)["out_sample"])
    assert serialized(model) == serialized(ir.load(tiny_onnx))  # the model in memory is what it was


def test_a_model_that_became_small_leaves_no_data_behind(model: ir.Model, tiny_onnx: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_onnx(model, path, largest=0)
    save_onnx(model, path)
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"]
    assert path.read_bytes() == tiny_onnx.read_bytes()


def test_a_large_model_is_loaded_from_a_file_that_goes_away(model: ir.Model) -> None:
    with loadable(model) as small:
        assert small == serialized(model)
    with loadable(model, largest=0) as large:
        assert isinstance(large, Path)
        loaded = OnnxSession(large)
    assert not large.exists()
    assert loaded.output_names == ["out_sample"]


def test_weight_bytes_are_those_a_file_stores(model: ir.Model, tiny_onnx: Path) -> None:
    raw = sum(len(tensor.raw_data) for tensor in onnx.load(tiny_onnx).graph.initializer)
    assert weight_bytes(model) == raw
