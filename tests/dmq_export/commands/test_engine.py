"""Every format and backend under one contract, and what is refused before anything runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from host_gpu import on_host_memory, plan_for

from dmq_export.batch import Batch
from dmq_export.checkpoint import Checkpoint
from dmq_export.commands import engine as engines
from dmq_export.commands.engine import Backend, Execution, float_engine, open_engine
from dmq_export.commands.sampler import SampleSettings, draw_samples
from dmq_export.commands.verify import DRIFT_FACTOR, PERTURBATION, PERTURBED_RUNS
from dmq_export.common.bundled import BUNDLED
from dmq_export.common.progress import Progress
from dmq_export.errors import DmqError
from dmq_export.graph.compare import TOLERANCE, rms_ratio
from dmq_export.graph.onnx_file import metadata_of
from engines.tensorrt.plan_file import Runtime

ROOT = Path(__file__).resolve().parents[3]
BACKENDS = {"onnxruntime": "tiny_onnx", "openvino": "tiny_onnx", "torch": "tiny_checkpoint_folder"}
SAMPLE = np.random.default_rng(0).standard_normal((2, 1, 8, 8), np.float32)
LABELS = np.array([0, 2])


@pytest.mark.parametrize(("backend", "fixture"), BACKENDS.items())
def test_the_contract(backend: str, fixture: str, request: pytest.FixtureRequest) -> None:
    engine = open_engine(request.getfixturevalue(fixture), Execution(backend))
    assert engine.backend == backend
    assert engine.name == "w4a8"
    assert engine.metadata.steps == 3
    assert engine.metadata.timesteps == (67, 34, 1)
    prediction = engine.denoise(SAMPLE, 67.0, class_labels=LABELS)
    assert prediction.shape == SAMPLE.shape
    assert prediction.dtype == np.float32
    again = engine.denoise(SAMPLE, 67.0, class_labels=LABELS)
    np.testing.assert_array_equal(again, prediction)
    assert again is not prediction
    assert not np.shares_memory(again, prediction)  # a solver of higher order keeps earlier predictions


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_prediction_is_the_references_up_to_rounding_ties(
    backend: str, tiny_onnx: Path, tiny_checkpoint: Checkpoint
) -> None:
    """The rule of docs/arithmetic.md: as far as the reference drifts from itself, or as quantization went."""
    from calib.model.fake_quantized import load_fake_quantized, perturbed

    engine = open_engine(tiny_onnx, Execution(backend))
    reference, probe = load_fake_quantized(tiny_checkpoint, torch.device("cpu")), tiny_checkpoint.probe
    conditioning = {name: torch.from_numpy(value) for name, value in probe.conditioning.items()}
    for step, timestep in enumerate(probe.timesteps):
        sample = torch.from_numpy(probe.sample[step])
        expected = reference(sample, timestep, **conditioning).numpy()
        others = []
        for run in range(PERTURBED_RUNS):
            with perturbed(reference, PERTURBATION["float32"], seed=run):
                others.append(rms_ratio(reference(sample, timestep, **conditioning).numpy() - expected, expected))
        quantization = rms_ratio(expected - probe.prediction[step], expected)
        drift = rms_ratio(
            engine.denoise(probe.sample[step], float(timestep), **probe.conditioning) - expected, expected
        )
        assert drift <= max(DRIFT_FACTOR * max(others), quantization) + TOLERANCE


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_the_same_seed_gives_the_references_samples(
    backend: str, tiny_model: Path, tiny_onnx: Path, tiny_checkpoint_folder: Path
) -> None:
    """Closer to them than the float model's are, by far: what differs is what flips at rounding ties."""
    settings = SampleSettings(count=8, seed=5)
    reference = open_engine(tiny_checkpoint_folder)
    expected = draw_samples(reference, settings, Progress(show=False))
    drawn = draw_samples(open_engine(tiny_onnx, Execution(backend)), settings, Progress(show=False))
    quantization = draw_samples(float_engine(str(tiny_model), reference), settings, Progress(show=False)) - expected
    assert np.sqrt(np.square(drawn - expected).mean()) < 0.5 * np.sqrt(np.square(quantization).mean())


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_graph_of_fixed_batch_takes_any(backend: str, tiny_fixed_onnx: Path) -> None:
    engine = open_engine(tiny_fixed_onnx, Execution(backend, threads=1))
    assert engine.metadata.batch == Batch(4, 4, 4)
    rng = np.random.default_rng(0)
    sample, labels = rng.standard_normal((6, 1, 8, 8), np.float32), np.arange(6) % 3

    def denoise(rows: list[int]) -> np.ndarray:
        return engine.denoise(sample[rows], 67.0, class_labels=labels[rows])

    expected = np.concatenate([denoise([0, 1, 2, 3]), denoise([4, 5, 5, 5])[:2]])
    np.testing.assert_array_equal(denoise([0, 1, 2, 3, 4, 5]), expected)
    np.testing.assert_array_equal(denoise([4, 5]), expected[4:])


def test_a_graph_of_fixed_batch_draws_what_one_of_any_batch_draws(tiny_onnx: Path, tiny_fixed_onnx: Path) -> None:
    """Ten samples in batches of four; with guidance each is of eight rows, twice what the graph takes."""
    for settings in (SampleSettings(count=10), SampleSettings(count=3, null_label=2, guidance_scale=2.0)):
        fixed, free = (open_engine(path, Execution(threads=1)) for path in (tiny_fixed_onnx, tiny_onnx))
        assert settings.sized(fixed.metadata).batch == 4
        assert settings.sized(free.metadata).batch == 32
        expected = draw_samples(free, replace(settings, batch=4), Progress(show=False))
        drawn = draw_samples(fixed, settings, Progress(show=False))
        # another batch may sum in another order and flip a few codes
        assert np.abs(drawn - expected).mean() < 0.05 * expected.std()


def test_auto_takes_what_the_file_was_exported_for(tiny_onnx: Path, tmp_path: Path) -> None:
    assert open_engine(tiny_onnx).backend == "onnxruntime"
    model = onnx.load(tiny_onnx)
    metadata = json.loads(model.metadata_props[0].value)
    model.metadata_props[0].value = json.dumps(metadata | {"target": "openvino"})
    onnx.save(model, tmp_path / "ov.onnx")
    assert open_engine(tmp_path / "ov.onnx").backend == "openvino"
    assert open_engine(tmp_path / "ov.onnx", Execution("onnxruntime")).backend == "onnxruntime"


def test_auto_takes_what_is_installed(tiny_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: name == "openvino" or None)
    assert open_engine(tiny_onnx).backend == "openvino"
    with pytest.raises(DmqError, match=r"onnxruntime, which is not installed: pip install 'dmq-export\[onnxruntime\]'"):
        open_engine(tiny_onnx, Execution("onnxruntime"))
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    with pytest.raises(DmqError, match="runs on onnxruntime, which is not installed"):
        open_engine(tiny_onnx)


def test_threads_are_taken(tiny_onnx: Path, tiny_checkpoint_folder: Path) -> None:
    for backend, path in (
        ("onnxruntime", tiny_onnx),
        ("openvino", tiny_onnx),
        ("torch", tiny_checkpoint_folder),
    ):
        engine = open_engine(path, Execution(backend, threads=1))
        assert engine.denoise(SAMPLE, 67.0, class_labels=LABELS).shape == SAMPLE.shape
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("execution", "message"),
    [
        ({"backend": "torch"}, "runs on onnxruntime or openvino, not on torch"),
        ({"backend": "tensorrt"}, "runs on onnxruntime or openvino, not on tensorrt"),
        ({"backend": "tpu"}, "no backend is called 'tpu': one of auto, tensorrt"),
        ({"threads": 0}, "0 threads: at least 1"),
        ({"backend": "openvino", "provider": "cpu"}, "--provider cpu was asked for, but .* runs on openvino, which"),
        ({"provider": "tpu"}, "no provider tpu: cpu, cuda, tensorrt, tensorrt-rtx are known"),
        ({"backend": "tensorrt-rtx"}, "runs on onnxruntime or openvino, not on tensorrt-rtx"),
    ],
)
def test_what_cannot_run_it_is_refused(tiny_onnx: Path, execution: dict[str, object], message: str) -> None:
    with pytest.raises(DmqError, match=message):
        open_engine(tiny_onnx, Execution(**execution))


def test_a_checkpoint_runs_on_torch_alone(tiny_checkpoint_folder: Path) -> None:
    assert open_engine(tiny_checkpoint_folder, Execution(provider="cpu")).backend == "torch"
    with pytest.raises(DmqError, match=r"PyTorch .* has no provider tensorrt here: cpu"):
        open_engine(tiny_checkpoint_folder, Execution(provider="tensorrt"))
    with pytest.raises(DmqError, match="runs on torch, not on onnxruntime"):
        open_engine(tiny_checkpoint_folder, Execution("onnxruntime"))


def test_a_plan_that_cannot_run_here_is_one_line(tmp_path: Path) -> None:
    plan = tmp_path / "model.plan"
    plan.write_bytes(b"no plan")
    with pytest.raises(DmqError, match=r"TensorRT|engine.json") as raised:
        open_engine(plan)
    assert "\n" not in str(raised.value)
    with pytest.raises(DmqError, match="runs on tensorrt or tensorrt-rtx, not on openvino"):
        open_engine(plan, Execution("openvino"))


@pytest.mark.parametrize(("runtime", "other"), [("tensorrt", "tensorrt-rtx"), ("tensorrt-rtx", "tensorrt")])
def test_a_plan_runs_on_what_it_was_built_for(
    runtime: Runtime, other: Backend, tiny_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU made of host memory; a stand-in, because this needs a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    given = metadata_of(onnx_ir.load(tiny_onnx))
    plan, notes = plan_for(runtime, tmp_path / "model.plan", metadata=given), []
    on_host_memory(monkeypatch)
    for backend in ("auto", runtime):
        engine = open_engine(plan, Execution(backend), notes.append)
        assert (engine.backend, engine.name, engine.metadata.steps) == (runtime, "w4a8", 3)
    with pytest.raises(DmqError, match=f"model.plan runs on {runtime}, not on {other}"):
        open_engine(plan, Execution(other))
    with pytest.raises(DmqError, match=f"--provider cuda was asked for, but .* runs on {runtime}, which has none"):
        open_engine(plan, Execution(provider="cuda"))


def test_what_is_no_engine_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.onnx", ROOT / "README.md"):
        with pytest.raises(DmqError, match=re.escape(f"{path} is no engine: give an .onnx file, a .plan, or a DMQ")):
            open_engine(path)


def test_a_float_model_of_another_shape_is_refused(tiny_onnx: Path) -> None:
    engine = open_engine(tiny_onnx)
    other = replace(engine, metadata=replace(engine.metadata, config={**engine.metadata.config, "sample_size": 4}))
    with pytest.raises(DmqError, match=r"digits makes samples of \(1, 16, 16\), the engine of \(1, 4, 4\)"):
        float_engine(str(BUNDLED / "digits"), other)


DEPLOYED = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))
from pathlib import Path
import numpy as np
from dmq_export.metadata import read_metadata
from dmq_export.sampling.noise import initial_noise
from dmq_export.sampling.loop import sample
from dmq_export.denoiser.config import sample_shape
from dmq_export.sampling.ddim import Ddim, DdimSettings
from dmq_export.graph.onnx_metadata import onnx_metadata
from engines.{module} import {denoiser}

path = Path({path!r})
metadata = read_metadata(onnx_metadata(path), path)
ddim = Ddim(DdimSettings.from_config(metadata.scheduler), metadata.steps)
noise = initial_noise(sample_shape(metadata.config), range(5), seed=3)
samples = sample({denoiser}(path, threads=1), noise, ddim, {{"class_labels": np.arange(5) % 3}})
np.save({output!r}, samples)
"""


@pytest.mark.parametrize(
    ("module", "denoiser", "other"),
    [("onnxruntime", "OnnxRuntimeDenoiser", "openvino"), ("openvino", "OpenVinoDenoiser", "onnxruntime")],
)
def test_an_engine_is_deployable_with_numpy_and_its_runtime_alone(
    module: str, denoiser: str, other: str, tiny_onnx: Path, tmp_path: Path
) -> None:
    """Everything else that the package depends on is made impossible to import."""
    ours = "torch diffusers onnx onnx_ir onnxscript safetensors PIL tqdm click polygraphy"
    blocked = [*ours.split(), other]
    output = tmp_path / "samples.npy"
    code = DEPLOYED.format(blocked=blocked, module=module, denoiser=denoiser, path=str(tiny_onnx), output=str(output))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    engine = open_engine(tiny_onnx, Execution(module, threads=1))
    expected = draw_samples(engine, SampleSettings(count=5, seed=3), Progress(show=False))
    np.testing.assert_array_equal(np.load(output), expected)


def test_the_example_of_the_docs_runs(tiny_onnx: Path, tmp_path: Path) -> None:
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/engines.md").read_text(), re.S)
    shutil.copy(tiny_onnx, tmp_path / "model.onnx")
    block = "import sys; sys.modules.update(dict.fromkeys(['torch', 'diffusers', 'onnx', 'PIL', 'tqdm', 'click']))"
    code = f"{block}\n{example}\nassert samples.shape == (8, 1, 8, 8)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True)
