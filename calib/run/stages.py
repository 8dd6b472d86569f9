"""The stages of a calibration, each made of items that are finished one by one.

An item that the work folder already has is not done again, and under ``torchrun`` each process does its share; so a
stage computes what is missing, waits for the others, and then reads its result from the folder, whoever made it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from calib.device import evaluating
from calib.fit.adaround import adaround
from calib.fit.layer import LayerFit, LayerWeights, fit_key, load_fit
from calib.fit.mixed_precision import MORE, few_evaluations, most_sensitive, prediction_error
from calib.fit.pts import count_votes, decide
from calib.model.layers import LayerSelection
from calib.model.load import SourceModel
from calib.quant.patches import weight_of
from calib.record.block_inputs import BlockRecorder
from calib.record.conditioning import recipe_conditioning
from calib.record.layer_inputs import Captures, EvaluationIndex, InputHook, inputs_seen
from calib.record.trajectories import SamplerSettings, SetSize, Trajectories, joined, record_trajectories, set_size
from calib.record.work_folder import WorkFolder
from calib.run.evaluate import VARIANTS, sqnr_by_step
from calib.run.plan import CalibrationPlan, ScalingGroup
from calib.run.processes import ProcessGroup
from calib.run.workers import FitTask, run_tasks
from dmq_export.bits import Bits
from dmq_export.layer import LayerSpec, QuantizedLayer
from dmq_export.progress import Advance, Progress
from dmq_export.recipe import Recipe
from dmq_export.seeds import stream_seed

Recording = AbstractContextManager[Mapping[str, InputHook]]


@dataclass(frozen=True)
class Stages:
    """A calibration's stages, in the order of the methods."""

    source: SourceModel
    selection: LayerSelection
    recipe: Recipe
    plan: CalibrationPlan
    device: torch.device
    progress: Progress
    work: WorkFolder
    processes: ProcessGroup

    def record(self, name: str, count: int, *, held_out: bool = False) -> Trajectories:
        """Sample ``count`` trajectories; sets of different names are independent.

        Args:
            held_out: of the prompts that the calibration does not draw, where there are any.
        """
        recipe = self.recipe.held_out() if held_out else self.recipe
        settings = SamplerSettings(recipe.scheduler, recipe.steps, recipe.eta, recipe.guidance_scale)
        conditioning = recipe_conditioning(self.source, recipe, count)
        branches, size = conditioning.branches, set_size(self.source, settings, conditioning, count)
        captures = None if held_out else self._captures(self.plan.passes[0], size, branches)
        batches = {f"{name}/{batch.start}": batch for batch in _parted(count, self.plan.batch)}

        def compute(key: str, advance: Advance) -> None:
            batch, seed = batches[key], stream_seed(recipe.seed, name)
            rows = range(batch.start * branches, batch.stop * branches)
            recording: Recording = captures.recording(rows) if captures else nullcontext({})
            with recording as hooks:

                def step_context(step: int) -> AbstractContextManager[None]:
                    return inputs_seen(self.source.network, hooks, EvaluationIndex(rows.start, step))

                made = record_trajectories(
                    self.source, settings, conditioning, batch, seed=seed, advance=advance, step_context=step_context
                )
                self.work.save(key, made.tensors())

        sizes = {key: len(batch) * branches * recipe.steps for key, batch in batches.items()}
        self._each(name, "evaluation", sizes, compute)
        return joined([Trajectories.of_tensors(self.work.load(key).tensors) for key in batches])

    def fit(self, calibration: Trajectories) -> list[LayerFit]:
        """Fit every layer on its own; in the order of the selection."""
        for groups in self.plan.passes:
            if not self._fitted(_specs_of(groups)):
                captures = self._captures(groups, calibration.size, calibration.branches)
                self._capture(captures, calibration)
                self._fit_pass(captures, groups)
                if self.processes.leads:
                    captures.forget()
        return [load_fit(spec, self.work) for spec in self.selection.coverage.quantized]

    def widen(self, fits: Sequence[LayerFit], calibration: Trajectories) -> tuple["Stages", list[LayerFit]]:
        """Fit the most sensitive layers again with more bits, if the recipe asks for it.

        Returns:
            The stages with the new widths, and the fits of all layers.
        """
        if not self.recipe.sensitive_share:
            return self, list(fits)
        errors = self._prediction_errors([fit.layer for fit in fits], calibration)
        groups = [group for groups in self.plan.passes for group in groups]
        chosen = most_sensitive(groups, errors, self.recipe.sensitive_share)
        wide = {
            spec.name: replace(spec, bits=Bits(max(MORE.weight, spec.bits.weight), MORE.activation))
            for group in chosen
            for spec in group
        }
        wider = replace(self, selection=self.selection.with_specs(wide), plan=self.plan.only(wide))
        return wider, [
            replace(fit, report=fit.report | {"prediction_db": round(-10 * math.log10(max(error, 1e-12)), 2)})
            for fit, error in zip(wider.fit(calibration), errors.values(), strict=True)
        ]

    def _prediction_errors(self, layers: Sequence[QuantizedLayer], calibration: Trajectories) -> dict[str, float]:
        """What rounding each layer costs, by name, in the order of the selection."""
        items = {f"sensitivity/{layer.spec.name}": layer for layer in layers}
        few = few_evaluations(calibration)

        def compute(key: str, advance: Advance) -> None:
            error = prediction_error(self.source, items[key], few)
            self.work.save(key, {}, {"error": error})
            advance(1, items[key].spec.name)

        self._each("sensitivity", "layer", dict.fromkeys(items, 1), compute)
        return {layer.spec.name: float(self.work.load(key).facts["error"]) for key, layer in items.items()}

    def round_blocks(self, layers: Sequence[QuantizedLayer], calibration: Trajectories) -> list[QuantizedLayer]:
        """AdaRound block by block, if the recipe asks for it."""
        recipe = self.recipe
        if recipe.rounding != "adaround":
            return list(layers)
        blocks = {f"blocks/{block.name}": block for block in self.selection.blocks}
        missing = [blocks[key].name for key in self.processes.share(list(blocks)) if key not in self.work]
        network, evaluations = self.source.network, recipe.round_samples
        recorder = BlockRecorder(network, missing, calibration, evaluations=evaluations, batch=self.plan.batch)

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
            self.work.save(key, {layer.spec.name: torch.from_numpy(layer.codes) for layer in rounded})

        self._each("AdaRound", "iteration", dict.fromkeys(blocks, recipe.round_iterations), compute)
        codes = {name: value.numpy() for key in blocks for name, value in self.work.load(key).tensors.items()}
        return [replace(layer, codes=codes[layer.spec.name]) for layer in layers]

    def vote(
        self, layers: Sequence[QuantizedLayer], calibration: Trajectories
    ) -> tuple[list[QuantizedLayer], dict[str, dict[str, Any]]]:
        """The layers with their PTS exponents, and the votes for the report."""
        voters = [layer for layer in layers if self._votes(layer.spec)]
        if not voters:
            return list(layers), {}
        batches = {f"votes/{rows.start}": rows for rows in self._voting(calibration)}

        def compute(key: str, advance: Advance) -> None:
            counts = count_votes(self.source.network, calibration, batches[key], voters, advance=advance)
            self.work.save(key, counts)

        steps = calibration.size.steps
        self._each("PTS votes", "evaluation", {key: len(rows) * steps for key, rows in batches.items()}, compute)
        counts = [self.work.load(key).tensors for key in batches]
        votes = {
            name: decide(torch.stack([of_group[name] for of_group in counts]).sum(0), self.recipe.pts_kappa)
            for name in counts[0]
        }
        shifts = {name: vote.shift.numpy().astype(np.uint8) for name, vote in votes.items()}
        shifted = [replace(layer, shift=shifts.get(layer.spec.name, layer.shift)) for layer in layers]
        return shifted, {name: vote.report() for name, vote in votes.items()}

    def check(self, layers: Sequence[QuantizedLayer], held_out: Trajectories) -> dict[str, Any]:
        """SQNR of the noise prediction per step, with the weights, the activations, and both quantized."""
        variants = {f"check/{variant}": variant for variant in VARIANTS}

        def compute(key: str, advance: Advance) -> None:
            sqnr = sqnr_by_step(self.source, layers, held_out, variants[key], batch=self.plan.batch)
            self.work.save(key, {}, {"sqnr_db": sqnr})
            advance(1, variants[key])

        self._each("check", "variant", dict.fromkeys(variants, 1), compute)
        measured = {variant: self.work.load(key).facts["sqnr_db"] for key, variant in variants.items()}
        return {"timesteps": held_out.timesteps.tolist(), **measured}

    def _captures(self, groups: Sequence[ScalingGroup], size: SetSize, branches: int) -> Captures:
        """The inputs of a pass's layers, in batches of the rows that are evaluated at once."""
        batches = _parted(size.rows, self.plan.batch * branches)
        return Captures(self.work, batches, size.steps, _specs_of(groups), seed=self.recipe.seed)

    def _capture(self, captures: Captures, calibration: Trajectories) -> None:
        """Evaluate the network again where the inputs were not captured while the trajectories were recorded."""
        batches = {str(rows.start): rows for rows in captures.batches}

        def compute(key: str, advance: Advance) -> None:
            captures.take(self.source.network, calibration, batches[key], advance=advance)

        def has(key: str) -> bool:
            return captures.has(batches[key])

        if all(has(key) for key in self.processes.share(list(batches))):
            self.processes.wait()  # for those who have something to do
        else:
            sizes = {key: len(rows) * calibration.size.steps for key, rows in batches.items()}
            self._each("layer inputs", "evaluation", sizes, compute, has)

    def _fit_pass(self, captures: Captures, groups: Sequence[ScalingGroup]) -> None:
        mine = self.processes.share(groups)
        missing = [specs for specs in mine if not self._fitted(specs)]
        total = sum(len(specs) for specs in mine)
        with self.progress.stage("layer fits", total, "layer") as advance:
            advance(total - sum(len(specs) for specs in missing))

            def done(seconds: dict[str, float]) -> None:
                for name, taken in seconds.items():
                    advance(1, name)
                    self.progress.note("layer", name=name, seconds=round(taken, 3))

            run_tasks([self._task(specs, captures) for specs in missing], self.plan.workers, done)
            self.processes.wait()

    def _fitted(self, specs: Sequence[LayerSpec]) -> bool:
        return all(fit_key(spec) in self.work for spec in specs)

    def _task(self, specs: Sequence[LayerSpec], captures: Captures) -> FitTask:
        layers = tuple(self._layer_weights(spec) for spec in specs)
        recipe = replace(self.recipe, embeddings=None)  # no fit looks at them, and they would go to every worker
        return FitTask(layers, captures, recipe, self.work, self.device)

    def _layer_weights(self, spec: LayerSpec) -> LayerWeights:
        module = self.source.network.get_submodule(spec.name)
        bias = module.bias
        return LayerWeights(spec, weight_of(module), bias.detach() if isinstance(bias, torch.Tensor) else None)

    def _voting(self, calibration: Trajectories) -> list[range]:
        """Whole batches, since a batch's rows are those of one branch of guidance, then those of the other."""
        batches = _parted(calibration.size.rows, self.plan.batch * calibration.branches)
        return batches[: -(-self.recipe.pts_samples // self.plan.batch)]

    def _votes(self, spec: LayerSpec) -> bool:
        return self.recipe.pts_layers == "all" or (self.recipe.pts_layers == "skip" and len(spec.parts) > 1)

    def _each(
        self,
        stage: str,
        unit: str,
        items: Mapping[str, int],
        compute: Callable[[str, Advance], None],
        has: Callable[[str], bool] | None = None,
    ) -> None:
        """Compute this process's share of ``items`` (with their sizes) that is not there, then wait for the others."""
        is_there = has or self.work.__contains__
        mine = self.processes.share(list(items))
        total = sum(items[key] for key in mine)
        with self.progress.stage(stage, total, unit) as advance, evaluating(self.device):
            for key in mine:
                if is_there(key):
                    advance(items[key])
                else:
                    compute(key, advance)
            self.processes.wait()


def _parted(count: int, at_once: int) -> list[range]:
    return [range(start, min(start + at_once, count)) for start in range(0, count, at_once)]


def _specs_of(groups: Sequence[ScalingGroup]) -> list[LayerSpec]:
    return [spec for group in groups for spec in group]
