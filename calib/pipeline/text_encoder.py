"""Embeddings of prompts, from the pipeline's own text encoders.

A pipeline knows best what its denoiser gets: which encoders are asked, how their outputs are joined and padded, what
stands for no prompt. So it is run up to its first evaluation, and the conditioning of that is kept.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from calib.device import reproducible
from calib.model.load import read_config, reason
from calib.pipeline.engine_denoiser import EngineDenoiser, build_pipeline, denoiser_name
from dmq_export.denoiser.arguments import GUIDANCE, LABELS, arguments
from dmq_export.denoiser.embeddings import Arrays, Embeddings, fitted
from dmq_export.errors import ModelError

BATCH = 16  # prompts that are encoded together
STEPS = 4  # as good as any: only the first evaluation is reached
GUIDED = 2.0  # any scale above 1 makes a pipeline evaluate both branches


class _Reached(Exception):  # noqa: N818 - control flow, like StopIteration
    """The pipeline evaluates its denoiser for the first time; the conditioning is the same in all evaluations."""

    def __init__(self, conditioning: Arrays) -> None:
        super().__init__()
        self.conditioning = conditioning


def encode_prompts(
    folder: Path,
    prompts: Sequence[str],
    *,
    guidance_scale: float | None,
    device: torch.device,
    sample_size: int | None = None,
    advance: Callable[[int], None] = lambda _: None,
) -> Embeddings:
    """Embeddings of ``prompts`` and, for guidance, of the empty prompt, by the pipeline in ``folder``.

    Args:
        guidance_scale: classifier-free guidance, or a distilled model's argument of that name; None for none.
        sample_size: as :func:`calib.model.load.load_model`.
        advance: called with the number of prompts done, for progress.

    Raises:
        ModelError: the folder holds no pipeline with a text encoder, or its encoder cannot be run.
        DmqError: the GPU's memory runs out.
    """
    name = denoiser_name(folder)
    config = read_config(folder / name, sample_size)
    class_name = str(config["_class_name"])
    taken = [argument for argument in arguments(class_name, config) if argument.name != LABELS]
    if not taken:
        raise ModelError(f"{class_name} is told no text: leave out the prompts")
    distilled = any(argument.name == GUIDANCE for argument in taken)
    pipeline = build_pipeline(folder, EngineDenoiser(_stop, class_name, config))
    pipeline.set_progress_bar_config(disable=True)
    guided = guidance_scale is not None and not distilled
    options = _options(pipeline, config, guidance_scale if distilled else GUIDED if guided else 1.0)
    conditional: list[Arrays] = []
    unconditional: list[Arrays] = []
    with reproducible(device):  # a calibration is known by its embeddings, among others
        pipeline.to(device)
        for start in range(0, len(prompts), BATCH):
            batch = list(prompts[start : start + BATCH])
            conditioning = _first_conditioning(pipeline, batch, options, rows=(2 if guided else 1) * len(batch))
            # text pipelines put the empty prompt's half first
            conditional.append({name: value[-len(batch) :] for name, value in conditioning.items()})
            unconditional.append({name: value[: len(batch)] for name, value in conditioning.items()} if guided else {})
            advance(len(batch))
    return fitted(Embeddings(_joined(conditional), _joined(unconditional)), taken, guidance_scale)


def _stop(sample: NDArray[np.float32], timestep: float, **conditioning: NDArray[Any]) -> NDArray[np.float32]:
    raise _Reached(conditioning)


def _options(pipeline: Any, config: Mapping[str, Any], guidance_scale: float | None) -> dict[str, Any]:
    """Arguments of the pipeline's call, of those that it takes; without a scale its own default stands."""
    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    pixels = getattr(pipeline, "vae_scale_factor", 1)
    options = {
        "num_inference_steps": STEPS,
        "height": height * pixels,
        "width": width * pixels,
        "output_type": "latent",
        "use_resolution_binning": False,  # PixArt's; an engine has one size
    }
    if guidance_scale is not None:
        options["guidance_scale"] = guidance_scale
    accepted = inspect.signature(pipeline.__call__).parameters
    return {name: value for name, value in options.items() if name in accepted}


def _first_conditioning(pipeline: Any, prompts: list[str], options: Mapping[str, Any], *, rows: int) -> Arrays:
    """What the pipeline gives its denoiser besides samples, each ``[rows, ...]`` by name."""
    name = type(pipeline).__name__
    try:
        pipeline(prompt=prompts, **options)
    except _Reached as reached:
        arrays = reached.conditioning
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever the pipeline, its tokenizers and its encoders raise
        raise ModelError(f"{name} cannot encode the prompts: {reason(error)}") from error
    else:
        raise ModelError(f"{name} never asked its denoiser, so it is not known what it would tell it")
    for key, value in arrays.items():
        if len(value) != rows:
            unguided = rows > len(prompts) == len(value)
            advice = "it knows no guidance, leave out --guidance-scale" if unguided else f"{rows} rows were expected"
            raise ModelError(f"{name} told {key} {list(value.shape)} for {len(prompts)} prompts: {advice}")
    return arrays


def _joined(batches: Sequence[Arrays]) -> Arrays:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
