"""The file of compiled kernels: for one plan, whole or ignored, and never a reason to fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines.tensorrt.runtime_cache import RuntimeCache, cache_path, read_cache, write_cache

PLAN, OTHER = "ab" * 32, "cd" * 32


@pytest.fixture
def notes() -> list[str]:
    return []


def test_it_lies_beside_the_plan() -> None:
    assert cache_path(Path("a/model.plan")) == Path("a/model.rtx-cache")


def test_what_is_written_is_read(tmp_path: Path, notes: list[str]) -> None:
    path = tmp_path / "model.rtx-cache"
    assert read_cache(path, PLAN, notes.append) is None
    for content in (b"kernels", b"more kernels"):
        write_cache(path, PLAN, content, notes.append)
        assert read_cache(path, PLAN, notes.append) == content
    assert (notes, [one.name for one in tmp_path.iterdir()]) == ([], ["model.rtx-cache"])


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-1], lambda b: b[:32], lambda b: b"", lambda b: b[:40] + b"!" + b[41:]]
)
def test_a_damaged_one_is_ignored_with_a_note(tmp_path: Path, notes: list[str], damage: object) -> None:
    path = tmp_path / "model.rtx-cache"
    write_cache(path, PLAN, b"the kernels of a plan", notes.append)
    good = path.read_bytes()
    damaged = (good[:-1], good[:32], b"", good[:40] + b"!" + good[41:])
    for content in damaged:
        path.write_bytes(content)
        assert read_cache(path, PLAN, notes.append) is None
    assert notes == [f"{path} is of another plan, or damaged: the kernels are compiled again"] * len(damaged)


def test_that_of_another_plan_is_ignored_with_a_note(tmp_path: Path, notes: list[str]) -> None:
    path = tmp_path / "model.rtx-cache"
    write_cache(path, OTHER, b"kernels", notes.append)
    assert read_cache(path, PLAN, notes.append) is None
    assert len(notes) == 1


def test_one_that_cannot_be_read_or_written_is_a_note(tmp_path: Path, notes: list[str]) -> None:
    """A folder in its place, which even root cannot read or write as a file."""
    path = tmp_path / "model.rtx-cache"
    path.mkdir()
    assert read_cache(path, PLAN, notes.append) is None
    write_cache(path, PLAN, b"kernels", notes.append)
    assert notes[0].startswith(f"cannot read {path} (")
    assert notes[1].startswith(f"the compiled kernels are not kept: {path} is a folder")


def test_a_folder_that_is_gone_is_a_note(tmp_path: Path, notes: list[str]) -> None:
    write_cache(tmp_path / "gone" / "model.rtx-cache", PLAN, b"kernels", notes.append)
    assert len(notes) == 1
    assert "\n" not in notes[0]


def test_one_that_tensorrt_rtx_refuses_is_written_again(
    tmp_path: Path, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an update of the driver; an engine needs a GPU, so a stand-in of its attributes is used."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    from host_gpu import HostEngine

    host, plan = HostEngine(monkeypatch), tmp_path / "model.plan"
    write_cache(cache_path(plan), PLAN, b"old", notes.append)
    host.cache.deserialize.return_value = False
    cache = RuntimeCache(host.engine, plan, PLAN, notes.append)
    assert notes == [f"{cache_path(plan)} is of another GPU, driver or TensorRT-RTX: the kernels are compiled again"]
    cache.keep()
    assert read_cache(cache_path(plan), PLAN, notes.append) == b"kernels"
    host.cache.serialize.return_value = None
    cache.keep()
    assert read_cache(cache_path(plan), PLAN, notes.append) == b"kernels"
