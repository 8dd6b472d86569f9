"""ONNX Runtime as an engine: inputs are checked, errors are ours."""

from pathlib import Path

import numpy as np
import pytest

from dmq_export.errors import DmqError
from engines.ort import PROVIDERS, OnnxRuntimeDenoiser, OnnxSession, provider_problem


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    sample = np.random.default_rng(0).standard_normal((2, 1, 8, 8)).astype(np.float32)
    return {"sample": sample, "timestep": np.array(67, np.float32), "class_labels": np.array([0, 2])}


def test_outputs_come_by_name(tiny_onnx: Path, inputs: dict[str, np.ndarray]) -> None:
    outputs = OnnxSession(tiny_onnx).run(inputs)
    assert {name: value.shape for name, value in outputs.items()} == {"out_sample": (2, 1, 8, 8)}


def test_a_model_loads_from_memory_as_from_a_file(tiny_onnx: Path, inputs: dict[str, np.ndarray]) -> None:
    from_file, from_memory = OnnxSession(tiny_onnx), OnnxSession(tiny_onnx.read_bytes())
    np.testing.assert_array_equal(from_file.run(inputs)["out_sample"], from_memory.run(inputs)["out_sample"])


def test_inputs_of_another_type_are_converted(tiny_onnx: Path, inputs: dict[str, np.ndarray]) -> None:
    session = OnnxSession(tiny_onnx)
    converted = {**inputs, "timestep": np.array(67, np.int64), "class_labels": np.array([0, 2], np.int32)}
    np.testing.assert_array_equal(session.run(converted)["out_sample"], session.run(inputs)["out_sample"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_labels": None}, "input class_labels is missing: the model takes sample, timestep, class_labels"),
        ({"prompt": np.zeros(2)}, "no input 'prompt': it takes sample, timestep, class_labels"),
        ({"sample": np.zeros((1, 8, 8), np.float32)}, r"input sample has shape \[1, 8, 8\]"),
    ],
)
def test_wrong_inputs_are_named(
    tiny_onnx: Path, inputs: dict[str, np.ndarray], change: dict[str, np.ndarray | None], message: str
) -> None:
    wrong = {name: value for name, value in {**inputs, **change}.items() if value is not None}
    with pytest.raises(DmqError, match=message):
        OnnxSession(tiny_onnx).run(wrong)


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a protobuf")
    with pytest.raises(DmqError, match=rf"ONNX Runtime cannot load {path}") as raised:
        OnnxSession(path)
    assert "\n" not in str(raised.value)


def test_the_denoiser_is_the_session(tiny_onnx: Path, inputs: dict[str, np.ndarray]) -> None:
    prediction = OnnxRuntimeDenoiser(tiny_onnx)(inputs["sample"], 67.0, class_labels=inputs["class_labels"])
    np.testing.assert_array_equal(prediction, OnnxSession(tiny_onnx).run(inputs)["out_sample"])


@pytest.mark.parametrize("name", [name for name in PROVIDERS if name != "cpu"])
def test_a_provider_either_starts_or_is_refused_with_those_that_do(tiny_onnx: Path, name: str) -> None:
    problem = provider_problem(name)
    if problem is None:
        assert OnnxSession(tiny_onnx, name).output_names == ["out_sample"]
        return
    assert "\n" not in problem
    with pytest.raises(DmqError, match=f"no provider {name} here .*: .*cpu.* can be used") as raised:
        OnnxSession(tiny_onnx, name)
    assert problem in str(raised.value)


def test_a_provider_that_does_not_exist_is_refused(tiny_onnx: Path) -> None:
    with pytest.raises(DmqError, match=r"no provider tpu here \(no such provider\): cpu"):
        OnnxSession(tiny_onnx, "tpu")


def test_a_provider_that_the_build_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    assert provider_problem("cuda") == "this build of onnxruntime lacks it"
    assert provider_problem("cpu") is None


def test_nothing_falls_back_to_the_cpu_unsaid(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engines.ort.provider_problem", lambda name: None)
    if provider_problem("cuda") is None:
        pytest.skip("the CUDA provider starts here")
    with pytest.raises(DmqError, match="on its cuda provider: try --provider cpu"):
        OnnxSession(tiny_onnx, "cuda")


def test_refusing_a_provider_prints_nothing(tiny_onnx: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in PROVIDERS:
        provider_problem(name)
    assert capfd.readouterr() == ("", "")
