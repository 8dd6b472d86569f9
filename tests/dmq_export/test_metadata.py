"""What an exported file says of itself."""

import json

import pytest

from calib.model.schedulers import build_scheduler
from dmq_export.batch import Batch
from dmq_export.checkpoint import Checkpoint
from dmq_export.denoiser.config import label_count, sample_shape
from dmq_export.errors import DmqError
from dmq_export.metadata import model_facts, read_facts


def test_the_facts_survive_json(tiny_checkpoint: Checkpoint) -> None:
    facts = model_facts(tiny_checkpoint, "portable")
    assert json.loads(json.dumps(facts)) == facts


def test_the_facts_say_where_the_graph_comes_from(tiny_checkpoint: Checkpoint) -> None:
    facts = model_facts(tiny_checkpoint, "tensorrt")
    assert facts["schema"] == 1
    assert facts["target"] == "tensorrt"
    assert facts["model"] == "UNet2DModel"
    assert facts["bits"] == "w4a8"
    assert facts["weights_sha256"] == tiny_checkpoint.model.weights_sha256
    assert len(facts["weights_sha256"]) == 64


def test_the_facts_are_enough_to_sample(tiny_checkpoint: Checkpoint) -> None:
    facts = json.loads(json.dumps(model_facts(tiny_checkpoint, "portable")))
    assert sample_shape(facts["config"]) == (1, 8, 8)
    assert label_count(facts["config"]) == 3
    scheduler = build_scheduler(facts["scheduler"], None, facts["recipe"]["steps"])
    assert type(scheduler).__name__ == "DDIMScheduler"
    assert scheduler.timesteps.tolist() == facts["timesteps"] == [67, 34, 1]


def test_what_was_written_is_read(tiny_checkpoint: Checkpoint) -> None:
    facts = read_facts({"dmq": json.dumps(model_facts(tiny_checkpoint, "openvino"))}, "model.onnx")
    assert facts.target == "openvino"
    assert facts.bits == "w4a8"
    assert facts.config == tiny_checkpoint.model.config
    assert facts.scheduler == tiny_checkpoint.model.scheduler
    assert facts.timesteps == (67, 34, 1)
    assert facts.steps == 3
    assert facts.per_step
    assert facts.batch is None


def test_the_batch_of_a_graph_is_read(tiny_checkpoint: Checkpoint) -> None:
    for batch in (Batch(4, 4, 4), Batch(1, 2, 8)):
        written = json.dumps(model_facts(tiny_checkpoint, "tensorrt", batch=batch))
        assert read_facts({"dmq": written}, "model.onnx").batch == batch


def test_a_file_of_another_tool_is_refused() -> None:
    with pytest.raises(DmqError, match=r"model.onnx was not exported by dmq-export: it carries no 'dmq' metadata"):
        read_facts({"producer": "x"}, "model.onnx")


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
def test_damaged_facts_are_refused(change: dict[str, object], reason: str, tiny_checkpoint: Checkpoint) -> None:
    text = json.dumps(model_facts(tiny_checkpoint, "portable") | change)
    with pytest.raises(DmqError, match=f"model.onnx carries damaged 'dmq' metadata \\({reason}.*: export it again"):
        read_facts({"dmq": text}, "model.onnx")


@pytest.mark.parametrize("text", ["", "[]", "{", "{}"])
def test_facts_that_are_no_json_object_are_refused(text: str) -> None:
    with pytest.raises(DmqError, match="carries damaged 'dmq' metadata"):
        read_facts({"dmq": text}, "model.onnx")
