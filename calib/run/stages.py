"""The stages of a calibration in their order, each a function of the run and of what those before it found."""

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from calib.fit.adaround import adaround
from calib.fit.layer import LayerFit, LayerWeights, fit_key, load_fit
from calib.fit.mixed_precision import MORE, few_evaluations, most_sensitive, prediction_error
from calib.fit.pts import count_votes, decide
from calib.quant.patches import weight_of
from calib.record.block_inputs import BlockRecorder
from calib.record.conditioning import recipe_conditioning
from calib.record.layer_inputs import Captures, EvaluationIndex, InputHook, inputs_seen
from calib.record.trajectories import (
    SamplerSettings,
    SetSize,
    Trajectories,
    joined,
    record_trajectories,
    set_size,
)
from calib.run.context import RunContext
from calib.run.evaluate import VARIANTS, sqnr_by_step
from calib.run.plan import ScalingGroup
from calib.run.workers import FitTask, run_tasks
from dmq_export.bits import Bits
from dmq_export.common.progress import Advance
from dmq_export.common.seeds import stream_seed
from dmq_export.layer import LayerSpec, QuantizedLayer


def record(run: RunContext, name: str, count: int, *, held_out: bool = False) -> Trajectories:
    """Sample ``count`` trajectories; sets of different names are independent.

    On the way of a set that is not held out, the inputs of the first pass's layers are captured.

    Args:
        held_out: of the prompts that the calibration does not draw, where there are any.
    """
    recipe = run.recipe.held_out() if held_out else run.recipe
    settings = SamplerSettings(recipe.scheduler, recipe.steps, recipe.eta, recipe.guidance_scale)
    conditioning = recipe_conditioning(run.source, recipe, count)
    branches, size = conditioning.branches, set_size(run.source, settings, conditioning, count)
    captures = None if held_out else _captures(run, run.plan.passes[0], size, branches)
    batches = {f"{name}/{batch.start}": batch for batch in _parted(count, run.plan.batch)}
    seed = stream_seed(recipe.seed, name)

    def compute(key: str, advance: Advance) -> None:
        batch = batches[key]
        rows = range(batch.start * branches, batch.stop * branches)
        with _recording(captures, rows) as hooks:
            made = record_trajectories(
                run.source,
                settings,
                conditioning,
                batch,
                seed=seed,
                advance=advance,
                step_context=lambda step: inputs_seen(run.source.network, hooks, EvaluationIndex(rows.start, step)),
            )
            run.work.save(key, made.tensors())

    sizes = {key: len(batch) * branches * recipe.steps for key, batch in batches.items()}
    run.each(name, "evaluation", sizes, compute)
    return joined([Trajectories.of_tensors(run.work.load(key).tensors) for key in batches])


def fit_layers(run: RunContext, calibration: Trajectories) -> list[LayerFit]:
    """Fit every layer on its own; in the order of the selection."""
    for groups in run.plan.passes:
        if not _fitted(run, _specs_of(groups)):
            captures = _captures(run, groups, calibration.size, calibration.branches)
            _capture(run, captures, calibration)
            _fit_pass(run, captures, groups)
            if run.processes.leads:
                captures.forget()
    return [load_fit(spec, run.work) for spec in run.selection.coverage.quantized]


def widen(run: RunContext, fits: Sequence[LayerFit], calibration: Trajectories) -> list[LayerFit]:
    """The fits of all layers, the most sensitive ones' again and with more bits, if the recipe asks for it."""
    if not run.recipe.sensitive_share:
        return list(fits)
    errors = _prediction_errors(run, [fit.layer for fit in fits], calibration)
    groups = [group for groups in run.plan.passes for group in groups]
    chosen = _specs_of(most_sensitive(groups, errors, run.recipe.sensitive_share))
    wide = {spec.name: replace(spec, bits=Bits(max(MORE.weight, spec.bits.weight), MORE.activation)) for spec in chosen}
    wider = replace(run, selection=run.selection.with_specs(wide), plan=run.plan.only(wide))
    return [
        replace(fit, report=fit.report | {"prediction_db": round(-10 * math.log10(max(error, 1e-12)), 2)})
        for fit, error in zip(fit_layers(wider, calibration), errors.values(), strict=True)
    ]


def round_blocks(run: RunContext, layers: Sequence[QuantizedLayer], calibration: Trajectories) -> list[QuantizedLayer]:
    """AdaRound block by block, if the recipe asks for it."""
    recipe = run.recipe
    if recipe.rounding != "adaround":
        return list(layers)
    blocks = {f"blocks/{block.name}": block for block in run.selection.blocks}
    missing = [blocks[key].name for key in run.processes.share(list(blocks)) if key not in run.work]
    network, evaluations = run.source.network, recipe.round_samples
    recorder = BlockRecorder(network, missing, calibration, evaluations=evaluations, batch=run.plan.batch)

    def compute(key: str, advance: Advance) -> None:
        block = blocks[key]
        rounded = adaround(
            network,
            block,
            layers,
            recorder.take(block.name),
            iterations=recipe.round_iterations,
            seed=recipe.seed,
            advance=lambda iterations: advance(iterations, block.name),
        )
        run.work.save(key, {layer.spec.name: torch.from_numpy(layer.codes) for layer in rounded})

    run.each("AdaRound", "iteration", dict.fromkeys(blocks, recipe.round_iterations), compute)
    codes = {name: value.numpy() for key in blocks for name, value in run.work.load(key).tensors.items()}
    return [replace(layer, codes=codes[layer.spec.name]) for layer in layers]


def vote(
    run: RunContext, layers: Sequence[QuantizedLayer], calibration: Trajectories
) -> tuple[list[QuantizedLayer], dict[str, dict[str, Any]]]:
    """The layers with their PTS exponents, and the votes for the report."""
    voters = [layer for layer in layers if _votes(run, layer.spec)]
    if not voters:
        return list(layers), {}
    batches = {f"votes/{rows.start}": rows for rows in _voting(run, calibration)}

    def compute(key: str, advance: Advance) -> None:
        counts = count_votes(run.source.network, calibration, batches[key], voters, advance=advance)
        run.work.save(key, counts)

    sizes = {key: len(rows) * calibration.size.steps for key, rows in batches.items()}
    run.each("PTS votes", "evaluation", sizes, compute)
    counts = [run.work.load(key).tensors for key in batches]
    votes = {
        name: decide(torch.stack([of_batch[name] for of_batch in counts]).sum(0), run.recipe.pts_kappa)
        for name in counts[0]
    }
    shifts = {name: vote.shift.numpy().astype(np.uint8) for name, vote in votes.items()}
    shifted = [replace(layer, shift=shifts.get(layer.spec.name, layer.shift)) for layer in layers]
    return shifted, {name: vote.report() for name, vote in votes.items()}


def evaluate(run: RunContext, layers: Sequence[QuantizedLayer], held_out: Trajectories) -> dict[str, Any]:
    """SQNR of the noise prediction per step, with the weights, the activations, and both quantized."""
    variants = {f"check/{variant}": variant for variant in VARIANTS}

    def compute(key: str, advance: Advance) -> None:
        sqnr = sqnr_by_step(run.source, layers, held_out, variants[key], batch=run.plan.batch)
        run.work.save(key, {}, {"sqnr_db": sqnr})
        advance(1, variants[key])

    run.each("check", "variant", dict.fromkeys(variants, 1), compute)
    measured = {variant: run.work.load(key).facts["sqnr_db"] for key, variant in variants.items()}
    return {"timesteps": held_out.timesteps.tolist(), **measured}


def _captures(run: RunContext, groups: Sequence[ScalingGroup], size: SetSize, branches: int) -> Captures:
    """The inputs of a pass's layers, in batches of the rows that are evaluated at once."""
    batches = _parted(size.rows, run.plan.batch * branches)
    return Captures(run.work, batches, size.steps, _specs_of(groups), seed=run.recipe.seed)


def _recording(captures: Captures | None, rows: range) -> AbstractContextManager[Mapping[str, InputHook]]:
    return captures.recording(rows) if captures else nullcontext({})


def _capture(run: RunContext, captures: Captures, calibration: Trajectories) -> None:
    """Evaluate the network again where the inputs were not captured while the trajectories were recorded."""
    batches = {str(rows.start): rows for rows in captures.batches}

    def compute(key: str, advance: Advance) -> None:
        captures.take(run.source.network, calibration, batches[key], advance=advance)

    def has(key: str) -> bool:
        return captures.has(batches[key])

    if all(has(key) for key in run.processes.share(list(batches))):
        run.processes.wait()  # for those who have something to do
    else:
        sizes = {key: len(rows) * calibration.size.steps for key, rows in batches.items()}
        run.each("layer inputs", "evaluation", sizes, compute, has)


def _fit_pass(run: RunContext, captures: Captures, groups: Sequence[ScalingGroup]) -> None:
    mine = run.processes.share(groups)
    missing = [specs for specs in mine if not _fitted(run, specs)]
    total = sum(len(specs) for specs in mine)
    with run.progress.stage("layer fits", total, "layer") as advance:
        advance(total - sum(len(specs) for specs in missing))

        def done(seconds: dict[str, float]) -> None:
            for name, taken in seconds.items():
                advance(1, name)
                run.progress.note("layer", name=name, seconds=round(taken, 3))

        run_tasks([_task(run, specs, captures) for specs in missing], run.plan.workers, done)
        run.processes.wait()


def _fitted(run: RunContext, specs: Sequence[LayerSpec]) -> bool:
    return all(fit_key(spec) in run.work for spec in specs)


def _task(run: RunContext, specs: Sequence[LayerSpec], captures: Captures) -> FitTask:
    layers = tuple(_layer_weights(run, spec) for spec in specs)
    recipe = replace(run.recipe, embeddings=None)  # no fit looks at them, and they would go to every worker
    return FitTask(layers, captures, recipe, run.work, run.device)


def _layer_weights(run: RunContext, spec: LayerSpec) -> LayerWeights:
    module = run.source.network.get_submodule(spec.name)
    bias = module.bias
    return LayerWeights(spec, weight_of(module), bias.detach() if isinstance(bias, torch.Tensor) else None)


def _prediction_errors(
    run: RunContext, layers: Sequence[QuantizedLayer], calibration: Trajectories
) -> dict[str, float]:
    """What rounding each layer costs, by name, in the order of the selection."""
    items = {f"sensitivity/{layer.spec.name}": layer for layer in layers}
    few = few_evaluations(calibration)

    def compute(key: str, advance: Advance) -> None:
        error = prediction_error(run.source, items[key], few)
        run.work.save(key, {}, {"error": error})
        advance(1, items[key].spec.name)

    run.each("sensitivity", "layer", dict.fromkeys(items, 1), compute)
    return {layer.spec.name: float(run.work.load(key).facts["error"]) for key, layer in items.items()}


def _voting(run: RunContext, calibration: Trajectories) -> list[range]:
    """Whole batches, since a batch's rows are those of one branch of guidance, then those of the other."""
    batches = _parted(calibration.size.rows, run.plan.batch * calibration.branches)
    return batches[: -(-run.recipe.pts_samples // run.plan.batch)]


def _votes(run: RunContext, spec: LayerSpec) -> bool:
    return run.recipe.pts_layers == "all" or (run.recipe.pts_layers == "skip" and len(spec.parts) > 1)


def _parted(count: int, at_once: int) -> list[range]:
    return [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def _specs_of(groups: Sequence[ScalingGroup]) -> list[LayerSpec]:
    return [spec for group in groups for spec in group]
