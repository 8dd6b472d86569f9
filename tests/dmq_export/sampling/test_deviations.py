"""What the user is told of sampling otherwise than calibrated."""

from dataclasses import replace
from typing import Any

import pytest

from dmq_export.metadata import ExportMetadata
from dmq_export.sampling.deviations import deviations

METADATA = ExportMetadata(
    target="portable",
    bits="w4a8",
    config={},
    scheduler={"_class_name": "DDIMScheduler"},
    recipe={"steps": 3, "scales": "per-step", "eta": 0.0, "guidance_scale": None},
    timesteps=(67.0, 34.0, 1.0),
)
AS_CALIBRATED = {"scheduler": "DDIMScheduler", "timesteps": (67, 34, 1), "eta": 0.0, "guidance_scale": None}


def notes(metadata: ExportMetadata = METADATA, **changes: Any) -> list[str]:
    return list(deviations(metadata, **(AS_CALIBRATED | changes)))


def test_as_calibrated_there_is_nothing_to_say() -> None:
    assert notes() == []


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"scheduler": "PNDMScheduler"}, "scheduler PNDMScheduler, calibrated with DDIMScheduler"),
        (
            {"timesteps": (76, 51, 26, 1)},
            "4 evaluations at other timesteps than the 3 calibrated: each uses the ranges of the nearest, "
            "at most 16 timesteps away",
        ),
        ({"eta": 1.0}, "eta 1, calibrated with 0"),
        ({"guidance_scale": 2.5}, "guidance scale 2.5, calibrated without guidance"),
    ],
)
def test_each_departure_is_one_line(change: dict[str, Any], expected: str) -> None:
    assert notes(**change) == [expected]


def test_guidance_left_out_is_told() -> None:
    guided = replace(METADATA, recipe={**METADATA.recipe, "guidance_scale": 7.5})
    assert notes(guided) == ["without guidance, calibrated with guidance scale 7.5"]


def test_a_subset_of_the_calibrated_timesteps_is_no_departure() -> None:
    assert notes(timesteps=(67, 67, 1)) == []


def test_one_range_for_all_steps_fits_any_timestep() -> None:
    static = replace(METADATA, recipe={**METADATA.recipe, "scales": "static"})
    assert notes(static, timesteps=(99, 50)) == []
