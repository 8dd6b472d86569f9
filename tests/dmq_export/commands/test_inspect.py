"""``inspect``: checkpoints, ONNX files of any tool, and plans."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from click.testing import CliRunner, Result
from plans import CONTENT, PLAN_METADATA
from qdq import wide_model

from dmq_export.checkpoint import Checkpoint
from dmq_export.cli import main
from dmq_export.summary import inspect_checkpoint, inspect_onnx
from engines.tensorrt.plan_file import save_plan


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["inspect", *map(str, arguments)])


def test_every_layer_of_a_checkpoint_is_described(tiny_checkpoint_folder: Path, tiny_checkpoint: Checkpoint) -> None:
    summary = inspect_checkpoint(tiny_checkpoint_folder)
    assert [layer.name for layer in summary.layers] == [layer.spec.name for layer in tiny_checkpoint.layers]
    for described, layer in zip(summary.layers, tiny_checkpoint.layers, strict=True):
        assert described.parts == layer.spec.parts
        assert described.steps == len(layer.scale)
        assert described.pts_channels == (layer.shift > 0).sum()
        assert described.pts_exponent == layer.shift.max()
        assert (described.tau_min, described.tau_max) == (layer.tau.min(), layer.tau.max())
        assert described.parameters == layer.codes.size
    assert summary.float_layers == tiny_checkpoint.float_layers
    assert summary.timesteps == tuple(tiny_checkpoint.timesteps.tolist())


def test_the_bytes_are_those_of_the_tensor_file(tiny_checkpoint_folder: Path, tiny_checkpoint: Checkpoint) -> None:
    summary = inspect_checkpoint(tiny_checkpoint_folder)
    probe = tiny_checkpoint.probe
    arrays = [probe.timesteps, probe.sample, probe.prediction, *probe.conditioning.values()]
    data = summary.quantized_bytes + summary.float_bytes + sum(array.nbytes for array in arrays)
    content = (tiny_checkpoint_folder / "dmq.safetensors").read_bytes()
    assert data == len(content) - 8 - int.from_bytes(content[:8], "little")


def test_a_checkpoint_is_printed_with_reasons_and_provenance(tiny_checkpoint_folder: Path) -> None:
    text = run(tiny_checkpoint_folder).stdout
    for word in (
        "UNet2DModel",
        "DDIMScheduler",
        "first layer",
        "mid_block.attentions.0.to_q",
        "w4a8",
        "of float32",
    ):
        assert word in text, word
    assert re.search(r"conv_shortcut +conv2d +w4a8 +asymmetric +\d+\+\d+ ", text)


def test_an_onnx_file_of_another_tool_is_counted(tmp_path: Path) -> None:
    ir.save(wide_model(), tmp_path / "wide.onnx")
    summary = inspect_onnx(tmp_path / "wide.onnx")
    assert summary.metadata is None
    assert summary.products == {"int8": 3, "float": 2, "quantized": 1}
    assert summary.pairs == {
        "QuantizeLinear of activations, INT8": 7,
        "DequantizeLinear of activations, INT8": 7,
        "DequantizeLinear of weights, INT8": 3,
        "DequantizeLinear of weights, INT4": 1,
    }
    assert summary.operators["MatMul"] == 3
    assert summary.weights["INT4"] == (1, 128 * 32 // 2)
    codes = 32 * 32 * 9 + 64 * 32 + 32 * 32
    assert summary.weights["INT8"] == (3 + 7, codes + 7)


def test_our_own_onnx_file_tells_what_stayed_float_and_why(tiny_onnx: Path, tiny_checkpoint: Checkpoint) -> None:
    text = run(tiny_onnx).stdout
    assert "w4a8 UNet2DModel for portable, 3 calibrated timesteps" in text
    for layer in tiny_checkpoint.float_layers:
        assert f"{layer.name} " in text
        assert layer.reason in text
    summary = inspect_onnx(tiny_onnx)
    codes = sum(-(-layer.codes.size // 2) for layer in tiny_checkpoint.layers)
    points = sum(-(-layer.spec.out_channels // 2) * len(layer.spec.parts) for layer in tiny_checkpoint.layers)
    assert summary.weights["UINT4"][1] == codes + points
    assert summary.file_bytes == tiny_onnx.stat().st_size


def test_external_data_counts(tmp_path: Path) -> None:
    ir.save(wide_model(), tmp_path / "wide.onnx", external_data="wide.data", size_threshold_bytes=0)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert inspect_onnx(tmp_path / "wide.onnx").file_bytes == total


def test_a_plan_is_described_without_being_loaded(tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    save_plan(CONTENT, plan, PLAN_METADATA)
    text = run(plan).stdout
    for word in ("w4a8 UNet2DModel", "as built", "TensorRT 10.16.1.11", "NVIDIA H200", "4x4x8x8", "reformat"):
        assert word in text, word
    plan.write_bytes(b"another")
    assert "CHANGED since it was built" in run(plan).stdout
    assert json.loads(run(plan, "--json").stdout)["intact"] is False


def test_a_plan_of_another_tools_model_is_described(tmp_path: Path) -> None:
    save_plan(CONTENT, tmp_path / "model.plan", replace(PLAN_METADATA, metadata=None, stripped=True, layers={}))
    text = run(tmp_path / "model.plan").stdout
    assert "of a model of another tool" in text
    assert "weights inside: no" in text


@pytest.mark.parametrize("kind", ["checkpoint", "onnx"])
def test_json_holds_everything(kind: str, tiny_checkpoint_folder: Path, tiny_onnx: Path) -> None:
    path = {"checkpoint": tiny_checkpoint_folder, "onnx": tiny_onnx}[kind]
    content = json.loads(run(path, "--json").stdout)
    assert (content["kind"], content["path"]) == (kind, str(path))
    assert content["layers"] if kind == "checkpoint" else content["operators"]


def test_what_is_nothing_of_ours_is_refused(tmp_path: Path, tiny_checkpoint_folder: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint_folder, damaged)
    (damaged / "dmq.json").write_text("{}")
    (tmp_path / "file.txt").touch()
    for path, message in [
        (tmp_path / "file.txt", "is nothing to inspect: give a checkpoint folder, an .onnx file or a .plan"),
        (tmp_path, "is not a DMQ checkpoint"),
        (damaged, "schema"),
        (tmp_path / "none.onnx", "is not a file"),
        (tmp_path / "none.plan", "is not a file"),
    ]:
        result = run(path)
        assert (result.exit_code, result.stdout) == (2, ""), result.output
        assert message in result.stderr
        assert result.stderr.count("\n") == 1


def test_an_onnx_file_without_names_is_described(tmp_path: Path) -> None:
    helper = onnx.helper
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    weight = onnx.numpy_helper.from_array(np.ones((2, 2), np.float32), "w")
    x = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 2])
    y = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    onnx.save(helper.make_model(helper.make_graph([node], "g", [x], [y], [weight])), tmp_path / "m.onnx")
    summary = inspect_onnx(tmp_path / "m.onnx")
    assert summary.float_products == ("y",)
    assert summary.inputs == {"x": "float [n, 2]"}
