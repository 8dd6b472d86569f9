"""A plan as an engine: what is refused here, on any machine, and how it runs, on a GPU made of host memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from host_gpu import CONTENT, SHAPES, HostEngine, on_host_memory, plan_for

from dmq_export.cli import main
from dmq_export.errors import DmqError
from engines.tensorrt import engine as engine_module
from engines.tensorrt.engine import TensorRtDenoiser, _require_inputs
from engines.tensorrt.environment import missing_to_run
from engines.tensorrt.plan_file import Runtime, metadata_path
from engines.tensorrt.runtime_cache import cache_path


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> HostEngine:
    """Everything behind the checks."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    return on_host_memory(monkeypatch)


def samples(count: int) -> np.ndarray:
    return np.random.default_rng(count).standard_normal((count, 3), np.float32)


def test_inputs_must_be_those_of_the_plan() -> None:
    one = np.zeros(1)
    _require_inputs({"sample": one, "timestep": one}, SHAPES)
    with pytest.raises(DmqError, match="input timestep is missing: the plan takes sample, timestep"):
        _require_inputs({"sample": one}, SHAPES)
    with pytest.raises(DmqError, match="input labels is unknown: the plan takes sample, timestep"):
        _require_inputs({"sample": one, "timestep": one, "labels": one}, SHAPES)


@pytest.mark.parametrize(("runtime", "title"), [("tensorrt", "TensorRT"), ("tensorrt-rtx", "TensorRT-RTX")])
def test_where_it_cannot_run_one_line_says_what_is_missing(tmp_path: Path, runtime: Runtime, title: str) -> None:
    if not missing_to_run(runtime):
        pytest.skip(f"this machine has {title} and a GPU")
    with pytest.raises(DmqError, match=f"{title} cannot run here: .*: ") as caught:
        TensorRtDenoiser(plan_for(runtime, tmp_path / "model.plan"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_the_commands_say_it_on_one_line_too(tmp_path: Path, runtime: Runtime) -> None:
    if not missing_to_run(runtime):
        pytest.skip("this machine has a GPU")
    plan = str(plan_for(runtime, tmp_path / "model.plan"))
    sample = ["sample", plan, "-o", str(tmp_path / "samples.png")]
    for arguments in (sample, [*sample, "--backend", runtime], ["bench", plan], ["bench", f"{runtime}:{plan}"]):
        result = CliRunner().invoke(main, arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.startswith("Error: TensorRT")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "samples.png").exists()


def test_a_plan_that_nothing_vouches_for_is_refused_first(tmp_path: Path) -> None:
    path = plan_for("tensorrt-rtx", tmp_path / "model.plan")
    metadata_path(path).unlink()
    with pytest.raises(DmqError, match=r"has no model\.engine\.json beside it"):
        TensorRtDenoiser(path)


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_a_changed_plan_is_never_deserialized(
    tmp_path: Path, runtime: Runtime, host: HostEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = plan_for(runtime, tmp_path / "model.plan")
    path.write_bytes(CONTENT + b"!")
    monkeypatch.setattr(engine_module, "deserialize", lambda content, **rest: pytest.fail("it was deserialized"))
    with pytest.raises(DmqError, match="it was changed or replaced"):
        TensorRtDenoiser(path)


def test_a_gpu_that_it_was_not_built_for_is_named(tmp_path: Path, host: HostEngine) -> None:
    path = plan_for("tensorrt-rtx", tmp_path / "model.plan", capabilities=("8.6", "12.0"))
    with pytest.raises(DmqError, match=r"for compute capability 8\.6, 12\.0, NVIDIA GeForce RTX 4070 has 8\.9"):
        TensorRtDenoiser(path)


@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_batches_of_any_size_run(tmp_path: Path, runtime: Runtime, host: HostEngine) -> None:
    """Within the plan's range, beyond it, and again; a prediction is not overwritten by the next."""
    denoise = TensorRtDenoiser(plan_for(runtime, tmp_path / "model.plan"))
    predictions = [(samples(count), denoise(samples(count), 5.0)) for count in (2, 2, 1, 6)]
    for sample, prediction in predictions:
        np.testing.assert_array_equal(prediction, 2 * sample)
        assert prediction.dtype == np.float32


def test_tensorrt_is_recorded_by_us_and_rtx_records_itself(tmp_path: Path, host: HostEngine) -> None:
    import tensorrt_rtx as rtx

    for runtime, launches in (("tensorrt", 3), ("tensorrt-rtx", 0)):
        host.cuda.launches = host.runs = 0
        denoise = TensorRtDenoiser(plan_for(runtime, tmp_path / "model.plan"))  # type: ignore[arg-type]
        for _ in range(3):
            denoise(samples(2), 5.0)
        assert (host.cuda.launches, host.runs) == (launches, 4)  # the first warms up
    assert host.config.cuda_graph_strategy == rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    strategy = host.config.dynamic_shapes_kernel_specialization_strategy
    assert strategy == rtx.DynamicShapesKernelSpecializationStrategy.EAGER
    host.engine.create_execution_context.assert_called_with(host.config)


def test_compiled_kernels_are_kept_and_given_back(tmp_path: Path, host: HostEngine) -> None:
    path = plan_for("tensorrt-rtx", tmp_path / "model.plan")
    TensorRtDenoiser(path)(samples(2), 5.0)
    host.cache.deserialize.assert_not_called()
    host.config.set_runtime_cache.assert_called_once_with(host.cache)
    kept = cache_path(path).read_bytes()
    TensorRtDenoiser(path)(samples(2), 5.0)
    host.cache.deserialize.assert_called_once_with(b"kernels")
    assert cache_path(path).read_bytes() == kept


def test_what_the_runtime_logs_explains_why_it_does_not_start(tmp_path: Path, host: HostEngine) -> None:
    def fails(stream: int) -> bool:
        denoise._log.append("[E] Error Code 1: Cuda Runtime (out of memory)")
        return False

    denoise = TensorRtDenoiser(plan_for("tensorrt-rtx", tmp_path / "model.plan"))
    host.context.execute_async_v3.side_effect = fails
    with pytest.raises(DmqError, match="TensorRT-RTX could not start the engine: the GPU ran out of memory"):
        denoise(samples(2), 5.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: None, r"was built without weights: give the ONNX file model\.onnx too"),
        (lambda path: path / "other.onnx", r"was not built from .*other\.onnx"),
    ],
)
def test_a_plan_without_weights_wants_its_onnx_file(
    tmp_path: Path, host: HostEngine, change: Callable[[Path], Path | None], message: str
) -> None:
    path = plan_for("tensorrt", tmp_path / "model.plan", stripped=True)
    (tmp_path / "other.onnx").write_bytes(b"other")
    with pytest.raises(DmqError, match=message):
        TensorRtDenoiser(path, change(tmp_path))
