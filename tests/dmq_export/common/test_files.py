"""Files and folders that appear whole or not at all, and refusals before any work is done."""

import hashlib
import re
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from dmq_export.common.files import (
    _take_place,
    atomic_file,
    atomic_files,
    atomic_folder,
    make_folder,
    read_json,
    require_free,
    require_writable,
    sha256,
)
from dmq_export.errors import DmqError


def names(folder: Path) -> list[str]:
    """All that is in ``folder``, hidden files too."""
    return sorted(path.name for path in folder.iterdir())


def fail_half_way(block: AbstractContextManager[Path], error: type[BaseException], name: str) -> None:
    """Write ``name`` below the block's scratch path, then fail."""
    with block as scratch:
        (scratch / name).write_text("half")
        raise error


def test_a_file_appears_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with atomic_file(path) as scratch:
        scratch.write_bytes(b"half")
        assert scratch.name == path.name
        assert not path.exists()
    assert path.read_bytes() == b"half"
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_file_stays_as_it_was_when_its_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(error):
        fail_half_way(atomic_file(path), error, "")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["model.onnx"]


def test_whoever_reads_the_old_file_reads_it_to_its_end(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"a longer old file")
    with path.open("rb") as reader:
        with atomic_file(path) as scratch:
            scratch.write_bytes(b"new")
        assert reader.read() == b"a longer old file"
    assert path.read_bytes() == b"new"


def test_only_the_named_file_is_kept(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "model.onnx") as scratch:
        scratch.write_bytes(b"graph")
        scratch.with_name("model.data").write_bytes(b"weights")
    assert names(tmp_path) == ["model.onnx"]


def test_a_folder_appears_when_its_block_ends(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    with atomic_folder(path) as scratch:
        (scratch / "a").write_text("1")
        assert not path.exists()
    assert names(path) == ["a"]
    assert names(tmp_path) == ["checkpoint"]


def test_a_folder_has_the_permissions_of_an_ordinary_one(tmp_path: Path) -> None:
    (tmp_path / "ordinary").mkdir()
    with atomic_folder(tmp_path / "checkpoint"):
        pass
    assert (tmp_path / "checkpoint").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_nothing_is_left_of_a_folder_whose_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    with pytest.raises(error):
        fail_half_way(atomic_folder(tmp_path / "checkpoint"), error, "a")
    assert names(tmp_path) == []


def test_the_old_folder_survives_a_failed_replacement(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "old").write_text("1")
    with pytest.raises(RuntimeError):
        fail_half_way(atomic_folder(path, replace=True), RuntimeError, "new")
    assert names(path) == ["old"]
    assert names(tmp_path) == ["checkpoint"]


def test_a_replaced_folder_keeps_nothing_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "old").write_text("1")
    with atomic_folder(path, replace=True) as scratch:
        (scratch / "new").write_text("2")
        assert names(path) == ["old"]
    assert names(path) == ["new"]


def test_a_folder_with_something_in_it_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "old").write_text("1")
    expected = f"^{re.escape(str(tmp_path))} exists and is not empty: choose another path, or pass --fresh$"
    with pytest.raises(DmqError, match=expected), atomic_folder(tmp_path):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["old"]


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    path = tmp_path / "empty"
    path.mkdir()
    with atomic_folder(path) as scratch:
        (scratch / "a").write_text("1")
    assert names(path) == ["a"]


def test_a_linked_folder_is_filled_and_stays_linked(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "checkpoint"
    link.symlink_to(tmp_path / "disk")
    with atomic_folder(link) as scratch:
        (scratch / "a").write_text("1")
    assert link.is_symlink()
    assert names(tmp_path / "disk") == ["a"]
    assert names(tmp_path) == ["checkpoint", "disk"]


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("output", [".", "..", "../here"])
def test_a_folder_that_holds_the_current_one_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, replace: bool
) -> None:
    path = tmp_path / "here"
    path.mkdir()
    if replace:
        (path / "precious").write_text("1")
    monkeypatch.chdir(path)
    with pytest.raises(DmqError), atomic_folder(Path(output), replace=replace):
        pytest.fail("the block must not run")
    assert names(path) == (["precious"] if replace else [])
    assert names(tmp_path) == ["here"]


@pytest.mark.parametrize("replace", [False, True])
def test_a_file_in_the_way_of_a_folder_is_refused(tmp_path: Path, replace: bool) -> None:
    path = tmp_path / "checkpoint"
    path.write_text("precious")
    with pytest.raises(DmqError, match="checkpoint is a file; the output must be a folder"):
        require_free(path, replace=replace)
    assert path.read_text() == "precious"


def test_a_folder_in_the_way_of_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.mkdir()
    with pytest.raises(DmqError, match=re.escape(str(path))), atomic_file(path):
        pytest.fail("the block must not run")
    assert names(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("parent", ["missing", "file"])
def test_a_parent_that_is_no_folder_is_refused_before_any_work(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("1")
    path = tmp_path / parent / "out"
    expected = f"^cannot write {re.escape(str(path))}: .* \\({re.escape(str(path.parent))}\\)$"
    with pytest.raises(DmqError, match=expected), atomic_file(path):
        pytest.fail("the block must not run")
    with pytest.raises(DmqError, match=expected), atomic_folder(path):
        pytest.fail("the block must not run")


def test_a_link_to_where_nothing_can_be_written_is_refused_before_any_work(tmp_path: Path) -> None:
    link = tmp_path / "checkpoint"
    link.symlink_to(tmp_path / "unmounted" / "disk")
    with pytest.raises(DmqError, match=r"^cannot write .*unmounted"), atomic_folder(link):
        pytest.fail("the block must not run")


def test_asking_whether_a_path_is_writable_leaves_no_trace(tmp_path: Path) -> None:
    require_writable(tmp_path / "out")
    assert names(tmp_path) == []


def test_folders_are_made_with_their_parents_and_only_once(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    make_folder(path)
    (path / "kept").write_text("1")
    make_folder(path)
    assert names(path) == ["kept"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("1")
    with pytest.raises(DmqError, match=f"^cannot create the folder {re.escape(str(path))}: File exists$"):
        make_folder(path)


def test_json_is_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes('{"name": "Gewürz"}'.encode())
    assert read_json(path) == {"name": "Gewürz"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"a": 1', "is not valid JSON: .*line 1"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe\x00", "is not valid JSON: .*codec"),
        (b"[1, 2]", "holds a JSON list, an object was expected"),
        (b"null", "holds a JSON NoneType, an object was expected"),
    ],
)
def test_other_than_a_json_object_is_refused_with_the_path(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "facts.json"
    path.write_bytes(content)
    with pytest.raises(DmqError, match=f"^{re.escape(str(path))} {expected}"):
        read_json(path)


def test_json_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DmqError, match=r"^cannot read .*facts\.json: No such file or directory$"):
        read_json(tmp_path / "facts.json")


@pytest.mark.parametrize("size", [0, 3, 2**20, 2**20 + 1])
def test_the_digest_is_that_of_all_bytes(tmp_path: Path, size: int) -> None:
    content = bytes(range(251)) * (size // 251 + 1)
    path = tmp_path / "weights"
    path.write_bytes(content[:size])
    assert sha256(path) == hashlib.sha256(content[:size]).hexdigest()


def test_the_digest_is_written_in_lower_case_hex(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"abc")
    assert sha256(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_an_old_folder_comes_back_when_the_new_one_cannot_take_its_place(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "precious").touch()
    with pytest.raises(FileNotFoundError):
        _take_place(tmp_path / "never written", path, tmp_path / "old")
    assert names(path) == ["precious"]
    assert names(tmp_path) == ["checkpoint"]


def write_pair(path: Path, name: str | None, content: str) -> None:
    with atomic_files(path, "model.data") as scratch:
        scratch.write_text(content)
        if name is not None:
            scratch.with_name(name).write_text(content)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def test_a_file_and_its_companion_change_together(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_pair(path, "model.data", "old")
    assert contents(tmp_path) == {"model.onnx": "old", "model.data": "old"}
    write_pair(path, "model.data", "new")
    assert contents(tmp_path) == {"model.onnx": "new", "model.data": "new"}


def test_a_companion_goes_with_the_file_it_belonged_to(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    write_pair(path, "model.data", "old")
    write_pair(path, None, "new")
    assert contents(tmp_path) == {"model.onnx": "new"}


def test_a_file_without_a_companion_is_an_ordinary_one(tmp_path: Path) -> None:
    write_pair(tmp_path / "model.onnx", "stray", "new")
    assert contents(tmp_path) == {"model.onnx": "new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_both_stay_when_the_block_fails(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "model.onnx"
    write_pair(path, "model.data", "old")
    with pytest.raises(error):
        fail_half_way(atomic_files(path, "model.data"), error, "")
    assert contents(tmp_path) == {"model.onnx": "old", "model.data": "old"}


@pytest.mark.parametrize("existed", [True, False])
@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_both_stay_or_stay_away_when_a_move_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int, existed: bool
) -> None:
    path = tmp_path / "model.onnx"
    if existed:
        write_pair(path, "model.data", "old")
    before, moves, rename = contents(tmp_path), [], Path.rename

    def fail(self: Path, target: Path) -> Path:
        moves.append(target)
        if len(moves) == failing:
            raise OSError("no space left")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    if existed or failing <= 2:
        with pytest.raises(OSError, match="no space left"):
            write_pair(path, "model.data", "new")
        assert contents(tmp_path) == before
    else:
        write_pair(path, "model.data", "new")


def test_the_companion_must_be_no_folder(tmp_path: Path) -> None:
    (tmp_path / "model.data").mkdir()
    with pytest.raises(DmqError, match=r"model\.data is a folder"):
        write_pair(tmp_path / "model.onnx", "model.data", "new")
