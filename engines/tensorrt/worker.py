"""What :mod:`engines.tensorrt.compiler` runs in a process of its own.

Reads ``request.json`` in the folder; leaves ``engine`` and ``log.jsonl`` there, and ``result.json`` once it comes to an
end by itself. It is a process of its own because the compiler can crash, and because Polygraphy takes TensorRT or
TensorRT-RTX once and for all when it is imported.
"""

from __future__ import annotations

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Any

MODULES = {"tensorrt-rtx": "tensorrt_rtx"}


def main(folder: Path) -> None:
    """Do what the request in ``folder`` asks for."""
    request = json.loads((folder / "request.json").read_text(encoding="utf-8"))
    os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = str(int(request["runtime"] == "tensorrt-rtx"))
    trt = import_module(MODULES[request["runtime"]])
    with (folder / "log.jsonl").open("w", encoding="utf-8", buffering=1) as stream:
        result = _compile(trt, request, _logger(trt, stream), folder)
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")


def _logger(trt: Any, stream: Any) -> Any:
    class Logger(trt.ILogger):  # type: ignore[misc, unused-ignore]
        """Writes each line at once: after a crash it is all there is."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            stream.write(json.dumps([str(severity).rpartition(".")[2], text]) + "\n")

    return Logger()


def _compile(trt: Any, request: dict[str, Any], logger: Any, folder: Path) -> dict[str, Any]:
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(request["onnx"])
    errors = [_error(parser.get_error(index)) for index in range(parser.num_errors)]
    if not parsed or request["parse_only"]:
        return {"version": trt.__version__, "errors": errors}
    config = _config(trt, request)(builder, network)
    engine = builder.build_serialized_network(network, config)
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
