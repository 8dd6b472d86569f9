"""What an exported file says of itself."""

import json

from dmq_export.checkpoint import Checkpoint
from dmq_export.facts import model_facts
from dmq_export.schedulers import build_scheduler
from dmq_export.signature import label_count, sample_shape


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
