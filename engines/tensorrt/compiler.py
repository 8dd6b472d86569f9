"""TensorRT-RTX's parser and compiler, which need no GPU, in a process of their own.

The one way to them: ``trt-build``, ``lint --compile``, ``bench/`` and the tests go through :func:`compile_onnx`. What
the compiler refuses, and that it crashed, come back as a :class:`Refusal` and not as an exception: it is an answer.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmq_export.common.extras import require
from dmq_export.errors import DmqError
from engines.tensorrt.layer_table import LayerTable, read_layer_table
from engines.tensorrt.log import NOISE, REPORT, explain
from engines.tensorrt.profile import ShapeRange

Capability = tuple[int, int]
ERRORS = ("ERROR", "INTERNAL_ERROR")
LOOK_SECONDS = 0.2
KILLED = -9  # the exit status of a process that the system ended
START = (  # isolated, so that nothing in the folder that the user stands in is imported instead of what it is called
    "import json, sys; from pathlib import Path; sys.path[:] = json.loads(sys.argv[1]); "
    "from engines.tensorrt.worker import main; main(Path(sys.argv[2]))"
)


@dataclass(frozen=True)
class Request:
    """What to compile.

    Attributes:
        onnx: the file.
        shapes: range of every input; none where all sizes are fixed.
        capabilities: compute capabilities of the GPUs; none for the compiler's own choice.
        parse_only: stop behind the parser.
    """

    onnx: Path
    shapes: Mapping[str, ShapeRange] = field(default_factory=dict)
    capabilities: tuple[Capability, ...] = ()
    parse_only: bool = False

    def to_json(self) -> dict[str, Any]:
        """For the worker."""
        shapes = {name: [chosen.minimum, chosen.optimum, chosen.maximum] for name, chosen in self.shapes.items()}
        return {
            "runtime": "tensorrt-rtx",
            "onnx": str(self.onnx.resolve()),
            "shapes": shapes,
            "capabilities": [list(pair) for pair in self.capabilities],
            "parse_only": self.parse_only,
        }


@dataclass(frozen=True)
class NodeError:
    """A node that the parser refuses."""

    node: str
    operator: str
    text: str
    code: str


@dataclass(frozen=True)
class Refusal:
    """Why there is no engine.

    Attributes:
        by: who refused; ``crash`` where the builder's process died.
        errors: the parser's, by node.
        log: the errors in the log, oldest first; for a crash its last lines.
        status: with which a crashed process ended, negative for a signal.
    """

    by: Literal["parser", "builder", "crash"]
    errors: tuple[NodeError, ...]
    log: tuple[str, ...]
    version: str = ""
    status: int = 0

    def text(self, layers: Sequence[str] = ()) -> str:
        """Where, why, and what to do, on one line.

        Args:
            layers: the model's layers, to be named instead of their nodes.
        """
        if self.by == "crash":
            if self.status == KILLED:
                return "the system ended the builder, as it does where memory runs out: use a machine with more"
            return f"the builder crashed (exit status {self.status}): {REPORT}"
        first = self.errors[0] if self.errors else NodeError("", "", "", "")
        lines = [line for text in (first.text, *self.log) for line in text.splitlines() if not re.search(NOISE, line)]
        return explain([*lines, first.code], layers, first.node).text()


@dataclass(frozen=True)
class Compiled:
    """An engine and what it is made of; with ``parse_only`` neither."""

    version: str
    engine: bytes = field(repr=False)
    table: LayerTable


def compile_onnx(request: Request, watch: Callable[[str], None] = lambda phase: None) -> Compiled | Refusal:
    """Parse and build; seconds to minutes.

    Args:
        watch: called a few times a second with the name of the compiler's current phase.

    Raises:
        DmqError: TensorRT-RTX or Polygraphy is not installed, or does not load, or the disk has no room.
    """
    require("compiling for TensorRT-RTX", "tensorrt_rtx", "polygraphy")
    with _finished(request, watch) as (folder, status):
        result = _result(folder)
        log = _log(folder)
        if result is None:
            stderr = (folder / "stderr").read_text(encoding="utf-8", errors="replace")
            last = [*(text for _, text in log), *stderr.splitlines()][-5:]
            return Refusal("crash", (), tuple(last), status=status)
        if "problem" in result:
            raise DmqError(f"TensorRT-RTX cannot compile {request.onnx}: {result['problem']}")
        errors = tuple(NodeError(**error) for error in result["errors"])
        said = tuple(text for severity, text in log if severity in ERRORS and not re.search(NOISE, text))
        engine = folder / "engine"
        if errors:
            return Refusal("parser", errors, said, result["version"])
        if not engine.exists() and not request.parse_only:
            return Refusal("builder", (), said, result["version"])
        content = engine.read_bytes() if engine.exists() else b""
        return Compiled(result["version"], content, read_layer_table([text for _, text in log]))


def _result(folder: Path) -> dict[str, Any] | None:
    """What the worker left, or None where it did not come to an end."""
    path = folder / "result.json"
    try:
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
    except ValueError:
        return {"problem": f"{folder.parent} is full: make room, or name another folder with TMPDIR"}


def _log(folder: Path) -> list[tuple[str, str]]:
    """Severity and text of each entry; the last line may be cut off by a crash."""
    path = folder / "log.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else [""]
    return [tuple(json.loads(line)) for line in lines[:-1]]


@contextmanager
def _finished(request: Request, watch: Callable[[str], None]) -> Iterator[tuple[Path, int]]:
    """The folder that the worker left, and its exit status; however this ends, the worker has ended."""
    with tempfile.TemporaryDirectory(prefix="dmq-trt-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            (folder / "request.json").write_text(json.dumps(request.to_json()), encoding="utf-8")
        except OSError as error:
            raise DmqError(
                f"cannot write {folder}: {error.strerror}: make room, or name another folder with TMPDIR"
            ) from error
        command = [sys.executable, "-I", "-c", START, json.dumps(sys.path), str(folder)]
        with (folder / "stderr").open("wb") as stderr:
            worker = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=stderr, stderr=stderr)
            try:
                _watch(worker, folder / "phase", watch)
            finally:
                worker.kill()
                worker.communicate()
        yield folder, worker.returncode


def _watch(worker: subprocess.Popen[bytes], phase: Path, watch: Callable[[str], None]) -> None:
    while True:
        try:
            worker.wait(LOOK_SECONDS)
        except subprocess.TimeoutExpired:
            watch(phase.read_text(encoding="utf-8") if phase.exists() else "")
        else:
            return
