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
from calib.model.layers import Survey, survey
from calib.model.load import SourceModel, load_model
from calib.model.network import float_tensors
from calib.model.schedulers import build_scheduler, step_options
from calib.record.work_folder import WorkFolder, open_work, require_work, started_with
from calib.run.evaluate import probe_of
from calib.run.plan import Limits, Plan, make_plan
from calib.run.processes import ProcessGroup, process_group
from calib.run.stages import Stages
from dmq_export import __version__
from dmq_export.checkpoint import Checkpoint, ModelFacts, require_place, save_checkpoint
from dmq_export.errors import ModelError
from dmq_export.memory import peak_memory, peaks
from dmq_export.progress import Progress
from dmq_export.recipe import Recipe

BATCH = "samples per evaluation"  # in the fingerprint: kernels add in another order for another batch


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
    with process_group() as group, reproducible(limits.device, limits.memory):
        if group.leads:
            require_work(folder, _known(recipe, limits), fresh=fresh)
        source = load_model(model, limits.device, sample_size=recipe.sample_size, tell=progress.tell)
        surveyed = _survey(source, recipe, strict=strict)
        _tell_of_kernel(limits.device, progress)
        plan = group.agree(lambda: _plan(source, surveyed, recipe, limits, folder, fresh=fresh))
        with _shared_work(folder, _fingerprint(source, recipe, plan, limits), group, fresh=fresh) as work:
            if group.leads:
                require_place(output, replace_existing=fresh)  # or another process has written it meanwhile
            stages = Stages(source, surveyed, recipe, plan, limits.device, progress, work, group)
            checkpoint = _checkpoint(stages)
            group.wait()  # until all have read what is about to be deleted
            run = _run_facts(progress, plan)
            if group.leads:
                save_checkpoint(checkpoint, output, run=run, replace_existing=fresh)
                shutil.rmtree(folder)
            group.wait()
        progress.note("done", checkpoint=str(output), **run)
        return checkpoint


def planned(
    model: Path,
    output: Path,
    recipe: Recipe,
    limits: Limits,
    progress: Progress,
    *,
    strict: bool = False,
    fresh: bool = False,
) -> tuple[Survey, Plan]:
    """What :func:`calibrate` would quantize, and what that would take; nothing is written.

    Raises:
        DmqError: as :func:`calibrate`, as far as can be seen beforehand.
    """
    folder = work_folder(output)
    require_place(output, replace_existing=fresh)
    with reproducible(limits.device, limits.memory):
        require_work(folder, _known(recipe, limits), fresh=fresh)
        source = load_model(model, limits.device, sample_size=recipe.sample_size, tell=progress.tell)
        surveyed = _survey(source, recipe, strict=strict)
        return surveyed, _plan(source, surveyed, recipe, limits, folder, fresh=fresh)


def calibrated(source: SourceModel, surveyed: Survey, recipe: Recipe, limits: Limits, progress: Progress) -> Checkpoint:
    """The checkpoint of ``source``, in memory.

    Raises:
        DmqError: the recipe does not suit the model.
    """
    with tempfile.TemporaryDirectory() as folder, reproducible(limits.device, limits.memory):
        plan = make_plan(source, surveyed, recipe, limits, Path(folder))
        work = WorkFolder(Path(folder))
        return _checkpoint(Stages(source, surveyed, recipe, plan, limits.device, progress, work, ProcessGroup()))


def work_folder(output: Path) -> Path:
    """Where the unfinished calibration of ``output`` is kept."""
    return output.with_name(f"{output.name}.work")


def _plan(source: SourceModel, surveyed: Survey, recipe: Recipe, limits: Limits, folder: Path, *, fresh: bool) -> Plan:
    """Free memory may have changed since an unfinished calibration began; its samples per evaluation may not."""
    before = {} if fresh else started_with(folder)
    batch = before.get(BATCH)
    return make_plan(source, surveyed, recipe, limits, folder, batch=batch if isinstance(batch, int) else None)


def _survey(source: SourceModel, recipe: Recipe, *, strict: bool) -> Survey:
    """What is quantized, once it is known that the sampler and ``strict`` allow it."""
    scheduler = build_scheduler(source.scheduler, recipe.scheduler, recipe.steps, source.config)
    step_options(scheduler, eta=recipe.eta, generators=())
    surveyed = survey(source, recipe.bits, recipe.scheme, recipe.float_layers)
    for layer in surveyed.coverage.float_layers if strict else ():
        if not layer.by_design:
            raise ModelError(
                f"layer {layer.name} stays float ({layer.reason}) and --strict is set: accept it with "
                f"--float-layer {layer.name}, or leave out --strict"
            )
    return surveyed


@contextmanager
def _shared_work(
    folder: Path, fingerprint: dict[str, Any], group: ProcessGroup, *, fresh: bool
) -> Iterator[WorkFolder]:
    """The work folder; one process opens it, the others come after."""
    if group.leads:
        with open_work(folder, fingerprint, fresh=fresh) as work:
            group.wait()
            yield work
    else:
        group.wait()
        yield WorkFolder(folder)


def _fingerprint(source: SourceModel, recipe: Recipe, plan: Plan, limits: Limits) -> dict[str, Any]:
    """Everything the result depends on. The calibration set is made from these, so it needs no hash of its own."""
    return {"model": source.weights_sha256, BATCH: plan.batch, **_known(recipe, limits)}


def _known(recipe: Recipe, limits: Limits) -> dict[str, Any]:
    """What of it is known before the model is loaded."""
    return {
        **recipe.to_json(),
        "threads (OMP_NUM_THREADS)": torch.get_num_threads(),
        "device": device_name(limits.device),
        "rounding kernel": _has_kernel(limits.device),
        **_versions(),
    }


def _has_kernel(device: torch.device) -> bool:
    return device.type == "cuda" and why_no_kernel() is None


def _tell_of_kernel(device: torch.device, progress: Progress) -> None:
    reason = why_no_kernel() if device.type == "cuda" else None
    if reason is not None:
        progress.tell(f"rounding goes without its kernel, which takes minutes more: {reason}")


def _checkpoint(stages: Stages) -> Checkpoint:
    """Run every stage and put their results together."""
    source, recipe = stages.source, stages.recipe
    calibration = stages.record("trajectories", recipe.samples)
    stages, fits = stages.widen(stages.fit(calibration), calibration)
    layers = stages.round_blocks([fit.layer for fit in fits], calibration)
    layers, votes = stages.vote(layers, calibration)
    held_out = stages.record("held-out trajectories", recipe.check_samples, held_out=True)
    quantized_names = {layer.spec.name for layer in layers}
    return Checkpoint(
        model=_model_facts(source, recipe),
        recipe=recipe.to_json(),
        timesteps=calibration.timesteps.numpy(),
        layers=tuple(layers),
        float_layers=stages.surveyed.coverage.float_layers,
        float_tensors=float_tensors(source.network, quantized_names),
        probe=probe_of(held_out),
        metrics={
            "prediction_sqnr_db": stages.check(layers, held_out),
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


def _run_facts(progress: Progress, plan: Plan) -> dict[str, Any]:
    """What differs from run to run, kept apart from the checkpoint."""
    of_worker = peak_memory(of_children=True)
    return {
        "seconds": progress.seconds,
        **peaks(),
        **({"peak_memory_of_a_worker_bytes": of_worker} if of_worker and plan.workers > 1 else {}),
        "plan": plan.to_json(),
        "machine": platform.platform(),
    }


def _model_facts(source: SourceModel, recipe: Recipe) -> ModelFacts:
    scheduler = build_scheduler(source.scheduler, recipe.scheduler, recipe.steps, source.config)
    return ModelFacts(
        class_name=source.class_name,
        config=dict(source.config),
        scheduler=json.loads(scheduler.to_json_string()),
        weights_sha256=source.weights_sha256,
    )
