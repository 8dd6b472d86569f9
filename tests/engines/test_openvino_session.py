"""OpenVINO under the contract of the ONNX Runtime session."""

from pathlib import Path

import numpy as np
import pytest

from dmq_export.errors import DmqError
from engines.onnxruntime import OnnxSession

pytest.importorskip("openvino")
from engines.openvino import OpenVinoSession

RNG = np.random.default_rng(0)
INPUTS = {
    "sample": RNG.standard_normal((2, 1, 8, 8), np.float32),
    "timestep": np.float32(34),
    "class_labels": np.array([0, 2]),
}


@pytest.mark.parametrize("from_memory", [True, False])
def test_it_answers_by_name_as_onnx_runtime_does(tiny_onnx: Path, from_memory: bool) -> None:
    outputs = OpenVinoSession(tiny_onnx.read_bytes() if from_memory else tiny_onnx).run(INPUTS)
    expected = OnnxSession(tiny_onnx).run(INPUTS)
    assert outputs.keys() == expected.keys() == {"out_sample"}
    # a code that flips at a tie travels on
    difference = outputs["out_sample"] - expected["out_sample"]
    assert np.abs(difference).mean() < 0.05 * expected["out_sample"].std()


def test_an_answer_outlives_the_next(tiny_onnx: Path) -> None:
    session = OpenVinoSession(tiny_onnx)
    first = session.run(INPUTS)["out_sample"]
    kept = first.copy()
    session.run({**INPUTS, "sample": -INPUTS["sample"]})
    np.testing.assert_array_equal(first, kept)


def test_inputs_are_checked(tiny_onnx: Path) -> None:
    with pytest.raises(DmqError, match="input class_labels is missing"):
        OpenVinoSession(tiny_onnx).run({name: INPUTS[name] for name in ("sample", "timestep")})


def test_what_is_no_model_is_an_error_of_ours(tmp_path: Path) -> None:
    (tmp_path / "text.onnx").write_text("no model")
    with pytest.raises(DmqError, match=r"OpenVINO cannot load .*text\.onnx: "):
        OpenVinoSession(tmp_path / "text.onnx")
