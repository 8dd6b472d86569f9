"""The whole road on the bundled model, at full strength: what the README promises of it."""

import pytest
from PIL import Image

from dmq_export.commands.quickstart import Quickstart, quickstart
from dmq_export.common.progress import Progress


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Quickstart:
    return quickstart(tmp_path_factory.mktemp("road") / "new" / "folder", Progress(show=False))


@pytest.mark.slow
def test_samples_stay_what_they_were_asked_to_be(result: Quickstart) -> None:
    float_row, w4a8, w4a6 = result.rows
    assert float_row.agreement >= 0.95
    assert w4a8.agreement >= float_row.agreement - 0.02
    assert w4a6.agreement >= float_row.agreement - 0.05


@pytest.mark.slow
def test_predictions_and_pictures_stay_close_to_float(result: Quickstart) -> None:
    """A few decibels below what it measures, so that another CPU passes and a broken element of the method does not."""
    _, w4a8, w4a6 = result.rows
    assert w4a8.sqnr_mean is not None
    assert w4a8.sqnr_mean > 40
    assert w4a6.sqnr_mean is not None
    assert w4a6.sqnr_mean > 35
    assert w4a8.psnr is not None
    assert w4a8.psnr > 36
    assert w4a6.psnr is not None
    assert w4a6.psnr > 34


@pytest.mark.slow
def test_it_fits_a_small_machine(result: Quickstart) -> None:
    assert result.peak_memory < 3 * 2**30


@pytest.mark.slow
def test_quantized_layers_take_a_fifth_of_their_float_size(result: Quickstart) -> None:
    float_row, *quantized = result.rows
    for row in quantized:
        assert row.layer_bytes < 0.2 * float_row.layer_bytes


@pytest.mark.slow
def test_the_compiler_runs_every_quantized_product_in_integers(result: Quickstart) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX exists for x86-64 alone")
    float16 = result.engines["plain float16"]
    for name in ("w4a8", "w4a6"):
        engine = result.engines[name]
        assert len(engine.integer) == 67  # 61 layers, six of them in two parts
        assert engine.not_integer == ()
        assert engine.constant_bytes < float16.constant_bytes
    assert result.compiler in result.text()


@pytest.mark.slow
def test_everything_is_where_the_command_says(result: Quickstart) -> None:
    folder = result.grid.parent
    made = {f"{name}{ending}" for name in ("w4a8", "w4a6") for ending in ("", ".onnx")}
    engines = {f"{name}{ending}" for name in ("w4a8", "w4a6") for ending in ("-tensorrt.onnx", ".plan", ".engine.json")}
    assert {path.name for path in folder.iterdir()} == made | {"samples.png"} | (engines if result.engines else set())
    with Image.open(result.grid) as picture:
        assert picture.size[1] == 2 * 3 * 48 + 4  # two bands of float, w4a8 and w4a6
    assert str(result.grid) in result.text()
    assert "label agreement" in result.text()
