"""The compiler's table of kernels."""

from engines.tensorrt.layer_table import read_layer_table

HALF = "Strides: [8,1], StrideOrder: [1,0], Datatype: Half, Format: (Linear) Row major linear format"
INT8 = HALF.replace("Half", "Int8")
LOG = f"""Layers:
Name: __mye1_myl0_0, LayerType: shape_call, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, Metadata: 
Name: __myl_Quan_myl0_1, LayerType: kgen, Inputs: [ {{ Name: x, Dimensions: [4,8], {HALF} }}], Constants: [], Outputs: [ {{ Name: q, Dimensions: [4,8], {INT8} }}], TacticName: __myl_Quan_0x9, StreamId: 0, Metadata: [ONNX Layer: l/codes]
Name: l/product_myl0_2, LayerType: gemm, Inputs: [ {{ Name: q, Dimensions: [4,8], {INT8} }}], Constants: [ {{ Name: w, Dimensions: [8,6], {INT8} }}, {{ Name: a, Dimensions: [1], {HALF} }}], Outputs: [ {{ Name: y, Dimensions: [-1,6], {HALF} }}], TacticName: __myelin_CASK_STUB, StreamId: 2, Metadata: [ONNX Layer: l/product][ONNX Layer: l/weight]
Name: __mye2_myl0_3, LayerType: wait, Inputs: [], Constants: [], Outputs: [], TacticName: , StreamId: 0, EventId: 31, Metadata: 
"""  # noqa: E501, W291


def test_kernels_tensors_and_nodes_are_read() -> None:
    table = read_layer_table(LOG)
    quantizer, product = table.kernels
    assert (quantizer.kind, product.kind, product.nodes) == ("pointwise", "matrix product", ("l/product", "l/weight"))
    assert [tensor.shape for tensor in (*product.inputs, *product.constants, *product.outputs)] == [
        (4, 8),
        (8, 6),
        (1,),
        (-1, 6),
    ]
    assert (quantizer.moved, product.moved, table.constant_bytes) == (64 + 32, 32 + 12, 48 + 2)
    assert not table.fixed


def test_a_product_is_integer_where_its_data_are() -> None:
    table = read_layer_table(LOG)
    assert table.integer_nodes(["l/product", "other", "l/codes"]) == ("l/product",)
    assert (
        not read_layer_table(LOG.replace("q, Dimensions: [4,8], " + INT8, "q, Dimensions: [4,8], " + HALF))
        .kernels[1]
        .integer
    )


def test_a_log_without_a_table_has_no_kernels() -> None:
    assert read_layer_table("nothing\nName: x").kernels == ()


def test_kinds_follow_from_names_where_types_do_not_tell() -> None:
    line = LOG.splitlines()[2]
    named = {
        "_gemm_mha_v2_myl0_47": ("kgen", "fused attention"),
        "__myl_FcAddSilu_myl0_9": ("runtime_fusion", "matrix product"),
        "__myl_Inor_myl0_32": ("runtime_function", "normalization"),
        "__myl_Other_myl0_1": ("runtime_function", "other"),
    }
    lines = [line.replace("__myl_Quan_myl0_1,", f"{name},").replace("kgen", kind) for name, (kind, _) in named.items()]
    assert [kernel.kind for kernel in read_layer_table(lines).kernels] == [kind for _, kind in named.values()]


def test_float_products_are_found() -> None:
    table = read_layer_table(LOG.replace("q, Dimensions: [4,8], " + INT8, "q, Dimensions: [4,8], " + HALF))
    assert table.float_nodes(["l/product", "l/codes"]) == ("l/product",)
    assert read_layer_table(LOG).float_nodes(["l/product"]) == ()
