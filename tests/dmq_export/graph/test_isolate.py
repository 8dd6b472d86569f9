"""Cutting a graph at its layers: every piece follows from what it is given, and from nothing else."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from layers import SPECS, TIMESTEPS, linear, marked_model, random_input, random_layer
from oracle import layer_output, quantize_input

from dmq_export.checkpoint import Checkpoint
from dmq_export.graph.compare import rms_ratio
from dmq_export.graph.export import serialized
from dmq_export.graph.isolate import isolate_layers, isolated_inputs, isolated_outputs
from dmq_export.graph.lower import lower
from dmq_export.graph.lowered_layer import LayerValues, LoweredLayer, plainly_lowered
from dmq_export.graph.portable import lower_portable
from dmq_export.layer import QuantizedLayer
from engines.onnxruntime import OnnxSession

Arrays = dict[str, np.ndarray]


def cut_layer(layer: QuantizedLayer, x: np.ndarray, given: LayerValues) -> LayerValues:
    """What a graph of one layer says when the network's input is ``x`` and the layer is ``given`` other values."""
    model = marked_model(layer.spec, x)
    lowered_layers = lower(model, (layer,), TIMESTEPS, lower_portable)
    isolate_layers(model, lowered_layers)
    inputs = {"sample": x, "timestep": np.float32(100), **isolated_inputs(lowered_layers, {layer.spec.name: given}, 0)}
    return isolated_outputs(lowered_layers, OnnxSession(serialized(model)).run(inputs), 0)[layer.spec.name]


@pytest.mark.parametrize("name", SPECS)
def test_each_piece_of_a_layer_follows_from_what_it_is_given(name: str) -> None:
    layer = random_layer(SPECS[name])
    x, given, other = (random_input(layer.spec, seed=seed) for seed in (1, 2, 3))
    codes = quantize_input(layer, other)
    random_output = np.ones(layer_output(layer, x).shape, np.float32)  # nobody behind the layer is asked
    values = cut_layer(layer, x, LayerValues(given, codes.astype(np.uint8), random_output))
    assert np.array_equal(values.input, x)
    # float32 division may fall on the other side of a tie
    assert (values.codes != quantize_input(layer, given)).mean() < 0.01
    expected = layer_output(layer, other)
    np.testing.assert_allclose(values.output, expected, rtol=0, atol=1e-5 * np.abs(expected).max() + 1e-6)


def all_plainly_lowered(checkpoint: Checkpoint) -> dict[str, LoweredLayer]:
    return {layer.spec.name: plainly_lowered(layer) for layer in checkpoint.layers}


@pytest.fixture(scope="module")
def pieces(tiny_onnx: Path, tiny_checkpoint: Checkpoint) -> OnnxSession:
    model = ir.load(tiny_onnx)
    isolate_layers(model, all_plainly_lowered(tiny_checkpoint))
    return OnnxSession(serialized(model))


@pytest.fixture(scope="module")
def inputs(tiny_checkpoint: Checkpoint) -> Arrays:
    """Of the whole cut network: the probe, and for each layer a random input and random codes."""
    probe, rng = tiny_checkpoint.probe, np.random.default_rng(0)
    given: Arrays = {}
    for layer in tiny_checkpoint.layers:
        shape = given_shape(layer)
        given[f"{layer.spec.name}/given_input"] = rng.standard_normal(shape, np.float32)
        given[f"{layer.spec.name}/given_codes"] = rng.integers(0, 256, shape, np.uint8)
        given[f"{layer.spec.name}/given_output"] = rng.standard_normal(output_shape(layer, shape), np.float32)
    return {"sample": probe.sample[0], "timestep": probe.timesteps[0], **probe.conditioning, **given}


def given_shape(layer: QuantizedLayer) -> tuple[int, ...]:
    """Two samples; the tiny model works on 8x8 down to 4x4."""
    spec = layer.spec
    size = 8 if spec.name.startswith(("down_blocks.0", "up_blocks.1", "up_blocks.0.upsamplers")) else 4
    return (2, size * size, spec.in_channels) if spec.kind == "linear" else (2, spec.in_channels, size, size)


def output_shape(layer: QuantizedLayer, shape: tuple[int, ...]) -> tuple[int, ...]:
    spec = layer.spec
    if spec.kind == "linear":
        return (*shape[:-1], spec.out_channels)
    return (shape[0], spec.out_channels, *(size // stride for size, stride in zip(shape[2:], spec.stride, strict=True)))


def changed_outputs(pieces: OnnxSession, inputs: Arrays, name: str, value: np.ndarray) -> set[str]:
    """Outputs that are no longer the same when the input ``name`` is ``value``."""
    before, after = pieces.run(inputs), pieces.run({**inputs, name: value})
    return {output for output, array in before.items() if not np.array_equal(array, after[output])}


SOME_LAYERS = (
    "down_blocks.0.resnets.0.conv1",
    "mid_block.attentions.0.to_q",
    "mid_block.attentions.0.to_out.0",
    "up_blocks.1.resnets.0.conv_shortcut",
)


@pytest.mark.parametrize("name", SOME_LAYERS)
def test_a_given_input_reaches_that_layers_codes_alone(pieces: OnnxSession, inputs: Arrays, name: str) -> None:
    given = inputs[f"{name}/given_input"]
    assert changed_outputs(pieces, inputs, f"{name}/given_input", given + 1) == {f"{name}/codes"}


@pytest.mark.parametrize("name", SOME_LAYERS)
def test_given_codes_reach_that_layers_output_alone(pieces: OnnxSession, inputs: Arrays, name: str) -> None:
    changed = changed_outputs(pieces, inputs, f"{name}/given_codes", 255 - inputs[f"{name}/given_codes"])
    assert changed == {f"{name}/output"}


@pytest.mark.parametrize("name", SOME_LAYERS)
def test_a_given_output_reaches_the_inputs_of_the_next_layers_alone(
    pieces: OnnxSession, inputs: Arrays, name: str
) -> None:
    changed = changed_outputs(pieces, inputs, f"{name}/given_output", -inputs[f"{name}/given_output"])
    assert changed
    assert all(output.endswith("/input") or output == "out_sample" for output in changed)


def test_the_sample_reaches_only_what_lies_before_the_first_layers(pieces: OnnxSession, inputs: Arrays) -> None:
    changed = changed_outputs(pieces, inputs, "sample", inputs["sample"] + 1)
    assert "down_blocks.0.resnets.0.conv1/input" in changed
    assert all(output.endswith("/input") for output in changed)
    assert "mid_block.attentions.0.to_q/input" not in changed


def test_a_cut_network_given_its_own_values_is_the_network(
    tiny_onnx: Path, tiny_checkpoint: Checkpoint, pieces: OnnxSession, inputs: Arrays
) -> None:
    names = [layer.spec.name for layer in tiny_checkpoint.layers]
    network_inputs = {name: value for name, value in inputs.items() if "/given_" not in name}
    (expected,) = OnnxSession(tiny_onnx).run(network_inputs).values()
    given = dict(inputs)
    outputs = pieces.run(given)
    for name in names:  # in the order in which they run: each one's input is right once all before it are
        x = outputs[f"{name}/input"]
        given[f"{name}/given_input"] = x
        given[f"{name}/given_codes"] = pieces.run(given)[f"{name}/codes"]
        given[f"{name}/given_output"] = pieces.run(given)[f"{name}/output"]
        outputs = pieces.run(given)
    # ONNX Runtime fuses other nodes where the graph is cut: last bits differ, and may flip a code on the way
    assert rms_ratio(outputs["out_sample"] - expected, expected) < 0.05


def test_cutting_leaves_the_values_that_are_compared(tiny_onnx: Path, tiny_checkpoint: Checkpoint) -> None:
    model = ir.load(tiny_onnx)
    lowered_layers = all_plainly_lowered(tiny_checkpoint)
    names = list(lowered_layers)
    isolate_layers(model, lowered_layers)
    assert {value.name for value in model.graph.inputs} == {
        "sample",
        "timestep",
        "class_labels",
        *(f"{name}/{what}" for name in names for what in ("given_input", "given_codes", "given_output")),
    }
    assert {value.name for value in model.graph.outputs} == {
        "out_sample",
        *(f"{name}/{what}" for name in names for what in ("input", "codes", "output")),
    }


def test_reference_values_become_the_inputs_of_the_cut() -> None:
    layer = random_layer(linear(name="a.b"))
    values = LayerValues(*(np.full((1, 1, 8), i) for i in range(3)))
    given = isolated_inputs({"a.b": plainly_lowered(layer)}, {"a.b": values}, 0)
    assert {name.removeprefix("a.b/given_"): int(value.flat[0]) for name, value in given.items()} == {
        "input": 0,
        "codes": 1,
        "output": 2,
    }
    assert given["a.b/given_codes"].dtype == np.uint8
