"""What a lowering made of a layer; how its values are carried over is in test_cut.py."""

from dataclasses import replace

import numpy as np
import pytest
from layers import linear, random_layer

from dmq_export.graph.lowered_layer import plainly_lowered


@pytest.mark.parametrize(
    ("offset", "added"),
    [([[0], [0]], [[4], [40]]), ([[4 - 128], [40 - 128]], [[128], [128]])],
    ids=["codes as calibrated", "one zero point of the kernel for all steps"],
)
def test_a_kernel_that_adds_its_zero_point_adds_the_code_of_zero(
    offset: list[list[int]], added: list[list[int]]
) -> None:
    zero_point = np.array([[4], [40]])
    lowered = replace(plainly_lowered(random_layer(linear())), zero_point=zero_point, offset=np.array(offset))
    assert lowered.zero_point_added().shift.tolist() == added
