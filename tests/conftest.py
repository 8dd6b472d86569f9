"""What many tests share: a tiny model's folder, its checkpoint, and its export, made once."""

import math
import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run in Triton's interpreter; read when Triton is first imported

from models import TINY_RECIPE, save_tiny_model

import dmq_export.common.progress
from calib.calibrate import calibrate
from calib.run.plan import Resources
from dmq_export.batch import Batch
from dmq_export.checkpoint import load_checkpoint
from dmq_export.commands.export import export_onnx
from dmq_export.common.progress import Progress

torch.set_num_threads(1)  # tiny tensors: a second thread only waits


@pytest.fixture(autouse=True)
def _a_slow_machine_says_no_more_than_a_fast_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for seconds in ("LINE_SECONDS", "SHORT"):
        monkeypatch.setattr(dmq_export.common.progress, seconds, math.inf)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("tiny-model"))


@pytest.fixture(scope="session")
def tiny_checkpoint_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read-only: copy it to change it."""
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    calibrate(tiny_model, folder, TINY_RECIPE, Resources(torch.device("cpu")), Progress(show=False))
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tiny_checkpoint_folder: Path):
    return load_checkpoint(tiny_checkpoint_folder)


@pytest.fixture(scope="session")
def tiny_onnx(tiny_checkpoint_folder: Path) -> Path:
    path = tiny_checkpoint_folder.parent / "model.onnx"
    export_onnx(tiny_checkpoint_folder, path, Progress(show=False))
    return path


@pytest.fixture(scope="session")
def tiny_fixed_onnx(tiny_checkpoint_folder: Path) -> Path:
    """The same for four samples at a time and no other number."""
    path = tiny_checkpoint_folder.parent / "four.onnx"
    export_onnx(tiny_checkpoint_folder, path, Progress(show=False), verify=False, batch=Batch(4, 4, 4))
    return path
