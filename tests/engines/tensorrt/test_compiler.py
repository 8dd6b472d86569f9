"""TensorRT-RTX's real compiler in its own process: what it makes, what it refuses, and how it ends."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from qdq import conv_model
from rtx import REFUSED, needs_rtx, open_model, saved

from dmq_export.errors import DmqError
from engines.tensorrt.compiler import Compiled, Refusal, Request, compile_onnx
from engines.tensorrt.profile import ShapeRange

pytestmark = needs_rtx
ROOT = Path(__file__).resolve().parents[3]
BUILD = (
    "import sys; from pathlib import Path; from engines.tensorrt.compiler import Request, compile_onnx; "
    "print(compile_onnx(Request(Path(sys.argv[1]))))"
)


def test_an_engine_comes_with_its_kernels(tmp_path: Path) -> None:
    result = compile_onnx(Request(saved(conv_model(), tmp_path / "m.onnx"), capabilities=((8, 9),)))
    assert isinstance(result, Compiled)
    assert len(result.engine) > 32 * 32 * 9
    assert result.table.integer_nodes(["layer3/Conv"]) == ("layer3/Conv",)
    assert result.table.fixed


def test_phases_are_heard_of_while_it_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.tensorrt.compiler.LOOK_SECONDS", 0.001)
    phases: list[str] = []
    compile_onnx(Request(saved(conv_model(), tmp_path / "m.onnx")), phases.append)
    assert "Building engine from subgraph" in phases


def test_open_sizes_need_a_range(tmp_path: Path) -> None:
    path = saved(open_model(), tmp_path / "m.onnx")
    refusal = compile_onnx(Request(path))
    assert isinstance(refusal, Refusal)
    assert "give every open size with --shapes" in refusal.text()
    result = compile_onnx(Request(path, {"x": ShapeRange((1, 4, 32), (2, 4, 32), (4, 4, 32))}))
    assert isinstance(result, Compiled)
    assert not result.table.fixed


@pytest.mark.parametrize("by", REFUSED)
def test_a_refusal_says_who_where_and_why(by: str, tmp_path: Path) -> None:
    build, message = REFUSED[by]
    refusal = compile_onnx(Request(saved(build(), tmp_path / "m.onnx")))
    assert isinstance(refusal, Refusal)
    assert refusal.by == by
    assert message in refusal.text()
    assert "CUDA" not in refusal.text()
    assert "\n" not in refusal.text()


def test_a_process_that_the_system_ends_had_no_memory() -> None:
    text = Refusal("crash", (), (), status=-signal.SIGKILL).text()
    assert text == "the system ended the builder, as it does where memory runs out: use a machine with more"


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk; it meets the log or the engine."""
    path = saved(conv_model(), tmp_path / "m.onnx")
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000)); {BUILD}"
    result = subprocess.run(
        [sys.executable, "-c", limited, str(path)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.stderr.splitlines()[-1].startswith("dmq_export.errors.DmqError: TensorRT-RTX cannot compile")
    assert "File too large" in result.stderr.splitlines()[-1]


def test_libraries_that_do_not_load_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken" / "tensorrt_rtx").mkdir(parents=True)
    (tmp_path / "broken" / "tensorrt_rtx" / "__init__.py").write_text("raise ImportError('libcuda is not there')")
    monkeypatch.syspath_prepend(tmp_path / "broken")
    with pytest.raises(DmqError, match="it does not load: libcuda is not there"):
        compile_onnx(Request(saved(conv_model(), tmp_path / "m.onnx")))


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_the_builder_ends_with_its_parent(how: signal.Signals, tmp_path: Path) -> None:
    path = saved(conv_model(), tmp_path / "m.onnx")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", BUILD, str(path)], env=environment) as parent:
        within(lambda: any(scratch.glob("dmq-trt-*/log.jsonl")))
        parent.send_signal(how)
    within(lambda: not any(scratch.iterdir()))


def within(condition: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
