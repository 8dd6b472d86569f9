"""OpenVINO as an engine: how it is compiled, and errors of ours."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from dmq_export.errors import DmqError
from engines.openvino import OpenVinoDenoiser

SAMPLE = np.random.default_rng(0).standard_normal((2, 1, 8, 8), np.float32)
LABELS = np.array([0, 2])


def test_it_computes_in_float32_unless_asked_otherwise(tiny_onnx: Path) -> None:
    assert str(OpenVinoDenoiser(tiny_onnx).compiled.get_property("INFERENCE_PRECISION_HINT")) == "<Type: 'float32'>"


def test_hints_reach_the_compiler(tiny_onnx: Path) -> None:
    compiled = OpenVinoDenoiser(tiny_onnx, threads=1, hint="THROUGHPUT").compiled
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert "THROUGHPUT" in str(compiled.get_property("PERFORMANCE_HINT"))


def test_any_batch_is_taken(tiny_onnx: Path) -> None:
    denoise = OpenVinoDenoiser(tiny_onnx, threads=1)
    both = denoise(SAMPLE, 67.0, class_labels=LABELS)
    for index in range(2):
        rows = slice(index, index + 1)
        alone = denoise(SAMPLE[rows], 67.0, class_labels=LABELS[rows])
        # another batch may sum in another order and flip a few codes
        assert np.abs(alone - both[rows]).mean() < 0.05 * both.std()


def test_the_timestep_selects_the_ranges(tiny_onnx: Path) -> None:
    denoise = OpenVinoDenoiser(tiny_onnx, threads=1)
    first, last = (denoise(SAMPLE, timestep, class_labels=LABELS) for timestep in (67.0, 1.0))
    assert not np.allclose(first, last)


def test_wrong_inputs_are_named(tiny_onnx: Path) -> None:
    denoise = OpenVinoDenoiser(tiny_onnx)
    with pytest.raises(DmqError, match="input class_labels is missing: the model takes sample, timestep, class_labels"):
        denoise(SAMPLE, 67.0)
    with pytest.raises(DmqError, match=r"input sample has shape \[2, 1, 4, 4\], the model takes \['any', 1, 8, 8\]"):
        denoise(SAMPLE[:, :, :4, :4], 67.0, class_labels=LABELS)


def test_a_model_that_it_cannot_load_is_one_line(tiny_onnx: Path, tmp_path: Path) -> None:
    model = onnx.load(tiny_onnx)
    model.graph.node[0].op_type = "NoSuchOperator"
    onnx.save(model, tmp_path / "odd.onnx")
    with pytest.raises(DmqError, match=f"OpenVINO cannot load {tmp_path}/odd.onnx: .*fully converted") as raised:
        OpenVinoDenoiser(tmp_path / "odd.onnx")
    assert "\n" not in str(raised.value)
