"""Files appear whole or not at all."""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dmq_export.common.memory import in_words
from dmq_export.errors import DmqError


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A scratch path that replaces ``path`` when the block ends without an error.

    The scratch path lies in a folder of its own, so the block may write other files beside it; only the named
    file moves.

    Raises:
        DmqError: ``path`` is a folder, or its parent does not exist or cannot be written.
    """
    require_file(path)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch / path.name
        (scratch / path.name).replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextmanager
def atomic_files(path: Path, companion: str) -> Iterator[Path]:
    """As :func:`atomic_file` for a file and one that belongs to it, both in one folder: both change or neither.

    The block writes the scratch path and, where there is one, the file ``companion`` beside it. An old companion
    goes when there is no new one. Old files leave before new ones come, so an interruption can lose both but never
    leave a file beside another one's companion.

    Raises:
        DmqError: as :func:`atomic_file`, for either of them.
    """
    beside = path.with_name(companion)
    require_file(path)
    require_file(beside)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield scratch / path.name
        if beside.exists() or (scratch / companion).exists():
            _take_places(scratch, path, beside)
        else:
            (scratch / path.name).replace(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _take_places(scratch: Path, path: Path, beside: Path) -> None:
    """Move the files of ``scratch`` to ``path`` and ``beside``; or leave both as they were."""
    old = scratch / "old"
    old.mkdir()
    new = [there for there in (beside, path) if there is path or (scratch / there.name).exists()]
    placed: list[Path] = []
    try:
        for there in (path, beside):
            if there.exists():
                there.rename(old / there.name)
        for there in new:
            (scratch / there.name).rename(there)
            placed.append(there)
    except BaseException:
        for there in placed:
            there.unlink()
        for there in (beside, path):
            if (old / there.name).exists():
                (old / there.name).rename(there)
        raise


@contextmanager
def atomic_folder(path: Path, *, replace: bool = False) -> Iterator[Path]:
    """A scratch folder that takes the place of ``path`` when the block ends without an error; links are followed.

    Raises:
        DmqError: ``path`` exists and ``replace`` is not set, holds the current folder, or its parent cannot be written.
    """
    require_free(path, replace=replace)
    path = path.resolve()
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        (work / "new").mkdir()
        yield work / "new"
        _take_place(work / "new", path, work / "old")
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _take_place(new: Path, path: Path, old: Path) -> None:
    """Move ``new`` to ``path`` and what was there to ``old``; or leave both as they were."""
    if path.exists():
        path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        if old.exists():
            old.rename(path)
        raise


def require_file(path: Path) -> None:
    """Refuse a file that cannot be written, before any work is done.

    Raises:
        DmqError: as :func:`atomic_file`.
    """
    if path.is_dir():
        raise DmqError(f"{path} is a folder; the output must be a file: choose another path")
    require_writable(path)


def require_free(path: Path, *, replace: bool) -> None:
    """Refuse to write over what is there, before any work is done.

    Raises:
        DmqError: as :func:`atomic_folder`.
    """
    if Path.cwd().is_relative_to(path.resolve()):
        raise DmqError(f"{path} is or holds the current folder, which cannot be replaced: name a folder inside it")
    require_writable(path.resolve() if path.is_symlink() else path)
    if path.exists() and not path.is_dir():
        raise DmqError(f"{path} is a file; the output must be a folder: choose another path")
    if path.exists() and any(path.iterdir()) and not replace:
        raise DmqError(f"{path} exists and is not empty: choose another path, or pass --fresh")


def make_folder(path: Path) -> None:
    """Create ``path`` unless it is there.

    Raises:
        DmqError: it cannot be created, or is a file.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DmqError(f"cannot create the folder {path}: {error.strerror}") from error


def require_writable(path: Path) -> None:
    """Fail at once where writing would fail after hours.

    Raises:
        DmqError: the parent folder does not exist or refuses a new file.
    """
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise DmqError(f"cannot write {path}: {error.strerror} ({path.parent})") from error


def require_room(folder: Path, size: int) -> None:
    """Fail at once where a result of ``size`` bytes or more will not fit.

    Raises:
        DmqError: the disk that ``folder`` lies on has less left.
    """
    free = shutil.disk_usage(folder).free
    if free < size:
        raise DmqError(f"{folder} has {in_words(free)} left, at least {in_words(size)} are needed: make room")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``.

    Raises:
        DmqError: it cannot be read or is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DmqError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise DmqError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise DmqError(f"{path} holds a JSON {type(content).__name__}, an object was expected")
    return content


def sha256(path: Path) -> str:
    """Hex digest of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
