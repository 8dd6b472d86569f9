"""From a checkpoint to a float ONNX graph in which every quantized layer is one node ``dmq::Layer``.

The network is traced with a marker in place of each quantized layer, so a lowering never has to recognise
what the exporter made of a convolution: it replaces one node whose ``layer`` attribute names it.
"""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from calib.model.network import build_network, predict
from dmq_export.checkpoint import Checkpoint
from dmq_export.errors import ExportError
from dmq_export.graph.marker import BATCH, DOMAIN, OPSET, OUTPUT
from dmq_export.layer import LayerSpec


def trace_network(checkpoint: Checkpoint) -> ir.Model:
    """The checkpoint's network as ONNX, batch dynamic, sample size fixed.

    Inputs are those of the diffusers model: ``sample [N, ...]``, ``timestep []`` (float32: one step for the
    whole batch) and the conditioning by name; the output is :data:`OUTPUT`.

    Raises:
        ExportError: PyTorch cannot trace the model.
    """
    network = build_network(checkpoint, {layer.spec.name: _Marker(layer.spec) for layer in checkpoint.layers})
    probe = checkpoint.probe
    count = probe.sample.shape[1]
    rows = np.arange(max(count, 2)) % count  # a batch of one would be taken for a constant
    conditioning = {name: torch.from_numpy(value[rows]) for name, value in probe.conditioning.items()}
    batch = torch.export.Dim(BATCH)
    shapes: dict[str, Any] = {"sample": {0: batch}, "timestep": {}}
    shapes["conditioning"] = {name: {0: batch} for name in conditioning}
    try:
        with _quiet():
            program = torch.onnx.export(
                _Positional(network, list(conditioning)).eval(),
                (torch.from_numpy(probe.sample[0, rows]), torch.tensor(float(probe.timesteps[0]))),
                kwargs={"conditioning": conditioning},
                dynamo=True,
                opset_version=OPSET,
                input_names=["sample", "timestep", *conditioning],
                output_names=[OUTPUT],
                dynamic_shapes=shapes,
                verbose=False,
            )
    except Exception as error:  # the exporter wraps whatever the model raised in types of its own
        reason = str(error.__cause__ or error).strip().splitlines()[0]
        raise ExportError(f"PyTorch cannot trace {checkpoint.model.class_name} to ONNX: {reason}") from error
    if program is None:
        raise ExportError(f"PyTorch returned no ONNX program for {checkpoint.model.class_name}")
    _name_batch(program.model)
    _drop_idle_squeezes(program.model.graph)
    return program.model


def _name_batch(model: ir.Model) -> None:
    """Call the batch axis ``batch`` everywhere; PyTorch loses the name where only one input has the axis."""
    batch = model.graph.inputs[0].shape
    symbol = batch[0].value if batch is not None and isinstance(batch[0], ir.SymbolicDim) else None
    if symbol is None or symbol == BATCH:
        return
    values = [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]
    for value in values:
        if value.shape is not None:
            sizes = [
                d.value.replace(symbol, BATCH) if isinstance(d, ir.SymbolicDim) and d.value else d for d in value.shape
            ]
            value.shape = ir.Shape(sizes)


def _drop_idle_squeezes(graph: ir.Graph) -> None:
    """Remove every Squeeze of an axis that is not of size 1: nothing in PyTorch (PixArt has one), refused by ONNX."""
    for node in [node for node in graph if node.op_type == "Squeeze" and len(node.inputs) == 2]:
        x, axes = node.inputs
        constant = None if axes is None else ir.convenience.get_const_tensor(axes)
        if x is None or x.shape is None or constant is None:
            continue
        sizes = [x.shape[int(axis)] for axis in constant.numpy().flatten()]
        if all(isinstance(size, int) and size != 1 for size in sizes):
            ir.convenience.replace_all_uses_with(node.outputs[0], x)
            graph.remove(node, safe=True)


class _Positional(nn.Module):
    """The network with conditioning as one dictionary argument and a plain tensor as its result.

    Args:
        names: of the conditioning, in the order of the graph's inputs.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.network = network
        self.names = names

    def forward(self, sample: Tensor, timestep: Tensor, conditioning: dict[str, Tensor]) -> Tensor:
        for value in conditioning.values():  # or PyTorch takes each input's batch for a size of its own
            torch._check(value.shape[0] == sample.shape[0])  # type: ignore[no-untyped-call]
        return predict(self.network, sample, timestep, {name: conditioning[name] for name in self.names})


class _Marker(nn.Module):
    """Stands where the layer ``spec`` does, and is traced as one node."""

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self, x: Tensor) -> Tensor:
        marked: Tensor = torch.onnx.ops.symbolic(
            f"{DOMAIN}::Layer",
            (x,),
            {"layer": self.spec.name},
            dtype=x.dtype,
            shape=_output_shape(self.spec, list(x.shape)),
            version=1,
        )
        return marked


def _output_shape(spec: LayerSpec, shape: list[Any]) -> list[Any]:
    """Shape of the layer's output for an input of ``shape``, whose sizes may be symbolic."""
    if spec.kind == "linear":
        return [*shape[:-1], spec.out_channels]
    spatial = [
        (size + 2 * pad - dilation * (kernel - 1) - 1) // stride + 1
        for size, kernel, stride, pad, dilation in zip(
            shape[2:], spec.kernel, spec.stride, spec.padding, spec.dilation, strict=True
        )
    ]
    return [shape[0], spec.out_channels, *spatial]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the exporter's own chatter (stdout, warnings, log) away from the user's results."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
