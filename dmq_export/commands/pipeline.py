"""An ordinary diffusers pipeline whose denoiser is one of our engines."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from calib.model.schedulers import build_scheduler
from dmq_export.commands.engine import Execution, open_engine
from dmq_export.common.bundled import model_folder
from dmq_export.common.extras import require
from dmq_export.denoiser.arguments import arguments
from dmq_export.denoiser.config import sample_shape
from dmq_export.errors import DmqError
from dmq_export.metadata import ExportMetadata
from dmq_export.sampling.deviations import deviations


def load_pipeline(model: str | Path, engine: str | Path, execution: Execution | None = None) -> Any:
    """The diffusers pipeline in the folder ``model`` with the engine in place of its ``unet`` or ``transformer``.

    Everything else is the pipeline's own: text encoders, scheduler, decoder. A scheduler that visits other timesteps
    than were calibrated is a warning, for each then uses the activation ranges of the nearest that was.

    Args:
        model: a local pipeline's folder.
        engine: an ``.onnx`` file, a ``.plan``, or a checkpoint folder.
        execution: how to run it; None takes what the file was exported for.

    Raises:
        DmqError: either does not load, the engine was made from another model, or PyTorch or diffusers is missing.
    """
    require("load_pipeline", "torch", "diffusers")
    from calib.model.load import read_config
    from calib.pipeline.engine_denoiser import EngineDenoiser, build_pipeline, denoiser_name

    folder = model_folder(str(model))
    opened = open_engine(Path(engine), execution or Execution())
    metadata = opened.metadata
    config = read_config(folder / denoiser_name(folder), metadata.recipe.get("sample_size"))
    _require_same_model(folder, config, metadata)
    pipeline = build_pipeline(
        folder, EngineDenoiser(opened.denoise, str(metadata.config["_class_name"]), metadata.config)
    )
    for note in _notes(pipeline.scheduler, metadata):
        warnings.warn(f"{folder}: {note}", stacklevel=2)
    return pipeline


def _notes(scheduler: Any, metadata: ExportMetadata) -> Iterator[str]:
    """Where the pipeline's own scheduler, at the calibrated number of steps, departs from the calibration."""
    name = type(scheduler).__name__
    timesteps = build_scheduler(
        {**scheduler.config, "_class_name": name}, None, metadata.steps, metadata.config
    ).timesteps
    return deviations(
        metadata,
        scheduler=name,
        timesteps=[float(timestep) for timestep in timesteps],
        eta=float(metadata.recipe.get("eta") or 0),  # these two are said at the pipeline's call
        guidance_scale=metadata.recipe.get("guidance_scale"),
    )


def _require_same_model(folder: Path, config: Mapping[str, Any], metadata: ExportMetadata) -> None:
    """Refuse an engine that the pipeline's denoiser cannot have become."""
    ours, its = _described(metadata.config), _described(config)
    if ours != its:
        raise DmqError(f"the engine is of another model than {folder}: of a {ours}, the pipeline has a {its}")


def _described(config: Mapping[str, Any]) -> str:
    """Class, sample and arguments in words."""
    class_name = str(config["_class_name"])
    takes = "".join(f", {argument.text()}" for argument in arguments(class_name, config))
    return f"{class_name} that takes sample {list(sample_shape(config))}{takes}"
