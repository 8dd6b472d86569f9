"""The coverage report and the table it is printed in."""

from layers import conv2d, linear

from dmq_export.bits import Bits
from dmq_export.common.table import table
from dmq_export.coverage import Coverage, FloatLayer

QUANTIZED = (
    conv2d(name="up.shortcut", parts=(4, 3), out_channels=6, kernel=(1, 1), padding=(0, 0), bits=Bits(4, 6)),
    conv2d(name="down.conv", parts=(64,), out_channels=32, groups=2),
    linear(name="to_q"),
)
FLOAT = (
    FloatLayer("conv_in", "conv2d", 72, "first layer", by_design=True),
    FloatLayer("odd", "ConvTranspose2d", 18, "kind is not supported", by_design=False),
)


def test_parameters_are_the_weights_without_biases() -> None:
    coverage = Coverage(QUANTIZED, FLOAT)
    assert coverage.quantized_parameters == 6 * 7 + 32 * 32 * 9 + 5 * 8
    assert coverage.parameters == 42 + 9216 + 40 + 72 + 18


def test_the_summary_counts_layers_and_the_share_of_weights() -> None:
    assert Coverage(QUANTIZED[1:], FLOAT).summary() == (
        "2 layers quantized (99.0 % of 9,346 layer parameters), 2 left float"
    )


def test_the_summary_of_mixed_widths_has_the_share_of_each() -> None:
    assert Coverage(QUANTIZED, FLOAT).summary() == (
        "3 layers quantized (99.0 % of 9,388 layer parameters: 0.4 % w4a6, 98.6 % w4a8), 2 left float"
    )


def test_a_model_without_layers_has_a_summary() -> None:
    assert Coverage((), ()).summary() == "0 layers quantized (0.0 % of 0 layer parameters), 0 left float"


def test_the_table_lists_every_layer_with_its_bits_or_the_reason() -> None:
    assert Coverage(QUANTIZED, FLOAT).table().splitlines() == [
        "layer        kind             parameters  bits   note",
        "-----------  ---------------  ----------  -----  ---------------------",
        "up.shortcut  conv2d                   42  w4a6   split at 4",
        "down.conv    conv2d                9,216  w4a8",
        "to_q         linear                   40  w4a8",
        "conv_in      conv2d                   72  float  first layer",
        "odd          ConvTranspose2d          18  float  kind is not supported",
    ]


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_without_spaces() -> None:
    assert table(("a", "long header", "c"), [("wide cell", "1", ""), ("x", "22", "3")], right=(1,)).splitlines() == [
        "a          long header  c",
        "---------  -----------  -",
        "wide cell            1",
        "x                   22  3",
    ]


def test_a_table_without_rows_is_its_header() -> None:
    assert table(("name", "n"), []) == "name  n\n----  -"
