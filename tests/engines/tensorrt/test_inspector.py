"""What an engine is made of, from the inspector's JSON of TensorRT 10 and of TensorRT 11."""

from typing import Any

import pytest
from engine_information import FLOAT, HALF, INT8, as_eleven, as_ten, layer

from dmq_export.errors import DmqError
from engines.tensorrt.inspector import engine_layers

NODES = ("a/output", "b/output", "c/product", "d/output")


LAYERS = [
    layer("Reformatting CopyNode for Input Tensor 0 to a/codes", "Reformat", FLOAT, HALF),
    layer("a/codes", "Scale", HALF, INT8, ParameterType="Quantize"),
    layer("a/weight + a/output + PWN(node_silu)", "CaskConvolution", INT8, HALF, Weights={"Type": "Int8", "Count": 9}),
    layer("b/output", "CaskConvolution", HALF, HALF, metadata="[ONNX Layer: b/output]", Weights={"Type": "Half"}),
    layer("gemm_7_myl0_3", "gemm", INT8, HALF, metadata="[ONNX Layer: c/rounded_input]\x1e[ONNX Layer: c/product]"),
    layer("node_softmax", "SoftMax", FLOAT, FLOAT),
]


@pytest.mark.parametrize("written", [as_ten, as_eleven])
def test_layers_are_counted_by_type_and_the_unexpected_is_named(written: Any) -> None:
    found = engine_layers(written(LAYERS), NODES)
    assert found.counts == {"int8": 2, "float16": 2, "float32": 1, "reformat": 1}
    assert found.not_integer == ("b/output",)
    assert found.unseen == ("d/output",)
    assert "warning: 1 layers were meant to run in int8 and do not: b/output" in found.text()
    assert "warning: 1 layers were fused into kernels that do not name them" in found.text()


def test_an_engine_that_is_as_meant_warns_of_nothing() -> None:
    found = engine_layers(as_ten(LAYERS[:3]), ("a/output",))
    assert (found.not_integer, found.unseen) == ((), ())
    assert "warning" not in found.text()


def test_a_dequantizer_of_its_own_does_not_make_its_product_an_integer_one() -> None:
    """TensorRT fell back: codes are turned to float, and a float convolution follows."""
    layers = [layer("b/rounded_input", "Scale", INT8, HALF), layer("b/output", "CaskConvolution", HALF, HALF)]
    found = engine_layers(as_ten(layers), ("b/output",))
    assert found.not_integer == ("b/output",)


def test_a_node_with_an_integer_kernel_is_as_meant_whatever_else_names_it() -> None:
    prepared = layer("weights of b", "CaskConvolution", HALF, HALF, metadata="[ONNX Layer: b/output]")
    found = engine_layers(as_ten([prepared, layer("b/output", "CaskConvolution", INT8, HALF)]), ("b/output",))
    assert found.not_integer == ()


def test_the_suffix_of_myelins_names_is_no_part_of_the_node() -> None:
    found = engine_layers(as_ten([layer("c/product_myl0_12", "gemm", INT8, HALF)]), ("c/product",))
    assert (found.not_integer, found.unseen) == ((), ())


def test_a_region_that_names_a_product_without_being_one_says_nothing_of_it() -> None:
    region = layer("{ForeignNode[c/codes...c/product]}", "Myelin", HALF, HALF)
    assert engine_layers(as_ten([region]), ("c/product",)).unseen == ("c/product",)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Int8", "int8"),
        ("Half", "float16"),
        ("BFloat16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("Float", "float32"),
        ("FP8", "other"),
        ("Int32", "other"),
    ],
)
def test_types_by_their_many_names(text: str, kind: str) -> None:
    assert engine_layers(as_ten([layer("x", "Scale", text, text)]), ()).counts == {kind: 1}


@pytest.mark.parametrize("information", ["no JSON", "[]", "{}", '{"Layers": null}'])
def test_what_is_no_engine_information_is_refused(information: str) -> None:
    with pytest.raises(DmqError, match="gave no JSON with layers"):
        engine_layers(information, ())


def test_names_alone_are_not_enough() -> None:
    with pytest.raises(DmqError, match="built without details"):
        engine_layers('{"Layers": ["a/output"]}', ())
