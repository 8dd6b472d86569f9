"""Where a way of sampling departs from the one that was calibrated.

None of it is an error: every evaluation uses the ranges of the nearest calibrated step. But quality was neither
calibrated nor measured there, so the user is told.
"""

from collections.abc import Iterable, Iterator

from dmq_export.metadata import Facts


def mismatches(
    facts: Facts, *, scheduler: str, timesteps: Iterable[float], eta: float, guidance_scale: float | None
) -> Iterator[str]:
    """One line for each departure.

    Args:
        scheduler: class name of the scheduler in use.
        timesteps: that it will evaluate.
        eta: DDIM's noise share.
        guidance_scale: of classifier-free guidance; None without.
    """
    calibrated = facts.scheduler.get("_class_name")
    if calibrated is not None and scheduler != calibrated:
        yield f"scheduler {scheduler}, calibrated with {calibrated}"
    yield from _steps(facts, list(timesteps))
    if eta != float(facts.recipe.get("eta") or 0):
        yield f"eta {eta:g}, calibrated with {float(facts.recipe.get('eta') or 0):g}"
    guided = facts.recipe.get("guidance_scale")
    if guidance_scale != guided:
        yield f"{_guidance(guidance_scale)}, calibrated {'with ' if guided is not None else ''}{_guidance(guided)}"


def _steps(facts: Facts, timesteps: list[float]) -> Iterator[str]:
    if not facts.per_step:
        return
    distances = [min(abs(t - calibrated) for calibrated in facts.timesteps) for t in timesteps]
    if any(distances):
        yield (
            f"{len(timesteps)} evaluations at other timesteps than the {len(facts.timesteps)} calibrated: each uses "
            f"the ranges of the nearest, at most {max(distances):g} timesteps away"
        )


def _guidance(scale: float | None) -> str:
    return "without guidance" if scale is None else f"guidance scale {scale:g}"
