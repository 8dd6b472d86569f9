"""Bit widths as users write them."""

from itertools import product

import pytest

from dmq_export.bits import Bits
from dmq_export.errors import DmqError


@pytest.mark.parametrize(("weight", "activation"), [*product(range(3, 9), repeat=2)])
def test_every_supported_pair_round_trips_through_its_text(weight: int, activation: int) -> None:
    bits = Bits(weight, activation)
    assert str(bits) == f"w{weight}a{activation}"
    assert Bits.parse(str(bits)) == bits


def test_weights_come_first_and_case_does_not_matter() -> None:
    assert Bits.parse("W4A6") == Bits(weight=4, activation=6)


@pytest.mark.parametrize(
    "text", ["", "4", "w4", "a8", "a8w4", "w4a", "w4a8x", " w4a8", "w4a8\n", "w-4a8", "w4.0a8", "int4"]
)
def test_other_text_is_refused_with_the_form_that_is_allowed(text: str) -> None:
    with pytest.raises(DmqError, match=r"names no bit widths: write w4a8, w4a6 or another w3a3 \.\. w8a8") as refusal:
        Bits.parse(text)
    assert repr(text) in str(refusal.value)


@pytest.mark.parametrize("bits", [0, 1, 2, 9, 16, 32])
def test_a_width_outside_three_to_eight_is_refused_by_what_it_is_for(bits: int) -> None:
    with pytest.raises(DmqError, match=f"^{bits} weight bits are not supported: 3 to 8 are$"):
        Bits.parse(f"w{bits}a8")
    with pytest.raises(DmqError, match=f"^{bits} activation bits are not supported: 3 to 8 are$"):
        Bits(4, bits)
