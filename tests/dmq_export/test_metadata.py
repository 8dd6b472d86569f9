"""What an exported file says of itself."""

import json

import pytest

from calib.model.schedulers import build_scheduler
from dmq_export.batch import Batch
from dmq_export.checkpoint import Checkpoint
from dmq_export.denoiser.config import label_count, sample_shape
from dmq_export.errors import DmqError
from dmq_export.metadata import export_metadata, read_metadata


def test_the_metadata_survives_json(tiny_checkpoint: Checkpoint) -> None:
    metadata = export_metadata(tiny_checkpoint, "portable")
    assert json.loads(json.dumps(metadata)) == metadata


def test_the_metadata_says_where_the_graph_comes_from(tiny_checkpoint: Checkpoint) -> None:
    metadata = export_metadata(tiny_checkpoint, "tensorrt")
    assert metadata["schema"] == 1
    assert metadata["target"] == "tensorrt"
    assert metadata["model"] == "UNet2DModel"
    assert metadata["bits"] == "w4a8"
    assert metadata["weights_sha256"] == tiny_checkpoint.model.weights_sha256
    assert len(metadata["weights_sha256"]) == 64


def test_the_metadata_is_enough_to_sample(tiny_checkpoint: Checkpoint) -> None:
    metadata = json.loads(json.dumps(export_metadata(tiny_checkpoint, "portable")))
    assert sample_shape(metadata["config"]) == (1, 8, 8)
    assert label_count(metadata["config"]) == 3
    scheduler = build_scheduler(metadata["scheduler"], None, metadata["recipe"]["steps"])
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.timesteps.tolist() == metadata["timesteps"] == [67, 34, 1]


def test_what_was_written_is_read(tiny_checkpoint: Checkpoint) -> None:
    metadata = read_metadata({"dmq": json.dumps(export_metadata(tiny_checkpoint, "openvino"))}, "model.onnx")
    assert metadata.target == "openvino"
    assert metadata.bits == "w4a8"
    assert metadata.config == tiny_checkpoint.model.config
    assert metadata.scheduler == tiny_checkpoint.model.scheduler
    assert metadata.timesteps == (67, 34, 1)
    assert metadata.steps == 3
    assert metadata.per_step
    assert metadata.batch is None


def test_the_batch_of_a_graph_is_read(tiny_checkpoint: Checkpoint) -> None:
    for batch in (Batch(4, 4, 4), Batch(1, 2, 8)):
        written = json.dumps(export_metadata(tiny_checkpoint, "tensorrt", batch=batch))
        assert read_metadata({"dmq": written}, "model.onnx").batch == batch


def test_a_file_of_another_tool_is_refused() -> None:
    with pytest.raises(DmqError, match=r"model.onnx was not exported by dmq-export: it carries no 'dmq' metadata"):
        read_metadata({"producer": "x"}, "model.onnx")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"schema": 2}, "ValueError schema 2, 1 was expected"),
        ({"schema": None}, "ValueError schema None"),
        ({"timesteps": []}, "ValueError no calibrated steps"),
        ({"timesteps": 3}, "TypeError"),
        ({"recipe": {}}, "KeyError 'steps'"),
        ({"recipe": {"steps": 0, "scales": "static"}}, "ValueError no calibrated steps"),
        ({"recipe": {"steps": 3, "scales": "dynamic"}}, "ValueError no calibrated steps, or scales that are neither"),
        ({"config": None}, "TypeError"),
        ({"batch": [4]}, "TypeError"),
    ],
)
def test_damaged_metadata_is_refused(change: dict[str, object], reason: str, tiny_checkpoint: Checkpoint) -> None:
    text = json.dumps(export_metadata(tiny_checkpoint, "portable") | change)
    with pytest.raises(DmqError, match=f"model.onnx carries damaged 'dmq' metadata \\({reason}.*: export it again"):
        read_metadata({"dmq": text}, "model.onnx")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_metadata_that_is_no_json_object_are_refused(text: str) -> None:
    with pytest.raises(DmqError, match="carries damaged 'dmq' metadata"):
        read_metadata({"dmq": text}, "model.onnx")
