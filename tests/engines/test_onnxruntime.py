"""ONNX Runtime as an engine: inputs are checked, errors are ours."""

from pathlib import Path

import numpy as np
import pytest

from dmq_export.errors import DmqError
from engines.onnxruntime import OnnxRuntimeDenoiser, OnnxSession


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    sample = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    return {"sample": sample, "timestep": np.array(67, np.float32), "class_labels": np.array([0, 2])}


def test_outputs_come_by_name(tiny_onnx: Path, inputs: dict[str, np.ndarray]) -> None:
    outputs = OnnxSession(tiny_onnx).run(inputs)
    assert {name: value.shape for name, value in outputs.items()} == {"out_sample": (2, 1, 8, 8)}


def test_a_model_loads_from_memory_as_from_a_file(tiny_onnx: Path, inputs: dict[str, np.ndarray]) -> None:
    from_file, from_memory = OnnxSession(tiny_onnx), OnnxSession(tiny_onnx.read_bytes())
    np.testing.assert_array_equal(from_file.run(inputs)["out_sample"], from_memory.run(inputs)["out_sample"])


def test_inputs_of_another_type_are_converted(tiny_onnx: Path, inputs: dict[str, np.ndarray]) -> None:
    session = OnnxSession(tiny_onnx)
    converted = {**inputs, "timestep": np.array(67, np.int64), "class_labels": np.array([0, 2], np.int32)}
    np.testing.assert_array_equal(session.run(converted)["out_sample"], session.run(inputs)["out_sample"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": None}, "input class_labels is missing: the model takes sample, timestep, class_labels"),
        ({"prompt": np.zeros(2)}, "no input 'prompt': it takes sample, timestep, class_labels"),
        ({"sample": np.zeros((1, 8, 8), np.float32)}, r"input sample has shape \[1, 8, 8\]"),
    ],
)
def test_wrong_inputs_are_named(
    tiny_onnx: Path, inputs: dict[str, np.ndarray], change: dict[str, np.ndarray | None], message: str
) -> None:
    wrong = {name: value for name, value in {**inputs, **change}.items() if value is not None}
    with pytest.raises(DmqError, match=message):
        OnnxSession(tiny_onnx).run(wrong)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a protobuf")
    with pytest.raises(DmqError, match=rf"ONNX Runtime cannot load {path}") as raised:
        OnnxSession(path)
    assert "\n" not in str(raised.value)


def test_the_denoiser_is_the_session(tiny_onnx: Path, inputs: dict[str, np.ndarray]) -> None:
    prediction = OnnxRuntimeDenoiser(tiny_onnx)(inputs["sample"], 67.0, class_labels=inputs["class_labels"])
    np.testing.assert_array_equal(prediction, OnnxSession(tiny_onnx).run(inputs)["out_sample"])
