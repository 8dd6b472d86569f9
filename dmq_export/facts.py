"""What an exported file says of itself, so that a sampler needs no other file."""

from dataclasses import astuple
from typing import Any

from dmq_export.batch import Batch
from dmq_export.checkpoint import Checkpoint

FACTS = "dmq"  # the ONNX metadata key that holds the facts as JSON


def model_facts(checkpoint: Checkpoint, target: str, dtype: str, batch: Batch | None) -> dict[str, Any]:
    """The facts of a graph exported from ``checkpoint`` for ``target``; ``batch`` as smallest, usual, largest."""
    return {
        "schema": 1,
        "target": target,
        "dtype": dtype,
        "batch": None if batch is None else list(astuple(batch)),
        "model": checkpoint.model.class_name,
        "bits": str(checkpoint.bits),
        "config": dict(checkpoint.model.config),
        "scheduler": dict(checkpoint.model.scheduler),
        "recipe": dict(checkpoint.recipe),
        "timesteps": checkpoint.timesteps.tolist(),
        "weights_sha256": checkpoint.model.weights_sha256,
        "float_layers": {layer.name: layer.reason for layer in checkpoint.float_layers},
    }
