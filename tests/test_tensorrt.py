"""What of the TensorRT engine can be tested without a GPU: refusals."""

from pathlib import Path

import numpy as np
import pytest

from dmq_export.errors import DmqError
from engines.tensorrt.engine import TensorRtDenoiser, _require_inputs
from engines.tensorrt.profile import ShapeRange


def test_inputs_must_be_those_of_the_plan() -> None:
    shapes = {"sample": ShapeRange((1, 1), (1, 1), (2, 1)), "timestep": ShapeRange((), (), ())}
    one = np.zeros(1)
    _require_inputs({"sample": one, "timestep": one}, shapes)
    with pytest.raises(DmqError, match="input timestep is missing: the plan takes sample, timestep"):
        _require_inputs({"sample": one}, shapes)
    with pytest.raises(DmqError, match="input labels is unknown: the plan takes sample, timestep"):
        _require_inputs({"sample": one, "timestep": one, "labels": one}, shapes)


def test_without_tensorrt_the_engine_says_what_is_missing(tmp_path: Path) -> None:
    from engines.tensorrt.environment import missing

    if not missing():
        pytest.skip("this machine has TensorRT and a GPU")
    with pytest.raises(DmqError, match="TensorRT cannot work here"):
        TensorRtDenoiser(tmp_path / "model.plan")
