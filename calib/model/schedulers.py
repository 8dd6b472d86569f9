"""diffusers' schedulers by name, from the configuration beside a model."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dmq_export.common.extras import require
from dmq_export.denoiser.config import FLUX, image_tokens
from dmq_export.errors import DmqError
from dmq_export.sampling.names import SCHEDULERS

FLOW = "FlowMatch"  # how the names of such schedulers start
FLOW_MODELS = ("SD3Transformer2DModel", FLUX)


def build_scheduler(
    config: Mapping[str, Any], name: str | None, steps: int, model: Mapping[str, Any] | None = None
) -> Any:
    """The scheduler ``config`` describes, or the one called ``name`` with that configuration, set to ``steps``.

    Args:
        model: configuration of the denoiser, for schedulers that shift their timesteps by the size of the picture.

    Raises:
        DmqError: no scheduler is named anywhere, diffusers is not installed or has none of that name, or it does not
            take the step count.
    """
    if name is not None and name not in SCHEDULERS:
        raise DmqError(f"no scheduler is called {name!r}: one of {', '.join(SCHEDULERS)} is")
    wanted = name or config.get("_class_name")
    require(f"scheduler {wanted}, as all but a plain DDIM,", "torch", "diffusers")
    import diffusers  # here, for an engine samples with our DDIM where it is not installed

    class_name = SCHEDULERS[name] if name else config.get("_class_name")
    if class_name is None:
        raise DmqError(
            f"the model has no scheduler/scheduler_config.json: name one with --scheduler ({', '.join(SCHEDULERS)})"
        )
    _require_flow(str(class_name), config, model or {})
    scheduler_class = getattr(diffusers, str(class_name), None)
    if not (inspect.isclass(scheduler_class) and issubclass(scheduler_class, diffusers.SchedulerMixin)):
        raise DmqError(f"diffusers {diffusers.__version__} has no scheduler {class_name!r}")
    scheduler: Any = scheduler_class.from_config(dict(config))  # type: ignore[no-untyped-call]
    try:
        scheduler.set_timesteps(steps, **_flow_options(scheduler, steps, model or {}))
    except ValueError as error:
        raise DmqError(f"{class_name} does not take {steps} steps: {error}") from error
    _require_trained(scheduler, steps)
    if not hasattr(scheduler, "init_noise_sigma"):  # flow matching scales neither the noise nor the input
        scheduler.init_noise_sigma = 1.0
        scheduler.scale_model_input = lambda sample, timestep: sample
    return scheduler


def _require_trained(scheduler: Any, steps: int) -> None:
    """Refuse steps outside the schedule, which diffusers meets with an IndexError, or (PNDM) with timesteps all 0."""
    if scheduler.timesteps.is_floating_point():  # interpolates between timesteps, or counts them otherwise
        return
    trained, largest = int(scheduler.config.num_train_timesteps), int(scheduler.timesteps.max())
    if steps > trained or largest >= trained:
        raise DmqError(
            f"{type(scheduler).__name__} does not take {steps} steps: they start at timestep {largest}, the model was "
            f"trained on 0 to {trained - 1}; take fewer"
        )


def _require_flow(class_name: str, config: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    """Refuse a diffusion scheduler for a flow-matching model: it would run, and draw noise."""
    trained = str(config.get("_class_name", FLOW if model.get("_class_name") in FLOW_MODELS else class_name))
    if trained.startswith(FLOW) and not class_name.startswith(FLOW):
        raise DmqError(
            f"{class_name} does not suit a flow-matching model: leave out --scheduler, and give the pipeline's folder, "
            "which holds its own scheduler"
        )


def _flow_options(scheduler: Any, steps: int, model: Mapping[str, Any]) -> dict[str, Any]:
    """What the pipelines of SD3 and Flux give ``set_timesteps`` besides the number of steps."""
    options: dict[str, Any] = {}
    if scheduler.config.get("use_dynamic_shifting"):
        options["mu"] = _shift(scheduler.config, image_tokens(model))
    if model.get("_class_name") == FLUX and "sigmas" in inspect.signature(scheduler.set_timesteps).parameters:
        options["sigmas"] = np.linspace(1.0, 1 / steps, steps)
    return options


def _shift(config: Mapping[str, Any], tokens: int) -> float:
    """``mu``: linear in the number of image tokens, as diffusers' pipelines have it (Esser et al. 2024, 5.3.2)."""
    fewest, most = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, largest = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
    return float(least + (tokens - fewest) * (largest - least) / (most - fewest))


def step_options(scheduler: Any, *, eta: float, generators: Sequence[Any]) -> dict[str, Any]:
    """``eta`` and ``generator`` for schedulers whose ``step`` takes them.

    Raises:
        DmqError: a non-zero ``eta`` for a scheduler that has none.
    """
    accepted = inspect.signature(scheduler.step).parameters
    if eta and "eta" not in accepted:
        raise DmqError(f"eta {eta} was asked for, but {type(scheduler).__name__} takes none: use --scheduler ddim")
    options: dict[str, Any] = {"generator": list(generators)} if "generator" in accepted else {}
    return {**options, "eta": eta} if "eta" in accepted else options
