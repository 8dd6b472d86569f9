"""A plan is refused, before TensorRT sees it, unless it is what was built, for what is here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from plans import CONTENT, MACHINE, PLAN_METADATA

from dmq_export.errors import DmqError
from engines.tensorrt.plan_file import Machine, metadata_path, mismatch, read_plan, read_plan_metadata, save_plan
from engines.tensorrt.summary import KernelSummary


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "model.plan"
    save_plan(CONTENT, path, PLAN_METADATA)
    return path


def test_what_is_saved_is_read(plan: Path) -> None:
    assert read_plan_metadata(plan) == PLAN_METADATA
    assert read_plan(plan, MACHINE) == (CONTENT, PLAN_METADATA)
    assert sorted(path.name for path in plan.parent.iterdir()) == ["model.engine.json", "model.plan"]


def test_the_file_beside_the_plan_is_plain_json(plan: Path) -> None:
    content = json.loads(metadata_path(plan).read_text())
    assert content["schema"] == 3
    assert content["machine"]["gpu"] == "NVIDIA H200"
    assert content["shapes"]["sample"]["maximum"] == [4, 4, 8, 8]


def test_a_changed_plan_is_refused(plan: Path) -> None:
    plan.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(DmqError, match=r"model\.engine\.json records .*: it was changed or replaced; build the plan"):
        read_plan(plan, MACHINE)


def test_a_plan_for_another_machine_is_refused_with_the_reason(plan: Path) -> None:
    with pytest.raises(DmqError, match=r"was built for NVIDIA H200, here is NVIDIA H100 .*: build the plan again"):
        read_plan(plan, replace(MACHINE, gpu="NVIDIA H100"))


def test_a_plan_without_its_file_is_refused(plan: Path) -> None:
    metadata_path(plan).unlink()
    with pytest.raises(DmqError, match=r"has no model\.engine\.json beside it, so nothing vouches for it"):
        read_plan(plan, MACHINE)
    plan.unlink()
    with pytest.raises(DmqError, match="is not a file: build a plan with dmq-export trt-build"):
        read_plan(plan, MACHINE)


@pytest.mark.parametrize(
    "change",
    [
        {"machine": {"gpu": "x"}},
        {"machine": {**vars(MACHINE), "gpu": 7}},
        {"machine": {**vars(MACHINE), "gpu": None}},
        {"machine": {**vars(MACHINE), "runtime": "another"}},
        {"capabilities": [8.9]},
        {"kernels": {"integer": []}},
        {"shapes": {"sample": [1]}},
        {"hardware_compatible": "all"},
        {"version_compatible": "yes"},
        {"stripped": None},
        {"sha256": None},
        {"unknown": 1},
    ],
)
def test_damaged_metadata_is_refused(plan: Path, change: dict[str, object]) -> None:
    path = metadata_path(plan)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DmqError, match=r"model\.engine\.json is damaged .*: build the plan again"):
        read_plan(plan, MACHINE)


def test_another_schema_is_refused(plan: Path) -> None:
    path = metadata_path(plan)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema": 2}))
    with pytest.raises(DmqError, match="is not of schema 3: build the plan again"):
        read_plan(plan, MACHINE)


@pytest.mark.parametrize(
    ("changes", "here", "reason"),
    [
        ({}, {}, None),
        ({}, {"platform": "Windows AMD64"}, "was built for Linux x86_64, this is Windows AMD64"),
        ({}, {"version": "10.16.1.12"}, "was built with TensorRT 10.16.1.11, here is 10.16.1.12"),
        ({"version_compatible": True}, {"version": "10.16.1.12"}, None),
        ({"version_compatible": True}, {"version": "11.4.0.106"}, None),
        ({"version_compatible": True}, {"version": "10.9.0.34"}, "newer than the 10.9.0.34 here"),
        ({"version_compatible": True}, {"version": "10.13.3.9.post1"}, "newer than the 10.13.3.9.post1 here"),
        (
            {},
            {"gpu": "NVIDIA L4", "compute_capability": "8.9"},
            "was built for compute capability 9.0, NVIDIA L4 has 8.9",
        ),
        ({}, {"gpu": "NVIDIA H100"}, "was built for NVIDIA H200, here is NVIDIA H100"),
        ({"hardware_compatible": "same-compute-capability"}, {"gpu": "NVIDIA H100"}, None),
        ({"hardware_compatible": "same-compute-capability"}, {"compute_capability": "8.9"}, "compute capability 9.0"),
        ({"hardware_compatible": "ampere-plus"}, {"gpu": "NVIDIA A10", "compute_capability": "8.6"}, None),
        ({"hardware_compatible": "ampere-plus"}, {"gpu": "NVIDIA B300", "compute_capability": "10.3"}, None),
        (
            {"hardware_compatible": "ampere-plus"},
            {"gpu": "T4", "compute_capability": "7.5"},
            "needs compute capability 8.0",
        ),
    ],
)
def test_who_can_run_a_plan(changes: dict[str, object], here: dict[str, str], reason: str | None) -> None:
    found = mismatch(replace(PLAN_METADATA, **changes), replace(MACHINE, **here))
    assert found is None if reason is None else found is not None and reason in found


RTX = Machine("tensorrt-rtx", "1.7.1.116", "Linux x86_64")
RTX_METADATA = replace(
    PLAN_METADATA,
    machine=RTX,
    capabilities=("8.6", "8.9"),
    layers={},
    kernels=KernelSummary(("a/product",), (), ("b",), {"convolution": 2}, None, 4096, 9000),
)


def test_a_plan_of_tensorrt_rtx_names_no_gpu(tmp_path: Path) -> None:
    save_plan(CONTENT, tmp_path / "model.plan", RTX_METADATA)
    assert read_plan_metadata(tmp_path / "model.plan") == RTX_METADATA


@pytest.mark.parametrize(
    ("here", "reason"),
    [
        ({"gpu": "NVIDIA RTX 4090", "compute_capability": "8.9"}, None),
        ({"gpu": "NVIDIA RTX 3090", "compute_capability": "8.6", "platform": "Windows AMD64"}, None),
        ({"gpu": "NVIDIA RTX 5090", "compute_capability": "12.0"}, "compute capability 8.6, 8.9, NVIDIA RTX 5090 has"),
        ({"version": "1.7.2.1", "compute_capability": "8.9"}, "was built with TensorRT-RTX 1.7.1.116, here is 1.7.2.1"),
        ({"runtime": "tensorrt"}, "was built with TensorRT-RTX 1.7.1.116, this is TensorRT 1.7.1.116"),
    ],
)
def test_who_can_run_a_plan_of_tensorrt_rtx(here: dict[str, str], reason: str | None) -> None:
    found = mismatch(RTX_METADATA, replace(RTX, **here))
    assert found is None if reason is None else found is not None and reason in found
