"""Two codes to a byte."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import numpy_helper

from dmq_export.checkpoint import pack_nibbles, unpack_nibbles

CODES = arrays.arrays(
    np.uint8, arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5), elements=st.integers(0, 15)
)


@pytest.mark.parametrize(
    ("codes", "packed"),
    [([], ""), ([1], "01"), ([15], "0f"), ([1, 2], "21"), ([1, 2, 3, 4, 5], "214305"), ([0, 15, 15, 0], "f00f")],
)
def test_the_first_code_is_the_low_nibble(codes: list[int], packed: str) -> None:
    result = pack_nibbles(np.array(codes, np.uint8))
    assert result.dtype == np.uint8
    assert result.tobytes().hex() == packed


@settings(deadline=None, max_examples=50)
@given(CODES)
def test_unpacking_returns_what_was_packed(codes: np.ndarray) -> None:
    packed = pack_nibbles(codes)
    assert packed.shape == (-(-codes.size // 2),)
    unpacked = unpack_nibbles(packed, codes.shape)
    assert unpacked.dtype == np.uint8
    np.testing.assert_array_equal(unpacked, codes, strict=True)


def test_codes_are_packed_in_row_order_whatever_their_layout_in_memory() -> None:
    codes = np.array([[1, 3, 5], [2, 4, 6]], np.uint8)
    assert pack_nibbles(codes.T).tobytes().hex() == "214365"


@settings(deadline=None, max_examples=50)
@given(arrays.arrays(np.uint8, st.integers(1, 9), elements=st.integers(0, 15)))
def test_onnx_reads_the_bytes_as_the_same_codes(codes: np.ndarray) -> None:
    tensor = onnx.TensorProto(
        data_type=onnx.TensorProto.UINT4, dims=codes.shape, raw_data=pack_nibbles(codes).tobytes()
    )
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.uint8), codes)


@pytest.mark.parametrize("code", [16, 255])
def test_a_code_of_more_than_four_bits_is_refused(code: int) -> None:
    with pytest.raises(ValueError, match=f"code {code} does not fit four bits"):
        pack_nibbles(np.array([0, code, 1], np.uint8))


@pytest.mark.parametrize("count", [0, 2, 4, 6])
def test_another_byte_count_than_the_shape_needs_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=r"bytes cannot hold codes of shape \(5,\)"):
        unpack_nibbles(np.zeros(count, np.uint8), (5,))
