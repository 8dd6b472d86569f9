"""Reading ONNX files of any tool."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from qdq import GraphBuilder, conv_model

from dmq_export.errors import DmqError
from dmq_export.graph.onnx_file import external_files, input_sizes, load_onnx, metadata_of


@pytest.fixture
def with_data(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    ir.save(conv_model(), path, external_data="weights.data", size_threshold_bytes=0)
    return path


def test_a_file_is_loaded_with_its_external_data(with_data: Path) -> None:
    model = load_onnx(with_data)
    assert external_files(model, with_data.parent) == [with_data.with_name("weights.data")]
    codes = next(value.const_value for value in model.graph.initializers.values() if value.dtype == ir.DataType.INT8)
    assert codes.numpy().dtype == np.int8


def test_missing_external_data_is_an_error_that_names_it(with_data: Path) -> None:
    with_data.with_name("weights.data").unlink()
    with pytest.raises(DmqError, match=r"keeps weights in .*weights\.data, which is missing: put it beside the model"):
        load_onnx(with_data)


def test_external_data_outside_the_folder_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    model = conv_model()
    value = next(iter(model.graph.initializers.values()))
    (tmp_path / "outside.data").write_bytes(bytes(64))
    value.const_value = ir.ExternalTensor(
        "../outside.data", 0, 2, ir.DataType.FLOAT16, shape=ir.Shape([]), name=value.name, base_dir=tmp_path / "inside"
    )
    ir.save(model, tmp_path / "inside" / "model.onnx")
    with pytest.raises(DmqError, match="outside its folder: such files are not read"):
        load_onnx(tmp_path / "inside" / "model.onnx")


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "garbage.onnx").write_bytes(b"garbage")
    with pytest.raises(DmqError, match=r"garbage\.onnx is not an ONNX model: DecodeError"):
        load_onnx(tmp_path / "garbage.onnx")
    with pytest.raises(DmqError, match=r"none\.onnx is not a file: give an ONNX model"):
        load_onnx(tmp_path / "none.onnx")


def test_an_empty_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "empty.onnx").touch()
    with pytest.raises(DmqError, match=r"empty\.onnx is not an ONNX model: it has no outputs"):
        load_onnx(tmp_path / "empty.onnx")


def test_input_sizes_keep_the_names_of_open_sizes(tiny_onnx: Path) -> None:
    assert input_sizes(load_onnx(tiny_onnx)) == {
        "sample": ("batch", 1, 8, 8),
        "timestep": (),
        "class_labels": ("batch",),
    }


def test_an_open_size_without_a_name_gets_one() -> None:
    b = GraphBuilder()
    model = b.model(b.op("Relu", b.input("x", "n", 3)))
    model.graph.inputs[0].shape = ir.Shape([None, 3])
    assert input_sizes(model) == {"x": ("x.0", 3)}


def test_weights_that_old_files_list_as_inputs_are_none() -> None:
    b = GraphBuilder()
    model = b.model(b.op("Add", b.input("x", 3), b.constant(np.ones(3))))
    model.graph.inputs.append(next(iter(model.graph.initializers.values())))
    assert list(input_sizes(model)) == ["x"]


def test_metadata_is_that_of_our_export(tiny_onnx: Path) -> None:
    metadata = metadata_of(load_onnx(tiny_onnx))
    assert metadata is not None
    assert metadata["bits"] == "w4a8"
    assert metadata_of(conv_model()) is None


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_damaged_metadata_is_an_error(text: str) -> None:
    model = conv_model()
    model.metadata_props["dmq"] = text
    with pytest.raises(DmqError, match="the model's 'dmq' metadata is damaged"):
        metadata_of(model)
