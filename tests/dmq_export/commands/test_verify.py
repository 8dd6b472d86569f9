"""Verification passes on the graph that was exported, and on nothing that is a little different."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from dmq_export.checkpoint import Checkpoint
from dmq_export.commands.export import export_graph
from dmq_export.commands.verify import StepDrift, Verification, _require_no_drift, verify
from dmq_export.common.progress import Progress
from dmq_export.errors import CheckFailedError
from dmq_export.graph.compare import TOLERANCE, LayerComparison
from dmq_export.graph.export import ExportedGraph, serialized
from dmq_export.graph.isolate import isolate_layers
from dmq_export.graph.lowered_layer import plainly_lowered

CONV = "down_blocks.0.resnets.0.conv1"
QUERY = "mid_block.attentions.0.to_q"
SPLIT = "up_blocks.1.resnets.0.conv_shortcut"


@pytest.fixture
def model(tiny_onnx: Path) -> ir.Model:
    return ir.load(tiny_onnx)


def run(model: ir.Model, checkpoint: Checkpoint) -> Verification:
    lowered_layers = {layer.spec.name: plainly_lowered(layer) for layer in checkpoint.layers}
    return verify(ExportedGraph(model, lowered_layers), checkpoint, Progress(show=False))


def change(model: ir.Model, name: str, edit: Callable[[np.ndarray], None]) -> None:
    """Edit an initializer."""
    initializer = model.graph.initializers[name]
    array = initializer.const_value.numpy().copy()
    edit(array)
    initializer.const_value = ir.tensor(array, name=name)


def at(index: int, value: Callable[[float], float]) -> Callable[[np.ndarray], None]:
    def edit(array: np.ndarray) -> None:
        array.flat[index] = value(float(array.flat[index]))

    return edit


def test_the_exported_graph_is_the_reference(model: ir.Model, tiny_checkpoint: Checkpoint) -> None:
    before = {name: value.const_value.numpy().tobytes() for name, value in model.graph.initializers.items()}
    inputs = [value.name for value in model.graph.inputs]
    result = run(model, tiny_checkpoint)
    steps = len(tiny_checkpoint.probe.timesteps)
    names = [layer.spec.name for layer in tiny_checkpoint.layers] + ["(network output)"]
    assert [check.name for check in result.checks] == names * steps
    assert all(check.wrong_codes == 0 for check in result.checks)
    assert result.largest_error <= TOLERANCE
    # a tie needs a value within a few float32 ulps of one
    codes = sum(np.prod(layer.spec.weight_shape) for layer in tiny_checkpoint.layers)
    assert result.ties < 1e-3 * codes
    assert [drift.timestep for drift in result.drift] == tiny_checkpoint.probe.timesteps.tolist()
    for drift in result.drift:
        assert drift.graph <= max(3 * drift.perturbed, drift.quantization) + TOLERANCE
        assert 0 < drift.quantization < 1
    # verification cuts a copy
    assert [value.name for value in model.graph.inputs] == inputs
    assert {name: value.const_value.numpy().tobytes() for name, value in model.graph.initializers.items()} == before


def next_code(code: float) -> float:
    return code - 1 if code else 1


CORRUPTIONS: dict[str, tuple[str, str, Callable[[np.ndarray], None]]] = {
    "a weight scale": (CONV, "weight_scale", at(3, lambda s: s * 1.01)),
    "a weight code": (CONV, "weight_codes", at(17, next_code)),
    "a weight zero point": (CONV, "weight_zero_point", at(2, next_code)),
    "a bias": (CONV, "bias", at(1, lambda b: b + 1e-3)),
    "tau": (CONV, "tau", at(0, lambda t: t * 1.05)),
    "an activation scale of the last step": (CONV, "step_scale_table", at(-1, lambda s: s * 1.05)),
    "an activation zero point of the middle step": (CONV, "zero_point_table", at(1, next_code)),
    "a weight code of a linear layer": (QUERY, "weight_codes", at(5, next_code)),
    "the second half's weight scale": (SPLIT, "weight_scale_1", at(0, lambda s: s * 1.01)),
    "the second half's zero point": (SPLIT, "zero_point_table", at(1, next_code)),
}


@pytest.mark.parametrize("what", CORRUPTIONS)
def test_one_wrong_number_in_a_layer_is_found_and_the_layer_named(
    model: ir.Model, tiny_checkpoint: Checkpoint, what: str
) -> None:
    layer, name, edit = CORRUPTIONS[what]
    change(model, f"{layer}/{name}", edit)
    with pytest.raises(CheckFailedError, match=f"^layer {layer}: ") as caught:
        run(model, tiny_checkpoint)
    assert "the graph before it" not in str(caught.value)
    assert caught.value.exit_code == 1


def float_part(model: ir.Model, name: str) -> str:
    """The initializer that the exporter made of the network's tensor ``name``."""
    (found,) = [initializer for initializer in model.graph.initializers if initializer.endswith(name)]
    return found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "down_blocks.0.resnets.0.norm1.weight",
            r"layer down_blocks\.0\.resnets\.0\.conv1: the graph before it differs",
        ),
        ("conv_in.weight", r"layer down_blocks\.0\.resnets\.0\.conv1: the graph before it differs"),
        ("time_embedding.linear_1.bias", r"layer down_blocks\.0\.resnets\.0\.conv2: the graph before it differs"),
        ("conv_out.bias", r"layer \(network output\): the graph before it differs"),
    ],
)
def test_a_wrong_number_between_the_layers_is_found_at_the_next_layer(
    model: ir.Model, tiny_checkpoint: Checkpoint, name: str, message: str
) -> None:
    change(model, float_part(model, name), at(0, lambda value: value + 0.01))
    with pytest.raises(CheckFailedError, match=message):
        run(model, tiny_checkpoint)


def test_a_wrong_table_of_timesteps_is_found(model: ir.Model, tiny_checkpoint: Checkpoint) -> None:
    change(model, "step/timesteps", lambda table: table.__setitem__(slice(None), table[:, ::-1].copy()))
    with pytest.raises(CheckFailedError, match=f"layer {CONV}: "):
        run(model, tiny_checkpoint)


@pytest.mark.parametrize("name", [f"{CONV}/bias", "conv_out.bias"])
def test_nan_never_passes(model: ir.Model, tiny_checkpoint: Checkpoint, name: str) -> None:
    change(model, float_part(model, name), at(0, lambda _: float("nan")))
    with pytest.raises(CheckFailedError, match=r"not finite|differs by inf|codes differ"):
        run(model, tiny_checkpoint)


def test_another_checkpoint_is_not_the_reference(model: ir.Model, tiny_checkpoint: Checkpoint) -> None:
    first, *rest = tiny_checkpoint.layers
    codes = first.codes.copy()
    codes.flat[0] ^= 1
    other = replace(tiny_checkpoint, layers=(replace(first, codes=codes), *rest))
    with pytest.raises(CheckFailedError, match=f"layer {first.spec.name}: output differs"):
        run(model, other)


def test_four_bit_codes_survive_an_edit_of_the_test_itself(model: ir.Model) -> None:
    change(model, f"{CONV}/weight_codes", lambda codes: None)
    assert model.graph.initializers[f"{CONV}/weight_codes"].const_value.numpy().dtype == ml_dtypes.uint4


def drift(graph: float, perturbed: float, quantization: float) -> StepDrift:
    return StepDrift(500.0, graph, perturbed, quantization)


@pytest.mark.parametrize(
    ("graph", "perturbed", "quantization"), [(2e-2, 1e-2, 0.0), (1e-2, 0.0, 1e-2), (TOLERANCE / 2, 0.0, 0.0)]
)
def test_drift_that_rounding_or_quantization_explains_passes(
    graph: float, perturbed: float, quantization: float
) -> None:
    _require_no_drift([drift(graph, perturbed, quantization)])


@pytest.mark.parametrize(
    ("graph", "perturbed", "quantization"), [(4e-2, 1e-2, 1e-2), (1e-3, 0.0, 0.0), (float("nan"), 1e-2, 1e-2)]
)
def test_drift_that_nothing_explains_is_an_error_that_names_the_step(
    graph: float, perturbed: float, quantization: float
) -> None:
    with pytest.raises(CheckFailedError, match="timestep 500: the graph's prediction differs by"):
        _require_no_drift([drift(0, 0, 0), drift(graph, perturbed, quantization)])


def test_a_verification_adds_its_ties_and_keeps_its_largest_error() -> None:
    checks = (LayerComparison("a", 2, 0, 1e-6, 0.0), LayerComparison("b", 3, 0, 0.0, 4e-6))
    result = Verification(checks, ())
    assert (result.ties, result.largest_error) == (5, 4e-6)


@pytest.fixture(scope="module", params=["tensorrt", "openvino"])
def lowered(request: pytest.FixtureRequest, tiny_checkpoint: Checkpoint) -> ExportedGraph:
    return export_graph(tiny_checkpoint, request.param)


@pytest.fixture(scope="module")
def for_openvino(tiny_checkpoint: Checkpoint) -> ExportedGraph:
    pytest.importorskip("openvino")
    return export_graph(tiny_checkpoint, "openvino")


def test_a_graph_for_openvino_is_executed_by_it_too(for_openvino: ExportedGraph, tiny_checkpoint: Checkpoint) -> None:
    result = verify(for_openvino, tiny_checkpoint, Progress(show=False))
    steps = len(tiny_checkpoint.probe.timesteps)
    assert len(result.checks) == 2 * steps * (len(tiny_checkpoint.layers) + 1)
    assert [drift.runtime for drift in result.drift] == ["ONNX Runtime", "OpenVINO"] * steps
    assert result.missing == ()


@pytest.mark.parametrize("what", ["output", "codes", "input"])
def test_what_only_openvino_computes_otherwise_is_found_and_the_layer_named(
    for_openvino: ExportedGraph, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """A fault of its kernels, played by a changed answer."""
    from engines.openvino import OpenVinoSession

    run = OpenVinoSession.run

    def wrong(session: OpenVinoSession, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = run(session, inputs)
        if f"{QUERY}/{what}" in outputs:
            array = outputs[f"{QUERY}/{what}"]
            array.flat[array.argmax()] -= 1
        return outputs

    monkeypatch.setattr(OpenVinoSession, "run", wrong)
    with pytest.raises(CheckFailedError, match=rf"^layer {QUERY}: .*, executed by OpenVINO$"):
        verify(for_openvino, tiny_checkpoint, Progress(show=False))


def test_the_cut_graph_runs_on_openvinos_integer_kernels(for_openvino: ExportedGraph) -> None:
    """What is verified is what runs."""
    from tests.support.precision import INTEGERS, executed_precision

    cut = for_openvino.model.clone()
    isolate_layers(cut, for_openvino.lowered_layers)
    for name, kinds in executed_precision(serialized(cut), list(for_openvino.lowered_layers)).items():
        assert len(kinds) == len(for_openvino.lowered_layers[name].suffixes), name
        assert set(kinds) <= set(INTEGERS), name


def test_without_openvino_it_is_said(
    for_openvino: ExportedGraph, tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmq_export.commands.verify.find_spec", lambda name: None)
    result = verify(for_openvino, tiny_checkpoint, Progress(show=False))
    assert result.missing == ("OpenVINO",)
    assert {drift.runtime for drift in result.drift} == {"ONNX Runtime"}


def test_a_lowered_graph_is_the_reference(lowered: ExportedGraph, tiny_checkpoint: Checkpoint) -> None:
    layers = lowered.lowered_layers.values()
    assert any(layer.input_factor is not None for layer in layers)  # folding is verified too
    assert any(layer.padding for layer in layers)  # and so are borders
    result = verify(lowered, tiny_checkpoint, Progress(show=False))
    assert all(check.wrong_codes == 0 for check in result.checks)
    assert result.largest_error <= TOLERANCE


@pytest.fixture(scope="module", params=[3, 1], ids=["by step", "static"])
def half(request: pytest.FixtureRequest, tiny_checkpoint: Checkpoint) -> tuple[ExportedGraph, Checkpoint]:
    """In float16, asymmetric: where the shift adds several times what the layer says."""
    rows = slice(request.param)
    layers = [
        replace(each, scale=each.scale[rows], zero_point=each.zero_point[rows]) for each in tiny_checkpoint.layers
    ]
    checkpoint = replace(tiny_checkpoint, layers=tuple(layers))
    return export_graph(checkpoint, "tensorrt", "float16"), checkpoint


def test_a_float16_graph_is_the_reference_but_for_its_roundings(half: tuple[ExportedGraph, Checkpoint]) -> None:
    result = verify(*half, Progress(show=False))
    assert all(check.wrong_codes == 0 for check in result.checks)
    assert TOLERANCE < result.largest_error <= 7 * 2.0**-11


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("weight_scale", at(0, lambda scale: scale * 1.02)),
        ("rest", at(0, lambda rest: rest * 1.02)),
        ("product_bias", at(0, lambda bias: bias * 1.02)),
    ],
)
def test_a_wrong_number_in_a_float16_graph_is_found(
    half: tuple[ExportedGraph, Checkpoint], name: str, edit: Callable[[np.ndarray], None]
) -> None:
    graph, checkpoint = half
    layer = "down_blocks.0.resnets.0.conv2"
    model = graph.model.clone()
    largest = np.abs(model.graph.initializers[f"{layer}/{name}/float16"].const_value.numpy()).argmax()
    change(model, f"{layer}/{name}/float16", lambda array: edit(array.reshape(-1)[largest:]))
    with pytest.raises(CheckFailedError, match=f"^layer {layer}: output differs by"):
        verify(replace(graph, model=model), checkpoint, Progress(show=False))


@pytest.mark.parametrize(
    ("layer", "name", "edit"),
    [
        (CONV, "weight_codes", at(17, lambda code: code + 1)),
        (CONV, "factor", at(0, lambda factor: factor * 1.05)),
        (SPLIT, "weight_scale_1", at(0, lambda scale: scale * 1.01)),
    ],
)
def test_one_wrong_number_in_a_lowered_graph_is_found_and_the_layer_named(
    lowered: ExportedGraph, tiny_checkpoint: Checkpoint, layer: str, name: str, edit: Callable[[np.ndarray], None]
) -> None:
    model = lowered.model.clone()
    change(model, f"{layer}/{name}", edit)
    with pytest.raises(CheckFailedError, match=f"^layer {layer}: "):
        verify(replace(lowered, model=model), tiny_checkpoint, Progress(show=False))
