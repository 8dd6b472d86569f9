"""Finished items come back as they were, and a work folder serves one calibration only."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

import calib.record.work_folder
from calib.record.work_folder import FINGERPRINT, WorkFolder, open_work, require_work
from dmq_export.errors import DmqError

ROOT = Path(__file__).resolve().parents[3]
OURS: dict[str, Any] = {"model": "abc", "recipe.samples": 4}


def test_an_item_comes_back_as_it_was(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    tensors = {
        "a": torch.randn(3, 4).T,  # not contiguous
        "b": torch.arange(5, dtype=torch.uint8),
        "empty": torch.zeros(0, 2),
    }
    facts = {"text": "ß", "number": 0.1, "list": [1, None]}
    assert "fits/x.y" not in work
    work.save("fits/x.y", tensors, facts)
    assert "fits/x.y" in work
    entry = work.load("fits/x.y")
    assert entry.tensors.keys() == tensors.keys()
    assert all(torch.equal(entry.tensors[name], value) for name, value in tensors.items())
    assert all(entry.tensors[name].dtype == value.dtype for name, value in tensors.items())
    assert entry.facts == facts


def test_some_tensors_of_an_item_are_read_without_the_others(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    work.save("captures/0", {"a": torch.ones(2), "b": torch.zeros(3)}, {"layers": ["a"]})
    assert {name: value.tolist() for name, value in work.load("captures/0", only=["b"]).tensors.items()} == {
        "b": [0] * 3
    }
    assert work.load("captures/0", only=()).tensors == {}
    assert work.load("captures/0", only=()).facts == {"layers": ["a"]}
    with pytest.raises(DmqError, match=r"captures/0.safetensors is damaged"):
        work.load("captures/0", only=["c"])


def test_an_item_may_have_no_tensors(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    work.save("check/both", {}, {"sqnr_db": [1.0]})
    assert work.load("check/both").facts == {"sqnr_db": [1.0]}


def test_keys_name_all_items_and_nothing_else(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    work.save("fits/a.b", {})
    work.save("captures/a.b/0", {})
    work.raw("a.patches").write_bytes(b"0")
    (tmp_path / "fits" / ".a.c.safetensors.123").write_bytes(b"half")
    assert sorted(work.keys()) == ["captures/a.b/0", "fits/a.b"]
    assert [path.name for path in (tmp_path / "fits").glob("a*")] == ["a.b.safetensors"]


def test_an_item_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def half(tensors: Any, path: Path, **_: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(calib.record.work_folder, "save_file", half)
    with pytest.raises(DmqError, match=r"fits/a.safetensors cannot be written \(No space left .*repeat the command"):
        WorkFolder(tmp_path).save("fits/a", {"a": torch.zeros(4)})
    assert list((tmp_path / "fits").iterdir()) == []


def test_a_damaged_item_is_refused(tmp_path: Path) -> None:
    work = WorkFolder(tmp_path)
    work.save("fits/a", {"a": torch.zeros(4)})
    (tmp_path / "fits" / "a.safetensors").write_bytes(b"nonsense")
    with pytest.raises(DmqError, match=r"fits/a.safetensors is damaged .*: delete it, or pass --fresh"):
        work.load("fits/a")


def test_the_same_calibration_goes_on_with_what_is_there(tmp_path: Path) -> None:
    with open_work(tmp_path / "w", OURS) as work:
        work.save("fits/a", {})
    with open_work(tmp_path / "w", dict(reversed(OURS.items()))) as work:
        assert work.keys() == ["fits/a"]


def test_fresh_discards_what_is_there(tmp_path: Path) -> None:
    with open_work(tmp_path / "w", OURS) as work:
        work.save("fits/a", {})
    with open_work(tmp_path / "w", OURS | {"model": "other"}, fresh=True) as work:
        assert work.keys() == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"recipe.samples": 5}, "recipe.samples 4, this one has 5"),
        ({"threads": 2}, "threads None, this one has 2"),
    ],
)
def test_another_calibration_is_refused_and_nothing_lost(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with open_work(tmp_path / "w", OURS) as work:
        work.save("fits/a", {})
    with (
        pytest.raises(DmqError, match=f"unfinished calibration with {words}.*pass --fresh"),
        open_work(tmp_path / "w", OURS | changed),
    ):
        pass
    assert WorkFolder(tmp_path / "w").keys() == ["fits/a"]


def test_a_folder_of_something_else_is_refused_even_with_fresh(tmp_path: Path) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "precious").write_text("mine")
    for fresh in (False, True):
        with (
            pytest.raises(DmqError, match="is no work folder of a calibration"),
            open_work(tmp_path / "w", OURS, fresh=fresh),
        ):
            pass
    assert [path.name for path in (tmp_path / "w").iterdir()] == ["precious"]


def test_a_failure_before_anything_is_finished_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), open_work(tmp_path / "w", OURS):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_failure_after_something_is_finished_keeps_it(tmp_path: Path) -> None:
    def stop(work: WorkFolder) -> None:
        work.save("fits/a", {})
        raise RuntimeError

    with pytest.raises(RuntimeError), open_work(tmp_path / "w", OURS) as work:
        stop(work)
    assert json.loads((tmp_path / "w" / FINGERPRINT).read_text()) == OURS
    assert WorkFolder(tmp_path / "w").keys() == ["fits/a"]


def test_two_processes_do_not_use_one_folder(tmp_path: Path) -> None:
    program = f"""
from pathlib import Path
from calib.record.work_folder import open_work
from dmq_export.errors import DmqError
try:
    with open_work(Path({str(tmp_path / "w")!r}), {OURS!r}):
        print("opened")
except DmqError as error:
    print(error)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def other() -> str:
        return subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    with open_work(tmp_path / "w", OURS):
        assert "another process is calibrating in" in other()
    assert other() == "opened"


def test_what_cannot_be_worked_in_is_refused_beforehand(tmp_path: Path) -> None:
    folder = tmp_path / "out.work"
    require_work(folder, OURS)
    assert not folder.exists()
    folder.touch()
    with pytest.raises(DmqError, match=r"out\.work is a file, and unfinished work goes there: move it away"):
        require_work(folder, OURS)
    folder.unlink()
    with open_work(folder, OURS | {"batch": 4}) as work:
        work.save("fits/a", {})
        with pytest.raises(DmqError, match="another process is calibrating"):
            require_work(folder, OURS)
    require_work(folder, OURS)  # the batch is not known yet
    with pytest.raises(DmqError, match="holds an unfinished calibration with model abc, this one has def"):
        require_work(folder, OURS | {"model": "def"})
    require_work(folder, OURS | {"model": "def"}, fresh=True)
    (folder / FINGERPRINT).write_text("{")
    with pytest.raises(DmqError, match=r"is not valid JSON.*; pass --fresh to start over"):
        require_work(folder, OURS)
    assert sorted(path.name for path in folder.iterdir()) == ["fingerprint.json", "fits", "lock"]
