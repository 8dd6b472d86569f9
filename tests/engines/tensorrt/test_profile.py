"""Ranges of input sizes: as users write them, and as they fit a model."""

import pytest

from dmq_export.batch import Batch
from dmq_export.errors import DmqError
from engines.tensorrt.profile import ShapeRange, free_batches, parse_shapes, resolve_shapes

INPUTS = {"sample": ("batch", 4, "height", "width"), "timestep": (), "labels": ("batch",), "table": (7, 2)}
RANGE = ShapeRange((1, 4, 8, 8), (2, 4, 8, 16), (4, 4, 32, 32))


def test_three_shapes_or_one() -> None:
    parsed = parse_shapes(["sample:1x4x8x8,2x4x8x16,4x4x32x32", "a:b:3"])
    assert parsed == {"sample": RANGE, "a:b": ShapeRange((3,), (3,), (3,))}
    assert parsed["a:b"].fixed
    assert not RANGE.fixed


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["sample"], "'sample' is no shape: write NAME:1x4x64x64"),
        ([":1x2"], "is no shape"),
        (["x:1x2,3x4"], "is no shape"),
        (["x:1x0"], "is no shape"),
        (["x:1,a,3"], "is no shape"),
        (["x:"], "is no shape"),
        (["x:1", "x:2"], "names x twice"),
        (["x:2,1,3"], "MIN, OPT and MAX must have one rank, and no size may shrink"),
        (["x:1,1x1,1"], "must have one rank"),
    ],
)
def test_other_texts_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(DmqError, match=message):
        parse_shapes(texts)


def test_sizes_of_one_name_follow_the_input_that_gives_them() -> None:
    assert resolve_shapes(INPUTS, {"sample": RANGE}) == {
        "sample": RANGE,
        "timestep": ShapeRange((), (), ()),
        "labels": ShapeRange((1,), (2,), (4,)),
        "table": ShapeRange((7, 2), (7, 2), (7, 2)),
    }


def test_fixed_inputs_need_nothing() -> None:
    assert resolve_shapes({"x": (2, 3)}, {}) == {"x": ShapeRange((2, 3), (2, 3), (2, 3))}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"input sample \[batch, 4, height, width\] has the open size 'batch': give --shapes sample:MIN,OPT,MAX"),
        ({"x": RANGE}, "the model has no input 'x': it takes sample, timestep, labels, table"),
        ({"labels": RANGE}, r"does not fit the model's \[batch\]"),
        (
            {"sample": ShapeRange((1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8))},
            r"--shapes sample: 1x3x8x8 does not fit the model's \[batch, 4, height, width\]",
        ),
        (
            {"sample": RANGE, "labels": ShapeRange((3,), (3,), (3,))},
            r"--shapes labels: another input gives the size 'batch' as \(1, 2, 4\)",
        ),
    ],
)
def test_what_does_not_fit_the_model_is_refused(given: dict[str, ShapeRange], message: str) -> None:
    with pytest.raises(DmqError, match=message):
        resolve_shapes(INPUTS, given)


def test_a_batch_serves_what_is_first_wherever_it_is() -> None:
    inputs: dict[str, tuple[int | str, ...]] = {"sample": ("batch", 4), "labels": ("batch",), "other": ("n", "n")}
    assert free_batches(inputs) == ["batch"]
    batch = Batch(1, 2, 8)
    with pytest.raises(DmqError, match="has the open size 'n'"):
        resolve_shapes(inputs, {}, batch)
    given = {"other": ShapeRange((3, 3), (3, 3), (3, 3))}
    assert resolve_shapes(inputs, given, batch)["labels"] == ShapeRange((1,), (2,), (8,))
    given["labels"] = ShapeRange((5,), (5,), (5,))
    assert resolve_shapes(inputs, given, batch)["sample"] == ShapeRange((5, 4), (5, 4), (5, 4))
