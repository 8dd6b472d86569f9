"""Where a way of sampling departs from the one that was calibrated.

None of it is an error: every evaluation uses the ranges of the nearest calibrated step. But quality was neither
calibrated nor measured there, so the user is told.
"""

from collections.abc import Iterable, Iterator

from dmq_export.metadata import ExportMetadata


def deviations(
    metadata: ExportMetadata, *, scheduler: str, timesteps: Iterable[float], eta: float, guidance_scale: float | None
) -> Iterator[str]:
    """One line for each departure.

    Args:
        scheduler: class name of the scheduler in use.
        timesteps: that it will evaluate.
        eta: DDIM's noise share.
        guidance_scale: of classifier-free guidance; None without.
    """
    calibrated = metadata.scheduler.get("_class_name")
    if calibrated is not None and scheduler != calibrated:
        yield f"scheduler {scheduler}, calibrated with {calibrated}"
    yield from _steps(metadata, list(timesteps))
    if eta != float(metadata.recipe.get("eta") or 0):
        yield f"eta {eta:g}, calibrated with {float(metadata.recipe.get('eta') or 0):g}"
    guided = metadata.recipe.get("guidance_scale")
    if guidance_scale != guided:
        yield f"{_guidance(guidance_scale)}, calibrated {'with ' if guided is not None else ''}{_guidance(guided)}"


def _steps(metadata: ExportMetadata, timesteps: list[float]) -> Iterator[str]:
    if not metadata.per_step:
        return
    distances = [min(abs(t - calibrated) for calibrated in metadata.timesteps) for t in timesteps]
    if any(distances):
        yield (
            f"{len(timesteps)} evaluations at other timesteps than the {len(metadata.timesteps)} calibrated: each uses "
            f"the ranges of the nearest, at most {max(distances):g} timesteps away"
        )


def _guidance(scale: float | None) -> str:
    return "without guidance" if scale is None else f"guidance scale {scale:g}"
