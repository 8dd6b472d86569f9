"""What a calibration has finished so far, in files, so that one that was killed goes on where it stopped.

Every finished item (a batch of trajectories, a layer, a block) is one safetensors file, written beside its place and
renamed into it, so it is there whole or not at all. A fingerprint of everything the result depends on guards the
folder. Processes that share a calibration exchange their results through the same files.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dmq_export.common.files import make_folder, read_json
from dmq_export.errors import DmqError

FINGERPRINT, LOCK, RAW = "fingerprint.json", "lock", "raw"


@dataclass(frozen=True)
class Entry:
    """A finished item: its tensors, and the JSON values beside them."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]


class WorkFolder:
    """Entries by key, such as ``fits/mid_block.attentions.0.to_q``; see :func:`open_work`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, key: str) -> bool:
        return self._file(key).is_file()

    def save(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, Any] | None = None) -> None:
        """Keep an item, whole or not at all.

        Raises:
            DmqError: the disk takes no more.
        """
        path = self._file(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        try:
            save_file(contiguous, scratch, metadata={"facts": json.dumps(dict(facts or {}))})
            scratch.replace(path)
        except (OSError, SafetensorError) as error:
            scratch.unlink(missing_ok=True)
            raise DmqError(f"{path} cannot be written ({error}): make room, and repeat the command") from error

    def load(self, key: str, only: Collection[str] | None = None) -> Entry:
        """An item that is there.

        Args:
            only: the names of the tensors to read; None for all.

        Raises:
            DmqError: the file is damaged.
        """
        path = self._file(key)
        try:
            with safe_open(path, framework="pt") as stored:
                tensors = {name: stored.get_tensor(name) for name in (stored.keys() if only is None else only)}
                return Entry(tensors, json.loads(stored.metadata()["facts"]))
        except (OSError, SafetensorError, ValueError) as error:
            raise DmqError(f"{path} is damaged ({error}): delete it, or pass --fresh to start over") from error

    def keys(self) -> list[str]:
        """All items that are there."""
        files = sorted(self.folder.rglob("*.safetensors"))
        return [str(path.relative_to(self.folder)).removesuffix(".safetensors") for path in files]

    def raw(self, name: str) -> Path:
        """A place for a file that its users fill bit by bit; only entries say what in it is valid."""
        path = self.folder / RAW / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def raw_bytes(self) -> int:
        """What those files take of the disk."""
        return sum(512 * path.stat().st_blocks for path in (self.folder / RAW).glob("*"))

    def _file(self, key: str) -> Path:
        return self.folder / f"{key}.safetensors"


def started_with(folder: Path) -> dict[str, Any]:
    """The fingerprint of the unfinished calibration at ``folder``, empty where there is none.

    Raises:
        DmqError: it is damaged.
    """
    path = folder / FINGERPRINT
    try:
        return read_json(path) if path.is_file() else {}
    except DmqError as error:
        raise DmqError(f"{error}; pass --fresh to start over") from error


def require_work(folder: Path, known: Mapping[str, Any], *, fresh: bool = False) -> None:
    """Refuse at once what :func:`open_work` would refuse later; writes nothing.

    Args:
        known: of the fingerprint, what is known already.

    Raises:
        DmqError: as there.
    """
    if folder.exists() and not folder.is_dir():
        raise DmqError(f"{folder} is a file, and unfinished work goes there: move it away, or choose another output")
    if (folder / LOCK).is_file():
        with _locked(folder):
            pass
    before = {} if fresh else started_with(folder)
    if before:
        _compare(folder, {name: before.get(name) for name in known}, json.loads(json.dumps(known)))


@contextmanager
def open_work(folder: Path, fingerprint: Mapping[str, Any], *, fresh: bool = False) -> Iterator[WorkFolder]:
    """The work folder at ``folder``, for this process and those it shares its work with.

    Args:
        fingerprint: JSON values that the result depends on.
        fresh: discard what is there.

    Raises:
        DmqError: it holds another calibration, is no work folder, or is in use.
    """
    if fresh and (folder / FINGERPRINT).is_file():
        with _locked(folder):
            shutil.rmtree(folder)
    make_folder(folder)
    with _locked(folder):
        _require_same(folder, json.loads(json.dumps(fingerprint)))
        work = WorkFolder(folder)
        try:
            yield work
        except BaseException:
            if not work.keys():  # nothing to go on from
                shutil.rmtree(folder)
            raise


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """The system gives the lock back when the process ends, however it ends."""
    existing = any(folder.iterdir())
    if existing and not (folder / FINGERPRINT).is_file() and not (folder / LOCK).is_file():
        raise DmqError(f"{folder} is no work folder of a calibration: move it away, or choose another output")
    with (folder / LOCK).open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise DmqError(f"another process is calibrating in {folder}: wait for it, or stop it") from error
        yield


def _require_same(folder: Path, fingerprint: dict[str, Any]) -> None:
    path = folder / FINGERPRINT
    if not path.is_file():
        scratch = folder / f".{FINGERPRINT}"
        scratch.write_text(json.dumps(fingerprint, indent=1), encoding="utf-8")
        scratch.replace(path)
        return
    _compare(folder, started_with(folder), fingerprint)


def _compare(folder: Path, before: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    for name in sorted(before.keys() | fingerprint.keys()):
        then, now = before.get(name), fingerprint.get(name)
        if then != now:
            raise DmqError(
                f"{folder} holds an unfinished calibration with {name} {then}, this one has {now}: "
                "repeat the command that was stopped, or pass --fresh to discard it"
            )
