"""OpenVINO executes every quantized layer in integers, by its own account, and to the oracle's numbers."""

from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from layers import SPECS, TIMESTEPS, marked_model, random_input, random_layer
from models import TINY_RECIPE
from oracle import layer_output

from calib.calibrate import Resources, calibrated
from calib.model.layers import select_layers
from calib.model.load import load_model
from dmq_export.bits import Bits
from dmq_export.checkpoint import Checkpoint
from dmq_export.commands.export import export_graph
from dmq_export.common.bundled import BUNDLED
from dmq_export.common.progress import Progress
from dmq_export.graph.export import serialized
from dmq_export.graph.integer import lower_integer
from dmq_export.graph.lower import lower

openvino = pytest.importorskip("openvino")
precision = pytest.importorskip("tests.support.precision")

FITTING = [name for name, spec in SPECS.items() if spec.bits.weight < 8]


def require_integers(checkpoint: Checkpoint) -> None:
    """Every part of every quantized layer runs on an int8 kernel, and nothing else does."""
    layers = [layer.spec.name for layer in checkpoint.layers]
    model = serialized(export_graph(checkpoint, "openvino").model)
    found = precision.executed_precision(model, layers)
    for layer in checkpoint.layers:
        kinds = found[layer.spec.name]
        assert len(kinds) == len(layer.spec.parts), layer.spec.name
        assert set(kinds) <= set(precision.INTEGERS), layer.spec.name


@pytest.mark.parametrize("activation", [8, 6])
@pytest.mark.parametrize("static", [True, False])
def test_the_tiny_model_runs_in_integers(tiny_checkpoint: Checkpoint, activation: int, static: bool) -> None:
    rows = slice(0, 1 if static else None)
    layers = tuple(
        replace(
            layer,
            spec=replace(layer.spec, bits=Bits(4, activation)),
            scale=layer.scale[rows],
            zero_point=layer.zero_point[rows] >> (8 - activation),
        )
        for layer in tiny_checkpoint.layers
    )
    require_integers(replace(tiny_checkpoint, layers=layers))


def test_the_float_layers_do_not(tiny_checkpoint: Checkpoint) -> None:
    """The check can fail: the portable graph's weights are dequantized before the operator."""
    names = [layer.spec.name for layer in tiny_checkpoint.layers]
    graph = export_graph(tiny_checkpoint, "openvino").model
    for node in graph.graph:
        if node.name == f"{names[0]}/rounded_input":
            node.outputs[0].uses()[0][0].replace_input_with(0, node.inputs[0].producer().inputs[0])
    found = precision.executed_precision(serialized(graph), names)
    assert found[names[0]] == ("f32",)


@pytest.mark.slow
@pytest.mark.parametrize("bits", [Bits(4, 8), Bits(4, 6)], ids=str)
def test_the_bundled_model_runs_in_integers(bits: Bits) -> None:
    source = load_model(Path(BUNDLED / "digits"), torch.device("cpu"))
    recipe = replace(TINY_RECIPE, bits=bits, les_iterations=0, rounding="nearest", null_label=10)
    selection = select_layers(source, recipe.bits, recipe.scheme, recipe.float_layers)
    require_integers(calibrated(source, selection, recipe, Resources(torch.device("cpu")), Progress(show=False)))


@pytest.mark.parametrize("activation", [8, 6])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", FITTING)
def test_openvino_computes_the_oracles_output(name: str, steps: int, activation: int) -> None:
    spec = replace(SPECS[name], bits=Bits(SPECS[name].bits.weight, activation))
    layer, x = random_layer(spec, steps=steps), random_input(spec)
    model = marked_model(spec, x)
    lower(model, (layer,), TIMESTEPS, lower_integer("openvino"))
    core = openvino.Core()
    network = core.read_model(BytesIO(serialized(model)))
    compiled = core.compile_model(network, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    given = {"sample": x, "timestep": TIMESTEPS[steps - 1]}
    output = compiled({value.any_name: given[value.any_name] for value in compiled.inputs})[0]
    expected = layer_output(layer, x, steps - 1)
    wrong = np.abs(output - expected) > 1e-5 * np.abs(expected).max() + 1e-6
    assert wrong.mean() < 0.02  # a code at a tie reaches some outputs
