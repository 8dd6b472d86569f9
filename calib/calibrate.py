"""The whole calibration: from a diffusers folder to a DMQ checkpoint."""

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from torch import Tensor

from calib.adaround import adaround
from calib.capture import capture_bytes, capture_inputs
from calib.fit import LayerFit, fit_layer
from calib.metrics import prediction_sqnr
from calib.model import SourceModel, load_model
from calib.pts import vote
from calib.recipe import Recipe
from calib.reference import quantized
from calib.survey import Survey, survey
from calib.trajectories import Conditioning, SamplerSettings, Trajectories, record_trajectories
from dmq_export import __version__
from dmq_export.checkpoint import Checkpoint, ModelFacts, Probe, require_place, save_checkpoint
from dmq_export.errors import ModelError
from dmq_export.layer import LayerSpec, QuantizedLayer
from dmq_export.memory import peak_memory
from dmq_export.network import float_tensors
from dmq_export.progress import Progress
from dmq_export.schedulers import build_scheduler
from dmq_export.seeds import stream_seed
from dmq_export.signature import labels_for

PROBE_SAMPLES = 2


@dataclass(frozen=True)
class Limits:
    """What a calibration may use.

    Attributes:
        device: that the network runs on and layers are fitted on.
        capture_bytes: memory for captured layer inputs; more layers than fit are captured in several passes.
    """

    device: torch.device
    capture_bytes: int = 2**30


def calibrate(
    model: Path,
    output: Path,
    recipe: Recipe,
    limits: Limits,
    progress: Progress,
    *,
    strict: bool = False,
    fresh: bool = False,
) -> Checkpoint:
    """Quantize the diffusers denoiser in ``model`` by ``recipe`` and write the checkpoint to ``output``.

    Args:
        strict: refuse a model with layers that cannot be quantized.
        fresh: replace what is at ``output``.

    Raises:
        DmqError: bad input; nothing is written then.
    """
    require_place(output, replace_existing=fresh)
    source = load_model(model, limits.device)
    surveyed = survey(source, recipe.bits, recipe.scheme, recipe.float_layers)
    if strict:
        _require_full_coverage(surveyed)
    checkpoint = calibrated(source, surveyed, recipe, limits, progress)
    run = {"seconds": progress.seconds, "peak_memory_bytes": peak_memory(), "machine": platform.platform()}
    save_checkpoint(checkpoint, output, run=run, replace_existing=fresh)
    return checkpoint


def _require_full_coverage(surveyed: Survey) -> None:
    for layer in surveyed.coverage.float_layers:
        if not layer.by_design:
            raise ModelError(
                f"layer {layer.name} stays float ({layer.reason}) and --strict is set: accept it with "
                f"--float-layer {layer.name}, or leave out --strict"
            )


def calibrated(source: SourceModel, surveyed: Survey, recipe: Recipe, limits: Limits, progress: Progress) -> Checkpoint:
    """The checkpoint of ``source``, in memory.

    Raises:
        DmqError: the recipe does not suit the model.
    """
    calibration = _record(source, recipe, "trajectories", recipe.samples, progress)
    fits = _fit_layers(source, surveyed, calibration, recipe, limits, progress)
    layers = _refine_rounding(source, surveyed, fits, calibration, recipe, progress)
    layers, votes = _vote(source, layers, calibration, recipe, progress)
    held_out = _record(source, recipe, "held-out trajectories", recipe.check_samples, progress)
    metrics = {
        "prediction_sqnr_db": _measure(source, layers, held_out, progress),
        "layers": {fit.layer.spec.name: fit.report | votes.get(fit.layer.spec.name, {}) for fit in fits},
    }
    quantized_names = {layer.spec.name for layer in layers}
    return Checkpoint(
        model=_model_facts(source, recipe),
        recipe=recipe.to_json(),
        timesteps=calibration.timesteps.numpy(),
        layers=tuple(layers),
        float_layers=surveyed.coverage.float_layers,
        float_tensors=float_tensors(source.network, quantized_names),
        probe=_probe(held_out),
        metrics=metrics,
        versions={
            "dmq-export": __version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
    )


def _record(source: SourceModel, recipe: Recipe, name: str, count: int, progress: Progress) -> Trajectories:
    settings = SamplerSettings(recipe.scheduler, recipe.steps, recipe.eta, recipe.guidance_scale)
    branches = 1 if recipe.guidance_scale is None else 2
    with progress.stage(name, count * branches * recipe.steps, "evaluation") as advance:
        return record_trajectories(
            source,
            settings,
            conditioning_for(source, recipe, count),
            count=count,
            seed=stream_seed(recipe.seed, name),
            advance=advance,
        )


def conditioning_for(source: SourceModel, recipe: Recipe, count: int) -> Conditioning:
    """The recipe's labels cycled over ``count`` samples; without any, all labels the model knows.

    Raises:
        ModelError: a label the model does not know, or guidance without a null label.
    """
    if recipe.guidance_scale is not None and recipe.null_label is None:
        raise ModelError("guidance needs the label that stands for no label: give --null-label")
    if source.config.get("cross_attention_dim") is not None:
        raise ModelError(
            f"{source.class_name} is told what to draw by text embeddings, which calibrate cannot give yet"
        )
    labels = labels_for(source.config, recipe.labels, recipe.null_label, count)
    if labels is None:
        return Conditioning({}, {})
    given = torch.tensor(labels)
    without = {} if recipe.null_label is None else {"class_labels": torch.full_like(given, recipe.null_label)}
    return Conditioning({"class_labels": given}, without)


def _fit_layers(
    source: SourceModel,
    surveyed: Survey,
    calibration: Trajectories,
    recipe: Recipe,
    limits: Limits,
    progress: Progress,
) -> list[LayerFit]:
    fits = []
    for specs in _passes(surveyed.coverage.quantized, calibration.evaluations, limits.capture_bytes):
        with progress.stage("layer inputs", calibration.evaluations, "evaluation") as advance:
            inputs = capture_inputs(source.network, calibration, specs, seed=recipe.seed, advance=advance)
        with progress.stage("layer fits", len(specs), "layer") as advance:
            for spec in specs:
                module = source.network.get_submodule(spec.name)
                fits.append(fit_layer(spec, module, inputs.pop(spec.name).to(limits.device), recipe))
                advance(1)
    return fits


def _passes(specs: Sequence[LayerSpec], evaluations: int, budget: int) -> Iterator[list[LayerSpec]]:
    """Layers whose captures fit the budget together; at least one at a time."""
    chosen: list[LayerSpec] = []
    used = 0
    for spec in specs:
        size = capture_bytes(spec, evaluations)
        if chosen and used + size > budget:
            yield chosen
            chosen, used = [], 0
        chosen.append(spec)
        used += size
    yield chosen


def _refine_rounding(
    source: SourceModel,
    surveyed: Survey,
    fits: Sequence[LayerFit],
    calibration: Trajectories,
    recipe: Recipe,
    progress: Progress,
) -> list[QuantizedLayer]:
    layers = [fit.layer for fit in fits]
    if recipe.rounding != "adaround":
        return layers
    with progress.stage("AdaRound", len(surveyed.blocks), "block") as advance:
        return adaround(
            source.network,
            surveyed.blocks,
            layers,
            calibration,
            iterations=recipe.round_iterations,
            evaluations=recipe.round_samples,
            seed=recipe.seed,
            advance=advance,
        )


def _vote(
    source: SourceModel,
    layers: Sequence[QuantizedLayer],
    calibration: Trajectories,
    recipe: Recipe,
    progress: Progress,
) -> tuple[list[QuantizedLayer], dict[str, dict[str, Any]]]:
    """The layers with their PTS exponents, and the votes for the report."""
    voters = [
        layer
        for layer in layers
        if recipe.pts_layers == "all" or (recipe.pts_layers == "skip" and len(layer.spec.parts) > 1)
    ]
    if not voters:
        return list(layers), {}
    with progress.stage("PTS votes", calibration.evaluations, "evaluation") as advance:
        votes = vote(source.network, calibration, voters, kappa=recipe.pts_kappa, advance=advance)
    shifts = {name: result.shift.numpy().astype(np.uint8) for name, result in votes.items()}
    report = {
        name: {
            "pts_channels": int((result.shift > 0).sum()),
            "pts_share": [round(float(share), 3) for share in result.share],
        }
        for name, result in votes.items()
    }
    return [replace(layer, shift=shifts.get(layer.spec.name, layer.shift)) for layer in layers], report


def _measure(
    source: SourceModel, layers: Sequence[QuantizedLayer], held_out: Trajectories, progress: Progress
) -> dict[str, Any]:
    """SQNR of the noise prediction per step, with the weights, the activations, and both quantized."""
    measured: dict[str, Any] = {"timesteps": held_out.timesteps.tolist()}
    device = next(source.network.parameters()).device
    kinds = {"weights": (True, False), "activations": (False, True), "both": (True, True)}
    with progress.stage("check", len(kinds), "variant") as advance:
        for name, (weights, activations) in kinds.items():
            with quantized(
                source.network, layers, held_out.timesteps, weights=weights, activations=activations
            ) as reference:

                def denoise(x: Tensor, timestep: Tensor, **conditioning: Tensor) -> Tensor:
                    moved = {key: value.to(device) for key, value in conditioning.items()}
                    return reference(x.to(device), timestep, **moved).cpu()

                measured[name] = [round(value, 3) for value in prediction_sqnr(denoise, held_out)]
            advance(1)
    return measured


def _model_facts(source: SourceModel, recipe: Recipe) -> ModelFacts:
    scheduler = build_scheduler(source.scheduler, recipe.scheduler, recipe.steps)
    return ModelFacts(
        class_name=source.class_name,
        config=dict(source.config),
        scheduler=json.loads(scheduler.to_json_string()),
        weights_sha256=source.weights_sha256,
    )


def _probe(held_out: Trajectories) -> Probe:
    """A few held-out evaluations: first, middle and last step."""
    last = len(held_out.timesteps) - 1
    steps = sorted({0, last // 2, last})
    rows = slice(0, PROBE_SAMPLES)
    return Probe(
        timesteps=held_out.timesteps[steps].numpy(),
        sample=held_out.inputs[steps][:, rows].numpy(),
        conditioning={key: value[rows].numpy() for key, value in held_out.conditioning.items()},
        prediction=held_out.predictions[steps][:, rows].numpy(),
    )
