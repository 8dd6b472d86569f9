"""What an exported file says of itself, so that a sampler needs no other file."""

import json
from collections.abc import Mapping
from dataclasses import astuple, dataclass
from typing import Any

from dmq_export.batch import Batch
from dmq_export.checkpoint import Checkpoint
from dmq_export.errors import DmqError

METADATA_KEY = "dmq"  # the ONNX metadata key that holds it as JSON
SCHEMA = 1


@dataclass(frozen=True)
class ExportMetadata:
    """What must be known of a quantized network to sample it.

    Attributes:
        target: the runtime its graph was lowered for; ``reference`` for a checkpoint.
        bits: as ``w4a8``.
        config: of the diffusers model.
        scheduler: configuration of the scheduler it was calibrated with.
        recipe: the calibration settings.
        timesteps: calibrated, in sampling order.
        batch: sizes that the graph was exported for; None for any.
    """

    target: str
    bits: str
    config: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    recipe: Mapping[str, Any]
    timesteps: tuple[float, ...]
    batch: Batch | None = None

    @property
    def steps(self) -> int:
        """Sampling steps of the calibration; some schedulers evaluate one of them twice."""
        return int(self.recipe["steps"])

    @property
    def per_step(self) -> bool:
        """Whether activation ranges belong to the timesteps, rather than to all of them."""
        return bool(self.recipe["scales"] == "per-step")


def export_metadata(
    checkpoint: Checkpoint, target: str, dtype: str = "float32", batch: Batch | None = None
) -> dict[str, Any]:
    """The metadata of a graph exported from ``checkpoint`` for ``target``, as JSON values.

    ``batch`` becomes its smallest, usual and largest size.
    """
    return {
        "schema": SCHEMA,
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


def read_metadata(metadata: Mapping[str, str], name: object) -> ExportMetadata:
    """Ours among the metadata of the file called ``name``.

    Raises:
        DmqError: there are none, or they are damaged or of another schema.
    """
    if METADATA_KEY not in metadata:
        raise DmqError(f"{name} was not exported by dmq-export: it carries no {METADATA_KEY!r} metadata")
    try:
        return metadata_from_json(json.loads(metadata[METADATA_KEY]))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DmqError(
            f"{name} carries damaged {METADATA_KEY!r} metadata ({type(error).__name__} {error}): export it again"
        ) from error


def metadata_from_json(values: Mapping[str, Any]) -> ExportMetadata:
    """The metadata that :func:`export_metadata` wrote.

    Raises:
        KeyError, TypeError, ValueError: they are not of this schema.
    """
    if values["schema"] != SCHEMA:
        raise ValueError(f"schema {values['schema']!r}, {SCHEMA} was expected")
    metadata = ExportMetadata(
        target=str(values["target"]),
        bits=str(values["bits"]),
        config=dict(values["config"]),
        scheduler=dict(values["scheduler"]),
        recipe=dict(values["recipe"]),
        timesteps=tuple(float(timestep) for timestep in values["timesteps"]),
        batch=None if values["batch"] is None else Batch(*map(int, values["batch"])),
    )
    if not metadata.timesteps or metadata.steps < 1 or metadata.recipe["scales"] not in ("static", "per-step"):
        raise ValueError("no calibrated steps, or scales that are neither static nor per step")
    return metadata
