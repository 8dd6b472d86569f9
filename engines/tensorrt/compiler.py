"""TensorRT-RTX's parser and compiler, which need no GPU, in a process of their own.

The one way to them: ``trt-build``, ``lint --compile``, ``bench/`` and the tests go through :func:`compile_onnx`. What
the compiler refuses, and that it crashed, come back as a :class:`Refusal` and not as an exception: it is an answer.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dmq_export.extras import require
from engines.tensorrt.layer_table import LayerTable, read_layer_table
from engines.tensorrt.profile import ShapeRange

Capability = tuple[int, int]
ERRORS = ("ERROR", "INTERNAL_ERROR")
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
    """

    by: Literal["parser", "builder", "crash"]
    errors: tuple[NodeError, ...]
    log: tuple[str, ...]
    version: str = ""


@dataclass(frozen=True)
class Compiled:
    """An engine and what it is made of; with ``parse_only`` neither."""

    version: str
    engine: bytes = field(repr=False)
    table: LayerTable


def compile_onnx(request: Request) -> Compiled | Refusal:
    """Parse and build; seconds to minutes.

    Raises:
        DmqError: TensorRT-RTX or Polygraphy is not installed.
    """
    require("compiling for TensorRT-RTX", "tensorrt_rtx", "polygraphy")
    with _finished(request) as (folder, stderr):
        log = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines() if line]
        lines = [text for _, text in log]
        if not (folder / "result.json").exists():
            return Refusal("crash", (), tuple([*lines, *stderr.splitlines()][-5:]))
        result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        errors = tuple(NodeError(**error) for error in result["errors"])
        said = tuple(text for severity, text in log if severity in ERRORS)
        engine = folder / "engine"
        if errors:
            return Refusal("parser", errors, said, result["version"])
        if not engine.exists() and not request.parse_only:
            return Refusal("builder", (), said, result["version"])
        content = engine.read_bytes() if engine.exists() else b""
        return Compiled(result["version"], content, read_layer_table(lines))


@contextmanager
def _finished(request: Request) -> Iterator[tuple[Path, str]]:
    """The folder that the worker left, and what it wrote to stderr."""
    with tempfile.TemporaryDirectory(prefix="dmq-trt-") as name:
        folder = Path(name)
        (folder / "request.json").write_text(json.dumps(request.to_json()), encoding="utf-8")
        (folder / "log.jsonl").touch()
        command = [sys.executable, "-I", "-c", START, json.dumps(sys.path), str(folder)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        yield folder, result.stderr
