"""Every TensorRT, Polygraphy and CUDA name, enum member and argument our code uses exists in NVIDIA's own bindings.

The names come from our code itself: mypy reads it against stubs of the real modules, of the oldest TensorRT we take
and of the newest 10 and 11 known to work, and of the TensorRT-RTX that is installed, which has its own names besides.
No GPU is involved; what they then compute is another matter.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from nvidia import ROOT, Bindings, installed_rtx, unpack_bindings, uses_of_nvidia

RELEASES = {  # TensorRT, and the CUDA that comes with it
    "tensorrt-cu12-bindings==10.9.0.34": "cuda-bindings==12.8.0",
    "tensorrt-cu13-bindings==10.16.1.11": "cuda-bindings==13.0.0",
    "tensorrt-cu13-bindings==11.4.0.106": "cuda-bindings==13.5.0",
}
MISTAKES = [
    # file, what is there, what a slip makes of it, what the complaint must name
    ("tensorrt/build.py", "strongly_typed=True", "strong_typed=True", "strong_typed"),
    ("tensorrt/build.py", "MemoryPoolType.WORKSPACE", "MemoryPoolType.WORKSPCE", "WORKSPCE"),
    ("tensorrt/build.py", "LayerInformationFormat.JSON", "LayerInformationFormat.Json", "Json"),
    ("tensorrt/build.py", "profile.add(name, min=", "profile.add(name, low=", "low"),
    ("tensorrt/build.py", "save_timing_cache=cache", "timing_cache=cache", "timing_cache"),
    ("tensorrt/runtime.py", "engine_host_code_allowed", "engine_hostcode_allowed", "engine_hostcode_allowed"),
    ("tensorrt/runtime.py", "cuda_engine(content)", "cuda_engine()", "deserialize_cuda_engine"),
    ("tensorrt/runtime.py", "TensorIOMode.OUTPUT", "TensorIOMode.OUTPUTS", "OUTPUTS"),
    ("tensorrt/runtime.py", "ILogger.INTERNAL_ERROR", "ILogger.FATAL", "FATAL"),
    ("tensorrt/runtime.py", "refit_from_file", "refit_from_path", "refit_from_path"),
    ("tensorrt/engine.py", "execute_async_v3", "execute_async_v4", "execute_async_v4"),
    ("tensorrt/engine.py", "set_tensor_address(name, ", "set_tensor_address(", "set_tensor_address"),
    ("tensorrt/cuda.py", "cudaMemcpyHostToDevice", "cudaMemcpyHostToDevices", "cudaMemcpyHostToDevices"),
    ("tensorrt/cuda.py", "cudaGraphInstantiate(graph, 0)", "cudaGraphInstantiate(graph)", "cudaGraphInstantiate"),
]
RTX_MISTAKES = [
    *MISTAKES,
    ("tensorrt/environment.py", "rtx.ComputeCapability", "rtx.ComputeCapabilities", "ComputeCapabilities"),
    ("tensorrt/engine.py", "context(cache.config)", "context(cache)", "RuntimeCache"),
    ("tensorrt/runtime_cache.py", "config.cuda_graph_strategy", "config.graph_strategy", "graph_strategy"),
    ("tensorrt/runtime_cache.py", "WHOLE_GRAPH_CAPTURE", "WHOLE_CAPTURE", "WHOLE_CAPTURE"),
    ("tensorrt/runtime_cache.py", "Strategy.EAGER", "Strategy.ALWAYS", "ALWAYS"),
    ("tensorrt/runtime_cache.py", "create_runtime_cache", "create_cache", "create_cache"),
    ("tensorrt/runtime_cache.py", "config.set_runtime_cache", "config.set_cache", "set_cache"),
    ("tensorrt/runtime_cache.py", "_cache.deserialize(", "_cache.load(", "load"),
    ("tensorrt/runtime_cache.py", "_cache.serialize()", "_cache.dump()", "dump"),
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=RELEASES)
def bindings(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    return unpack_bindings(request.param, RELEASES[request.param], tmp_path_factory.mktemp("bindings"))


@pytest.fixture(scope="module")
def rtx(tmp_path_factory: pytest.TempPathFactory) -> Bindings:
    return installed_rtx("cuda-bindings==13.5.0", tmp_path_factory.mktemp("rtx"))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Our code, to be spoilt."""
    for package in ("engines", "dmq_export"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("models", "__pycache__"))
    return tmp_path


def test_every_module_that_uses_them_is_read() -> None:
    names = {path.name for path in uses_of_nvidia(ROOT / "engines")}
    assert {"build.py", "cuda.py", "engine.py", "environment.py", "runtime.py", "runtime_cache.py"} <= names


def test_every_name_and_argument_exists(bindings: Bindings) -> None:
    assert bindings.mypy(ROOT) == []


def test_our_settings_reach_the_builder_through_polygraphy(bindings: Bindings, tmp_path: Path) -> None:
    probe = str(ROOT / "tests" / "support" / "trt_probe.py")
    report = json.loads(bindings.python(probe, str(tmp_path / "cache")).stdout.splitlines()[-1])
    assert report["version"] == bindings.version
    assert report["flags"] == ["REFIT", "STRIP_PLAN", "VERSION_COMPATIBLE"]
    assert (report["number of flags"], report["plain flags"]) == (3, 0)
    assert (report["level"], report["workspace"]) == (4, ["WORKSPACE", 2**30])
    assert report["verbosity"] == "DETAILED"
    assert report["strongly typed"] is True
    assert (report["plan"], report["cache"]) == ("plan", "timings")
    assert "layer conv_in: a scale of 0 or below: leave it float: calibrate --float-layer conv_in" in report["refusal"]
    assert report["hardware levels"] == ["NONE", "SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS"]


def test_every_slip_is_noticed(bindings: Bindings, copy: Path) -> None:
    assert unnoticed(bindings, copy, MISTAKES) == []


def test_every_name_and_argument_exists_in_tensorrt_rtx(rtx: Bindings) -> None:
    assert rtx.mypy(ROOT) == []


def test_every_slip_is_noticed_in_tensorrt_rtx(rtx: Bindings, copy: Path) -> None:
    assert unnoticed(rtx, copy, RTX_MISTAKES) == []


def unnoticed(bindings: Bindings, copy: Path, mistakes: list[tuple[str, str, str, str]]) -> list[str]:
    """What of ``mistakes``, all made in ``copy``, is not complained of."""
    for name, right, wrong, _ in mistakes:
        path = copy / "engines" / name
        assert right in path.read_text()
        path.write_text(path.read_text().replace(right, wrong))
    lines = bindings.mypy(copy)
    return [
        complaint
        for name, _, _, complaint in mistakes
        if not any(line.startswith(f"engines/{name}:") and f'"{complaint}"' in line for line in lines)
    ]
