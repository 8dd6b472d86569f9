"""What a denoiser is told of each prompt, computed once: arrays by name, with and without the prompt."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dmq_export.denoiser.arguments import GUIDANCE, Argument
from dmq_export.errors import DmqError, ModelError

Arrays = Mapping[str, NDArray[Any]]
UNCONDITIONAL = "uncond/"  # prefix of the names in a file


@dataclass(frozen=True)
class Embeddings:
    """Embeddings of ``S`` prompts; two are equal when their ``sha256`` is.

    Attributes:
        given: by name (:mod:`dmq_export.denoiser.arguments`), each ``[S, ...]``.
        unconditional: the same for guidance's other branch, each ``[S, ...]`` or ``[1, ...]``; empty for none.
        sha256: of all names, types, shapes and values.

    Raises:
        DmqError: the arrays do not have one number of rows.
    """

    given: Arrays = field(compare=False, repr=False)
    unconditional: Arrays = field(compare=False, repr=False, default_factory=dict)
    sha256: str = field(init=False)

    def __post_init__(self) -> None:
        if self.count == 0:
            raise DmqError("there are no embeddings: at least one row of at least one array is needed")
        for name, value in self.named().items():
            allowed = (1, self.count) if name.startswith(UNCONDITIONAL) else (self.count,)
            rows = len(value) if value.ndim else None
            if rows not in allowed:
                raise DmqError(f"embeddings {name}: {list(value.shape)}, but the first array has {self.count} rows")
        object.__setattr__(self, "sha256", _sha256(self.named()))

    @property
    def count(self) -> int:
        """How many prompts."""
        first = next(iter(self.given.values()), np.zeros(0))
        return len(first) if first.ndim else 0

    def named(self) -> dict[str, NDArray[Any]]:
        """All arrays under the names that a file has."""
        return {**self.given, **{f"{UNCONDITIONAL}{name}": value for name, value in self.unconditional.items()}}

    def cycled(self, indices: range) -> "tuple[dict[str, NDArray[Any]], dict[str, NDArray[Any]]]":
        """Both branches for the samples ``indices``: sample ``i`` is told of prompt ``i`` modulo ``S``."""
        given, without = (
            {name: value[np.array(indices) % len(value)] for name, value in branch.items()}
            for branch in (self.given, self.unconditional)
        )
        return given, without

    def after(self, first: int) -> "Embeddings":
        """Those of the prompts from number ``first`` on.

        Raises:
            DmqError: there are none.
        """
        without = {name: value if len(value) == 1 else value[first:] for name, value in self.unconditional.items()}
        return Embeddings({name: value[first:] for name, value in self.given.items()}, without)


def load_embeddings(path: Path) -> Embeddings:
    """Embeddings from an ``.npz`` file: arrays by argument name, guidance's other branch as ``uncond/<name>``.

    Raises:
        DmqError: the file cannot be read, or is not of that form.
    """
    arrays = _read(path)
    given = {name: value for name, value in arrays.items() if not name.startswith(UNCONDITIONAL)}
    without = {name.removeprefix(UNCONDITIONAL): arrays[name] for name in arrays if name not in given}
    try:
        return Embeddings(given, without)
    except DmqError as error:
        raise DmqError(f"{path}: {error}") from error


def _read(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as stream:
            file = np.load(stream, allow_pickle=False)
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise DmqError(f"cannot read {path}: {error.strerror or error}") from error
    except AttributeError as error:
        raise DmqError(f"{path} holds a single array, an .npz file of arrays by name was expected") from error
    except (BadZipFile, EOFError, ValueError) as error:  # what NumPy says of pickles and of other files
        raise DmqError(f"{path} is no .npz file of plain arrays: write one with numpy.savez") from error


def fitted(embeddings: Embeddings, told: Sequence[Argument], guidance_scale: float | None) -> Embeddings:
    """The embeddings as a model that is told ``told`` takes them: checked, whole numbers int64, all else float32.

    Args:
        guidance_scale: told to a distilled model that takes it as an input, where the embeddings do not say it.

    Raises:
        ModelError: a name is unknown or missing, a shape is wrong, or guidance lacks its other branch.
    """
    by_name = {argument.name: argument for argument in told}
    given, without = dict(embeddings.given), dict(embeddings.unconditional)
    if GUIDANCE in by_name and GUIDANCE not in given and guidance_scale is not None:
        given[GUIDANCE] = np.full(embeddings.count, guidance_scale, np.float32)
    if guidance_scale is None:
        without = {}
    elif GUIDANCE not in by_name and not without:
        raise ModelError("guidance needs the embeddings of the empty prompt too: give them as uncond/<name>")
    for branch in (given, without) if without else (given,):
        _require_names(branch, by_name)
    return Embeddings(
        *({name: _typed(name, value, by_name[name]) for name, value in branch.items()} for branch in (given, without))
    )


def _require_names(branch: Arrays, told: Mapping[str, Argument]) -> None:
    takes = ", ".join(argument.text() for argument in told.values())
    unknown = sorted(branch.keys() - told.keys())
    if unknown:
        raise ModelError(f"the model is told nothing called {unknown[0]!r}: it takes {takes}")
    missing = [name for name, argument in told.items() if name not in branch and not argument.optional]
    if missing:
        hint = ", or --guidance-scale" if missing[0] == GUIDANCE else ""
        raise ModelError(f"the embeddings lack {missing[0]}{hint}: the model takes {takes}")


def _typed(name: str, value: NDArray[Any], argument: Argument) -> NDArray[Any]:
    shape = value.shape[1:]
    fits = len(shape) == len(argument.shape) and all(
        expected in (None, size) for size, expected in zip(shape, argument.shape, strict=True)
    )
    if not fits:
        raise ModelError(f"embeddings {name}: {list(value.shape)} was given, the model takes {argument.text()}")
    typed = np.ascontiguousarray(value, np.int64 if argument.integer else np.float32)
    if not np.isfinite(typed).all():
        raise ModelError(f"embeddings {name} are not finite everywhere")
    return typed


def _sha256(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        value = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {value.dtype.str} {list(value.shape)}\n".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()
