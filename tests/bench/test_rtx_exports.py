"""NVIDIA's compiler takes the export of every family and runs every quantized product in integers.

The real compiler, TensorRT-RTX, without a GPU. Each family, recipe, type and kind of batch is met at least once; the
whole matrix is ``bench/rtx_exports.py``.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: it exists for x86-64 alone")
BENCH = Path(__file__).resolve().parents[2] / "bench" / "rtx_exports.py"
SPEC = importlib.util.spec_from_file_location("rtx_exports", BENCH)
assert SPEC is not None
assert SPEC.loader is not None
rtx_exports = importlib.util.module_from_spec(SPEC)
sys.modules["rtx_exports"] = rtx_exports  # its dataclasses look their module up
sys.path.append(str(BENCH.parent))
SPEC.loader.exec_module(rtx_exports)


@pytest.mark.slow
@pytest.mark.parametrize("family", rtx_exports.CASES)
def test_every_quantized_product_of_every_family_runs_in_int8(family: str) -> None:
    recipe, forms = rtx_exports.CASES[family]
    for row in rtx_exports.rows(family, [recipe], forms, verify=True):
        assert row.refused == ""
        assert row.products > 0
        assert (row.integer, row.form) == (row.products, row.form)


def test_every_recipe_type_and_batch_is_met() -> None:
    met = {(recipe, form) for recipe, forms in rtx_exports.CASES.values() for form in forms}
    assert {recipe for recipe, _ in met} == set(rtx_exports.RECIPES)
    for recipe in rtx_exports.RECIPES:
        forms = [form for other, form in met if other == recipe]
        assert {form.dtype for form in forms} == {"float16", "float32"}
        assert {form.batch for form in forms} == set(rtx_exports.BATCHES)
