"""The whole calibration: from a diffusers folder to a DMQ checkpoint."""

import json
import platform
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

from calib.device import device_name, reproducible
from calib.fit.column_rounding import why_no_kernel
from calib.model.layers import LayerSelection, select_layers
from calib.model.load import SourceModel, load_model
from calib.model.network import float_tensors
from calib.model.schedulers import build_scheduler, step_options
from calib.record.work_folder import WorkFolder, open_work, require_work, started_with
from calib.run import stages
from calib.run.context import RunContext
from calib.run.evaluate import probe_of
from calib.run.plan import CalibrationPlan, Resources, make_plan
from calib.run.processes import ProcessGroup, process_group
from dmq_export import __version__
from dmq_export.checkpoint import Checkpoint, SourceInfo, require_place, save_checkpoint
from dmq_export.common.memory import peak_memory, peaks
from dmq_export.common.progress import Progress
from dmq_export.errors import ModelError
from dmq_export.recipe import Recipe

BATCH = "samples per evaluation"  # in the fingerprint: kernels add in another order for another batch


def calibrate(
    model: Path,
    output: Path,
    recipe: Recipe,
    resources: Resources,
    progress: Progress,
    *,
    strict: bool = False,
    fresh: bool = False,
) -> Checkpoint:
    """Quantize the diffusers denoiser in ``model`` by ``recipe`` and write the checkpoint to ``output``.

    What is finished is kept in the folder ``<output>.work`` until all is, so a calibration that was stopped goes on
    where it was and ends with the same bytes. Under ``torchrun`` the processes share the work.

    Args:
        strict: refuse a model with layers that cannot be quantized.
        fresh: replace what is at ``output``, and start over.

    Raises:
        DmqError: bad input; nothing is written then.
    """
    require_place(output, replace_existing=fresh)
    folder = work_folder(output)
    with process_group() as processes, reproducible(resources.device, resources.memory):
        if processes.leads:
            require_work(folder, _known(recipe, resources), fresh=fresh)
        source = load_model(model, resources.device, sample_size=recipe.sample_size, notice=progress.tell)
        selection = _selected(source, recipe, strict=strict)
        _tell_of_kernel(resources.device, progress)
        plan = processes.agree(lambda: _plan(source, selection, recipe, resources, folder, fresh=fresh))
        with _shared_work(folder, _fingerprint(source, recipe, plan, resources), processes, fresh=fresh) as work:
            if processes.leads:
                require_place(output, replace_existing=fresh)  # or another process has written it meanwhile
            run = RunContext(source, selection, recipe, plan, resources.device, progress, work, processes)
            checkpoint = _checkpoint(run)
            processes.wait()  # until all have read what is about to be deleted
            facts = _run_facts(progress, plan)
            if processes.leads:
                save_checkpoint(checkpoint, output, run=facts, replace_existing=fresh)
                shutil.rmtree(folder)
            processes.wait()
        progress.note("done", checkpoint=str(output), **facts)
        return checkpoint


def planned(
    model: Path,
    output: Path,
    recipe: Recipe,
    resources: Resources,
    progress: Progress,
    *,
    strict: bool = False,
    fresh: bool = False,
) -> tuple[LayerSelection, CalibrationPlan]:
    """What :func:`calibrate` would quantize, and what that would take; nothing is written.

    Raises:
        DmqError: as :func:`calibrate`, as far as can be seen beforehand.
    """
    folder = work_folder(output)
    require_place(output, replace_existing=fresh)
    with reproducible(resources.device, resources.memory):
        require_work(folder, _known(recipe, resources), fresh=fresh)
        source = load_model(model, resources.device, sample_size=recipe.sample_size, notice=progress.tell)
        selection = _selected(source, recipe, strict=strict)
        return selection, _plan(source, selection, recipe, resources, folder, fresh=fresh)


def calibrated(
    source: SourceModel, selection: LayerSelection, recipe: Recipe, resources: Resources, progress: Progress
) -> Checkpoint:
    """The checkpoint of ``source``, in memory.

    Raises:
        DmqError: the recipe does not suit the model.
    """
    with tempfile.TemporaryDirectory() as folder, reproducible(resources.device, resources.memory):
        plan = make_plan(source, selection, recipe, resources, Path(folder))
        work = WorkFolder(Path(folder))
        run = RunContext(source, selection, recipe, plan, resources.device, progress, work, ProcessGroup())
        return _checkpoint(run)


def work_folder(output: Path) -> Path:
    """Where the unfinished calibration of ``output`` is kept."""
    return output.with_name(f"{output.name}.work")


def _plan(
    source: SourceModel, selection: LayerSelection, recipe: Recipe, resources: Resources, folder: Path, *, fresh: bool
) -> CalibrationPlan:
    """Free memory may have changed since an unfinished calibration began; its samples per evaluation may not."""
    before = {} if fresh else started_with(folder)
    batch = before.get(BATCH)
    return make_plan(source, selection, recipe, resources, folder, batch=batch if isinstance(batch, int) else None)


def _selected(source: SourceModel, recipe: Recipe, *, strict: bool) -> LayerSelection:
    """What is quantized, once it is known that the sampler and ``strict`` allow it."""
    scheduler = build_scheduler(source.scheduler, recipe.scheduler, recipe.steps, source.config)
    step_options(scheduler, eta=recipe.eta, generators=())
    selection = select_layers(source, recipe.bits, recipe.scheme, recipe.float_layers)
    for layer in selection.coverage.float_layers if strict else ():
        if not layer.by_design:
            raise ModelError(
                f"layer {layer.name} stays float ({layer.reason}) and --strict is set: accept it with "
                f"--float-layer {layer.name}, or leave out --strict"
            )
    return selection


@contextmanager
def _shared_work(
    folder: Path, fingerprint: dict[str, Any], processes: ProcessGroup, *, fresh: bool
) -> Iterator[WorkFolder]:
    """The work folder; one process opens it, the others come after."""
    if processes.leads:
        with open_work(folder, fingerprint, fresh=fresh) as work:
            processes.wait()
            yield work
    else:
        processes.wait()
        yield WorkFolder(folder)


def _fingerprint(source: SourceModel, recipe: Recipe, plan: CalibrationPlan, resources: Resources) -> dict[str, Any]:
    """Everything the result depends on. The calibration set is made from these, so it needs no hash of its own."""
    return {"model": source.weights_sha256, BATCH: plan.batch, **_known(recipe, resources)}


def _known(recipe: Recipe, resources: Resources) -> dict[str, Any]:
    """What of it is known before the model is loaded."""
    return {
        **recipe.to_json(),
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        "device": device_name(resources.device),
        "rounding kernel": _has_kernel(resources.device),
        **_versions(),
    }


def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and why_no_kernel() is None


def _tell_of_kernel(device: torch.device, progress: Progress) -> None:
    reason = why_no_kernel() if device.type == "cuda" else None
    if reason is not None:
        progress.tell(f"rounding goes without its kernel, which takes minutes more: {reason}")


def _checkpoint(run: RunContext) -> Checkpoint:
    """Go through every stage and put their results together."""
    source, recipe = run.source, run.recipe
    calibration = stages.record(run, "trajectories", recipe.samples)
    fits = stages.widen(run, stages.fit_layers(run, calibration), calibration)
    layers = stages.round_blocks(run, [fit.layer for fit in fits], calibration)
    layers, votes = stages.vote(run, layers, calibration)
    held_out = stages.record(run, "held-out trajectories", recipe.check_samples, held_out=True)
    quantized_names = {layer.spec.name for layer in layers}
    return Checkpoint(
        model=_export_metadata(source, recipe),
        recipe=recipe.to_json(),
        timesteps=calibration.timesteps.numpy(),
        layers=tuple(layers),
        float_layers=run.selection.coverage.float_layers,
        float_tensors=float_tensors(source.network, quantized_names),
        probe=probe_of(held_out),
        metrics={
            "prediction_sqnr_db": stages.evaluate(run, layers, held_out),
            "layers": {fit.layer.spec.name: fit.report | votes.get(fit.layer.spec.name, {}) for fit in fits},
        },
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    return {
        "dmq-export": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _run_facts(progress: Progress, plan: CalibrationPlan) -> dict[str, Any]:
    """What differs from run to run, kept apart from the checkpoint."""
    of_worker = peak_memory(of_children=True)
    return {
        "seconds": progress.seconds,
        **peaks(),
        **({"peak_memory_of_a_worker_bytes": of_worker} if of_worker and plan.workers > 1 else {}),
        "plan": plan.to_json(),
        "machine": platform.platform(),
    }


def _export_metadata(source: SourceModel, recipe: Recipe) -> SourceInfo:
    scheduler = build_scheduler(source.scheduler, recipe.scheduler, recipe.steps, source.config)
    return SourceInfo(
        class_name=source.class_name,
        config=dict(source.config),
        scheduler=json.loads(scheduler.to_json_string()),
        weights_sha256=source.weights_sha256,
    )
