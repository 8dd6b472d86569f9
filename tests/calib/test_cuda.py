"""What only a GPU can show of a calibration: the same bytes every time, its memory, as good as on the CPU."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from layers import linear
from models import (
    NETWORKS,
    TINY_RECIPE,
    save_small_model,
    save_tiny_model,
    save_tiny_network,
    tiny_network_recipe,
)
from torch import Tensor

import calib.calibrate
import calib.fit.column_rounding
import calib.run.stages
from calib.calibrate import calibrate, planned
from calib.fit.cuda_graph import CudaGraph
from calib.fit.gptq import gptq_codes
from calib.fit.les import LesSettings, fit_les
from calib.quant.fake_quant import QParams
from calib.record.layer_inputs import Extrema, LayerInputs
from calib.run.plan import Resources
from dmq_export.bits import Bits
from dmq_export.checkpoint import MANIFEST, TENSORS, Checkpoint
from dmq_export.common.bundled import BUNDLED
from dmq_export.common.progress import Progress
from dmq_export.errors import DmqError
from dmq_export.recipe import Recipe, recipe_from

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROOT = Path(__file__).resolve().parents[2]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GIB = 2**30
EVERY_STAGE = replace(
    TINY_RECIPE,
    samples=20,
    steps=2,
    les_iterations=8,
    timestep_alpha=20.0,
    rounding="adaround",
    round_iterations=3,
    pts_kappa=0.0,
    sensitive_share=0.3,
)


def run(model: Path, output: Path, recipe: Recipe, limits: Resources = Resources(CUDA)) -> Checkpoint:  # noqa: B008 - frozen
    return calibrate(model, output, recipe, limits, Progress(show=False))


def contents(folder: Path) -> tuple[bytes, ...]:
    return tuple((folder / name).read_bytes() for name in (MANIFEST, TENSORS))


def test_the_same_bytes_every_time_and_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model")
    run(model, tmp_path / "first", EVERY_STAGE)
    with monkeypatch.context() as now:
        now.setattr(calib.run.stages, "vote", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path / "again", EVERY_STAGE)
    run(model, tmp_path / "again", EVERY_STAGE)
    assert contents(tmp_path / "first") == contents(tmp_path / "again")


def test_two_processes_on_one_gpu_end_with_the_same_bytes_as_one(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    arguments = [
        "--samples=20",
        "--steps=2",
        "--les-iters=8",
        "--rounding=adaround",
        "--round-iters=3",
        "--device=cuda",
    ]
    for output, launcher in (
        ("alone", []),
        ("shared", ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]),
    ):
        command = ["-m", "dmq_export", "calibrate", str(model), "-o", str(tmp_path / output), *arguments]
        subprocess.run([sys.executable, *launcher, *command], env=environment, check=True, capture_output=True)
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
    assert json.loads((tmp_path / "shared" / "run.json").read_text())["peak_gpu_memory_bytes"] > 0


@pytest.mark.parametrize("bits", ["w4a8", "w4a6"])
def test_as_good_as_on_the_cpu(tmp_path: Path, bits: str) -> None:
    """Other codes, since sums are added in another order, and as small an error."""
    recipe = recipe_from("fast", bits=Bits.parse(bits), samples=32)
    found = {}
    for device in (CPU, CUDA):
        metrics = run(BUNDLED / "digits", tmp_path / device.type, recipe, Resources(device)).metrics
        found[device.type] = np.mean(metrics["prediction_sqnr_db"]["both"])
    assert found["cuda"] == pytest.approx(found["cpu"], abs=0.7)


@pytest.mark.parametrize("kind", NETWORKS)
def test_every_family_calibrates(kind: str, tmp_path: Path) -> None:
    recipe = tiny_network_recipe(kind, NETWORKS[kind]())
    assert run(save_tiny_network(kind, tmp_path / "model"), tmp_path / "out", recipe).layers


def test_the_memory_limit_is_kept_and_the_plan_is_near(tmp_path: Path) -> None:
    model = save_small_model(tmp_path / "model", sample_size=64, block_out_channels=(128,), norm_num_groups=32)
    limits, recipe = Resources(CUDA, memory=GIB), replace(TINY_RECIPE, samples=16, steps=2)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    plan = planned(model, tmp_path / "out", recipe, limits, Progress(show=False))[1]
    run(model, tmp_path / "out", recipe, limits)
    assert torch.cuda.max_memory_reserved() <= GIB
    assert 0.75 * plan.memory < torch.cuda.max_memory_allocated() < 1.25 * plan.memory


def test_a_recorded_chain_does_what_its_calls_would() -> None:
    total, weight = torch.zeros(3, device=CUDA), torch.ones(3, device=CUDA, requires_grad=True)
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.1, device=CUDA), capturable=True)
    alone = torch.ones(3, requires_grad=True)
    other = torch.optim.Adam([alone], lr=0.1)

    def step(x: Tensor) -> None:
        total.add_(x)
        optimizer.zero_grad()
        (weight * x).square().sum().backward()
        optimizer.step()

    replayed = CudaGraph(step, CUDA)
    numbers = torch.arange(1.0, 31.0).view(10, 3)
    for row in numbers:
        replayed(row.to(CUDA))
        other.zero_grad()
        (alone * row).square().sum().backward()
        other.step()
    assert total.tolist() == numbers.sum(0).tolist()
    # on a GPU Adam takes 1 - 0.999^t in float32, which loses some 1e-4 of it; a number that froze would cost 1e-2
    torch.testing.assert_close(weight.cpu(), alone, rtol=1e-3, atol=1e-4)


def test_scaling_is_fitted_as_on_the_cpu() -> None:
    """What is recorded goes on learning: some steps come up only after the recording."""
    rng = np.random.default_rng(0)
    spec = linear(parts=(24,), out_channels=16)
    x = torch.from_numpy(rng.standard_normal((512, 24, 1)).astype(np.float32))
    x[:, 3] *= 30
    weight = torch.from_numpy(rng.standard_normal((16, 24)).astype(np.float32))
    high = x.abs().amax((0, 2)).expand(1, 200, -1)
    inputs = LayerInputs(x, torch.arange(512) % 200, Extrema(-high, high))
    hyper = LesSettings(iterations=40, learning_rate=0.03, batch=64, alpha=20.0)
    on_cpu, on_gpu = (
        fit_les(spec, weight.to(device), inputs.to(device), hyper, static=False, rounding_gain=1.0, seed=0)
        for device in (CPU, CUDA)
    )
    torch.testing.assert_close(on_gpu.tau.cpu(), on_cpu.tau, rtol=0.02, atol=0)
    torch.testing.assert_close(on_gpu.step_loss.cpu(), on_cpu.step_loss, rtol=0.1, atol=1e-3)


def test_without_its_kernel_rounding_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (calib.fit.column_rounding, calib.calibrate):
        monkeypatch.setattr(module, "why_no_kernel", lambda: "no C compiler")
    assert run(save_tiny_model(tmp_path / "model"), tmp_path / "out", TINY_RECIPE).layers
    assert "Note: rounding goes without its kernel, which takes minutes more: no C compiler" in capsys.readouterr().err


def test_a_mistake_stays_one_line(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    with pytest.raises(DmqError, match="matches no layer"):
        run(model, tmp_path / "out", replace(TINY_RECIPE, float_layers=("nowhere",)))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_process_keeps_to_its_own_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = save_tiny_model(tmp_path / "model")
    run(model, tmp_path / "first", EVERY_STAGE)
    monkeypatch.setenv("LOCAL_RANK", "1")
    run(model, tmp_path / "second", EVERY_STAGE)
    if len({torch.cuda.get_device_name(number) for number in (0, 1)}) == 1:
        assert contents(tmp_path / "first") == contents(tmp_path / "second")


@pytest.mark.parametrize(("outputs", "columns"), [(448, 2016), (100, 72), (8, 130)])
def test_the_kernel_rounds_as_pytorch_does(outputs: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for sums in another order: a code that flips changes those after it, not the error of the whole."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2 * columns, columns, generator=generator) @ torch.randn(columns, columns, generator=generator)
    weight = torch.randn(outputs, columns, generator=generator).to(CUDA)
    moments = (x.T @ x).to(CUDA)
    qparams = QParams(torch.full_like(weight, 0.4), torch.full_like(weight, 8))

    def rounded() -> tuple[Tensor, float]:
        codes = gptq_codes(weight, qparams, moments, 4)
        lost = (weight - 0.4 * (codes - 8)).double()
        return codes, float((lost @ moments.double() * lost).sum())

    by_kernel, error = rounded()
    monkeypatch.setattr(calib.fit.column_rounding, "why_no_kernel", lambda: "on purpose")
    by_pytorch, expected = rounded()
    assert (by_kernel != by_pytorch).float().mean() < 0.3
    assert error == pytest.approx(expected, rel=0.03)
