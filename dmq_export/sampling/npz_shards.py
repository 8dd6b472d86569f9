"""Samples on their way to one ``.npz``: killed at any moment, several processes at once, never all in memory.

Every batch is a file of its own in a folder beside the target, whole or absent, so what is there need not be drawn
again. Which samples make up a batch does not depend on who draws it; whoever completes the set writes the target, and
the bytes are the same whatever happened on the way.
"""

import fcntl
import json
import math
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dmq_export.common.files import atomic_file, read_json
from dmq_export.errors import DmqError

SETTINGS, LOCK, MERGED = "settings.json", "lock", "merged.npz"
Samples = NDArray[np.float32]


class SampleShards:
    """The batches of one ``.npz``.

    Args:
        target: the file that they become.
        settings: what is drawn, JSON values; a target or a folder of other settings is not ours.
        batches: the samples' indices.

    Raises:
        DmqError: the folder holds batches of other settings.
    """

    def __init__(self, target: Path, settings: Mapping[str, Any], batches: Sequence[range]) -> None:
        self.target = target
        self.folder = target.with_name(f"{target.name}.parts")
        self.batches = batches
        self._settings = json.loads(json.dumps(dict(settings)))
        if self.folder.is_dir():
            self._require_ours()

    def finished(self) -> bool:
        """Whether the target is there already, of the same settings."""
        try:
            with zipfile.ZipFile(self.target) as archive, archive.open("settings.npy") as stream:
                settings = np.lib.format.read_array(stream, allow_pickle=False)
            return bool(json.loads(str(settings)) == self._settings)
        except (OSError, KeyError, ValueError, zipfile.BadZipFile):
            return False  # not there, or another file, which will be replaced

    def missing(self) -> list[range]:
        """The batches still to be drawn."""
        return [indices for indices in self.batches if not self._path(indices).is_file()]

    def save(self, indices: range, samples: Samples) -> None:
        """Keep a batch."""
        self.folder.mkdir(exist_ok=True)
        self._require_ours()
        if not (self.folder / SETTINGS).is_file():
            with atomic_file(self.folder / SETTINGS) as scratch:
                scratch.write_text(json.dumps(self._settings, indent=1))
        with atomic_file(self._path(indices)) as scratch, scratch.open("wb") as stream:
            np.save(stream, np.asarray(samples, np.float32))

    def samples(self) -> Iterator[Samples]:
        """The target's samples, one batch in memory at a time."""
        with zipfile.ZipFile(self.target) as archive, archive.open("samples.npy") as stream:
            np.lib.format.read_magic(stream)
            shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            for indices in self.batches:
                batch = (len(indices), *shape[1:])
                yield np.frombuffer(stream.read(math.prod(batch) * dtype.itemsize), dtype).reshape(batch)

    def merge(self, others: Mapping[str, NDArray[Any]]) -> bool:
        """Write the target and remove the folder, if all batches are there.

        Args:
            others: arrays that go into the target besides ``samples`` and ``settings``.

        Returns:
            Whether the target is written, now or by a process that came before.
        """
        try:
            lock = (self.folder / LOCK).open("w")
        except FileNotFoundError:
            return self.finished()
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # let go when the process ends, however it does
            if not self.folder.is_dir():
                return self.finished()
            if self.missing():
                return False
            scratch = self.folder / MERGED
            self._write(scratch, others)
            scratch.replace(self.target)
            self.discard()
            return True

    def discard(self) -> None:
        """Remove the folder, if it is there."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, path: Path, others: Mapping[str, NDArray[Any]]) -> None:
        """As ``np.savez`` does, one batch in memory at a time."""
        first: Samples = np.load(self._path(self.batches[0]))
        shape = (sum(map(len, self.batches)), *first.shape[1:])
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.float32)), "fortran_order": False, "shape": shape}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            with archive.open("samples.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array_header_1_0(stream, header)
                for indices in self.batches:
                    stream.write(np.load(self._path(indices)).tobytes())
            for name, value in {**others, "settings": np.array(json.dumps(self._settings))}.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                    np.lib.format.write_array(stream, np.asarray(value), allow_pickle=False)

    def _path(self, indices: range) -> Path:
        return self.folder / f"{indices.start:08d}-{indices.stop:08d}.npy"

    def _require_ours(self) -> None:
        if not (self.folder / SETTINGS).is_file():
            return  # killed before the first batch
        there = read_json(self.folder / SETTINGS)
        for name in sorted({*there, *self._settings}):
            if there.get(name) != self._settings.get(name):
                raise DmqError(
                    f"{self.folder} holds part of another run ({name} {there.get(name)} there, "
                    f"{self._settings.get(name)} here): finish that run, or remove the folder"
                )
