"""What :mod:`engines.tensorrt.compiler` runs in a process of its own.

Reads ``request.json`` in the folder; leaves ``engine`` and ``log.jsonl`` there, ``phase`` while it builds, and
``result.json`` once it comes to an end by itself. It ends when its standard input does. It is a process of its own
because the compiler can crash, and because Polygraphy takes TensorRT or TensorRT-RTX once and for all when it is
imported.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = {"tensorrt-rtx": "tensorrt_rtx"}


def main(folder: Path) -> None:
    """Do what the request in ``folder`` asks for."""
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(request["runtime"] == "tensorrt-rtx"))
    try:
        trt = import_module(MODULES[request["runtime"]])
        with (folder / "log.jsonl").open("w", encoding="utf-8", buffering=1) as stream:
            result = _compile(trt, request, _logger(trt, stream), folder)
        _leave(folder, result)
    except ImportError as error:
        _leave(folder, {"problem": f"it does not load: {str(error).splitlines()[0]}"})
    except OSError as error:
        for name in ("engine", "log.jsonl"):  # on a full disk, room for the reason
            (folder / name).unlink(missing_ok=True)
        _leave(folder, {"problem": f"{error.strerror or error} ({folder.parent}): name another folder with TMPDIR"})


def _leave(folder: Path, result: dict[str, Any]) -> None:
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _end_with_parent(folder: Path) -> None:
    """However the parent ends, its end of the pipe closes, and nobody waits for an engine any more."""
    os.read(0, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _logger(trt: Any, stream: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, unused-ignore]
        """Writes each line at once: after a crash it is all there is."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            stream.write(json.dumps([str(severity).rpartition(".")[2], text]) + "\n")

    return Logger()


def _monitor(trt: Any, folder: Path) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, unused-ignore]
        """Leaves the name of the builder's current phase where the parent looks for it."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._root = ""

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self._root = self._root or phase
            if self._root in (phase, parent):  # those within are named after what they do on a GPU
                _say(folder, phase)

        def phase_finish(self, phase: str) -> None:
            pass

        def step_complete(self, phase: str, step: int) -> bool:
            return True

    return Monitor()


def _say(folder: Path, phase: str) -> None:
    with suppress(OSError):  # nothing that an engine depends on
        (folder / "phase").write_text(phase, encoding="utf-8")


def _compile(trt: Any, request: dict[str, Any], logger: Any, folder: Path) -> dict[str, Any]:
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    _say(folder, "Parsing the graph")
    parsed = parser.parse_from_file(request["onnx"])
    errors = [_error(parser.get_error(index)) for index in range(parser.num_errors)]
    if not parsed or request["parse_only"]:
        return {"version": trt.__version__, "errors": errors}
    config = _config(trt, request)(builder, network)
    config.progress_monitor = monitor = _monitor(trt, folder)  # which must outlive the build
    engine = builder.build_serialized_network(network, config)
    del monitor
    if engine is not None:
        (folder / "engine").write_bytes(engine)
    return {"version": trt.__version__, "errors": errors}


def _error(error: Any) -> dict[str, str]:
    return {
        "node": error.node_name(),
        "operator": error.node_operator(),
        "text": error.desc(),
        "code": str(error.code()).rpartition(".")[2],
    }


def _config(trt: Any, request: dict[str, Any]) -> Any:
    """Polygraphy's loader of the builder's configuration."""
    from polygraphy.backend.tensorrt_rtx import CreateConfigRTX
    from polygraphy.backend.trt import Profile

    profile = Profile()
    for name, (minimum, optimum, maximum) in request["shapes"].items():
        profile.add(name, min=minimum, opt=optimum, max=maximum)
    return CreateConfigRTX(
        profiles=[profile] if request["shapes"] else [],
        compute_capabilities=[tuple(pair) for pair in request["capabilities"]] or None,
        profiling_verbosity=trt.ProfilingVerbosity.DETAILED,
    )
