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

from calib.quant.fake_quant import QParams
from calib.successive import round_successively, why_no_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="the kernel is written in Triton")
ROOT = Path(__file__).resolve().parents[1]
CASES = st.tuples(st.integers(0, 2**16), st.integers(1, 9), st.integers(1, 35), st.integers(3, 8))


def run_kernel(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    from calib.successive_kernel import run_kernel

    return run_kernel(*arguments)


BOTH = [round_successively, pytest.param(run_kernel, marks=needs_triton)]


def drawn(seed: int, rows: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, QParams]:
    """Numbers of few digits, so that float32 adds them without an error and many lie halfway between two codes."""
    rng = np.random.default_rng(seed)

    def some(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.integers(low, high, shape).astype(np.float32)).to(DEVICE)

    wanted, reference = some(-40, 40, rows, outputs) / 8, some(-40, 40, rows, outputs) / 8
    coupling = some(-2, 3, rows, rows) / 2
    return wanted, reference, coupling, QParams(some(1, 3, rows, outputs) / 4, some(0, 9, rows, outputs))


def written_out(
    wanted: np.ndarray, reference: np.ndarray, coupling: np.ndarray, scale: np.ndarray, zero: np.ndarray, bits: int
) -> tuple[np.ndarray, np.ndarray]:
    codes, lost = np.zeros_like(wanted), np.zeros_like(wanted)
    for k, o in np.ndindex(*wanted.shape):
        target = wanted[k, o] + sum(lost[j, o] * coupling[j, k] for j in range(k))
        codes[k, o] = min(max(np.rint(target / scale[k, o]) + zero[k, o], 0), 2**bits - 1)
        lost[k, o] = reference[k, o] - scale[k, o] * (codes[k, o] - zero[k, o])
    return codes, lost


@pytest.mark.parametrize("rounding", BOTH)
@settings(deadline=None, max_examples=25)
@given(CASES)
def test_codes_and_losses_are_those_written_out(rounding, case: tuple[int, int, int, int]) -> None:
    seed, rows, outputs, bits = case
    wanted, reference, coupling, qparams = drawn(seed, rows, outputs)
    arrays = [values.double().cpu().numpy() for values in (wanted, reference, coupling, *qparams)]
    codes, lost = rounding(wanted, reference, coupling, qparams, bits)
    expected_codes, expected_lost = written_out(*arrays, bits)
    np.testing.assert_array_equal(codes.cpu(), expected_codes)
    np.testing.assert_array_equal(lost.cpu(), expected_lost)


@pytest.mark.parametrize("rounding", BOTH)
def test_what_is_far_out_of_range_is_clipped(rounding) -> None:
    wanted = torch.tensor([[1e30, -1e30, 1e8, -1e8]], device=DEVICE)
    one = torch.ones_like(wanted)
    codes, _ = rounding(wanted, wanted, torch.zeros(1, 1, device=DEVICE), QParams(one, 8 * one), 4)
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
from calib.successive_kernel import WIDTH, _round_columns
types = dict.fromkeys(_round_columns.arg_names[:7], "*fp32") | {"rows": "i32", "outputs": "i32", "top": "fp32"}
source = triton.compiler.ASTSource(
    fn=_round_columns,
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
