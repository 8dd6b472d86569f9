"""Columns rounded one after another, by PyTorch and by the GPU's kernel, against the sums written out.

Where there is no GPU, Triton's interpreter runs the kernel (conftest.py).
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from calib.fit.column_rounding import round_columns, why_no_kernel
from calib.quant.fake_quant import QParams

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the kernel is written in Triton")
ROOT = Path(__file__).resolve().parents[3]
CASES = st.tuples(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 35), st.integers(3, 8))


def run_kernel(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from calib.fit.column_rounding_triton import run_kernel

    return run_kernel(*arguments)


BOTH = [round_columns, pytest.param(run_kernel, marks=needs_triton)]


def drawn(seed: int, rows: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, QParams]:
    """Numbers of few digits, so that float32 adds them without an error and many lie halfway between two codes."""
    rng = np.random.default_rng(seed)

    def some(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, high, shape).astype(np.float32)).to(DEVICE)

    target, reference = some(-40, 40, rows, outputs) / 8, some(-40, 40, rows, outputs) / 8
    feedback = some(-2, 3, rows, rows) / 2
    return target, reference, feedback, QParams(some(1, 3, rows, outputs) / 4, some(0, 9, rows, outputs))


def written_out(
    target: np.ndarray, reference: np.ndarray, feedback: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    codes, errors = np.zeros_like(target), np.zeros_like(target)
    for k, o in np.ndindex(*target.shape):
        value = target[k, o] + sum(errors[j, o] * feedback[j, k] for j in range(k))
        codes[k, o] = min(max(np.rint(value / scale[k, o]) + zero[k, o], 0), 2**bits - 1)
        errors[k, o] = reference[k, o] - scale[k, o] * (codes[k, o] - zero[k, o])
    return codes, errors


@pytest.mark.parametrize("rounding", BOTH)
@settings(deadline=None, max_examples=25)
@given(CASES)
def test_codes_and_errors_are_those_written_out(rounding, case: tuple[int, int, int, int]) -> None:
    seed, rows, outputs, bits = case
    target, reference, feedback, qparams = drawn(seed, rows, outputs)
    arrays = [values.double().cpu().numpy() for values in (target, reference, feedback, *qparams)]
    codes, errors = rounding(target, reference, feedback, qparams, bits)
    expected_codes, expected_errors = written_out(*arrays, bits)
    np.testing.assert_array_equal(codes.cpu(), expected_codes)
    np.testing.assert_array_equal(errors.cpu(), expected_errors)


@pytest.mark.parametrize("rounding", BOTH)
def test_what_is_far_out_of_range_is_clipped(rounding) -> None:
    target = torch.tensor([[1e30, -1e30, 1e8, -1e8]], device=DEVICE)
    one = torch.ones_like(target)
    codes, _ = rounding(target, target, torch.zeros(1, 1, device=DEVICE), QParams(one, 8 * one), 4)
    assert codes.tolist() == [[15, 0, 15, 0]]


@pytest.mark.parametrize("rounding", BOTH)
def test_nothing_given_is_changed(rounding) -> None:
    given_ = drawn(0, 5, 4)
    kept = [values.clone() for values in (*given_[:3], *given_[3])]
    rounding(*given_, 4)
    assert all(torch.equal(one, other) for one, other in zip(kept, (*given_[:3], *given_[3]), strict=True))


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from calib.fit.column_rounding_triton import WIDTH, _kernel
types = dict.fromkeys(_kernel.arg_names[:7], "*fp32") | {"rows": "i32", "outputs": "i32", "top": "fp32"}
source = triton.compiler.ASTSource(
    fn=_kernel,
    signature=types | {"ROWS": "constexpr", "WIDTH": "constexpr"},
    constexprs={"ROWS": 64, "WIDTH": WIDTH},
)
for capability in (80, 90):
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    print(capability, len(made.asm["cubin"]) > 1000, "div.rn.f32" in made.asm["ptx"])
"""


@needs_triton
def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path)}
    (tmp_path / "compile.py").write_text(COMPILE)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "compile.py")], env=environment, check=True, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["80 True True", "90 True True"]


@pytest.fixture
def asked_anew() -> Iterator[None]:
    why_no_kernel.cache_clear()
    yield
    why_no_kernel.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU that is not there must not work")
@pytest.mark.usefixtures("asked_anew")
def test_what_keeps_the_kernel_from_running_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert why_no_kernel() is None  # nobody wants it here
    why_no_kernel.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reason = why_no_kernel()
    assert reason
    assert "\n" not in reason


@pytest.mark.usefixtures("asked_anew")
def test_a_full_gpu_does_not_choose_another_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "ones", full)
    with pytest.raises(torch.OutOfMemoryError):
        why_no_kernel()
