"""Random quantized layers, and Hypothesis strategies for them."""

import numpy as np
import onnx_ir as ir
from hypothesis import strategies as st

from dmq_export.bits import Bits
from dmq_export.layer import LayerSpec, QuantizedLayer

TIMESTEPS = np.array([900, 500, 100], np.float32)  # of layers with tables of three rows


def conv2d(**changes: object) -> LayerSpec:
    """A small 3x3 convolution, 4 channels to 6."""
    settings: dict[str, object] = {
        "name": "conv",
        "kind": "conv2d",
        "out_channels": 6,
        "parts": (4,),
        "bits": Bits(4, 8),
        "kernel": (3, 3),
        "stride": (1, 1),
        "padding": (1, 1),
        "dilation": (1, 1),
    }
    return LayerSpec(**(settings | changes))  # type: ignore[arg-type]


def linear(**changes: object) -> LayerSpec:
    """A small linear layer, 8 features to 5."""
    settings: dict[str, object] = {
        "name": "proj",
        "kind": "linear",
        "out_channels": 5,
        "parts": (8,),
        "bits": Bits(4, 8),
    }
    return LayerSpec(**(settings | changes))  # type: ignore[arg-type]


SPECS = {
    "conv2d": conv2d(),
    "conv2d strided": conv2d(stride=(2, 2)),
    "conv2d dilated": conv2d(dilation=(2, 1), padding=(2, 1)),
    "conv2d grouped": conv2d(parts=(6,), groups=3),
    "conv2d depthwise": conv2d(parts=(6,), groups=6),
    "conv2d split": conv2d(parts=(4, 3), kernel=(1, 1), padding=(0, 0)),
    "conv2d 6-bit activations": conv2d(bits=Bits(4, 6)),
    "conv2d 8-bit weights": conv2d(bits=Bits(8, 8)),
    "conv2d 3-bit weights": conv2d(bits=Bits(3, 3)),
    "conv1d": conv2d(kind="conv1d", kernel=(3,), stride=(1,), padding=(1,), dilation=(1,)),
    "linear": linear(),
    "linear split": linear(parts=(3, 5)),
}


def random_layer(
    spec: LayerSpec, *, steps: int = 1, seed: int = 0, largest_shift: int = 3, bias: bool = True
) -> QuantizedLayer:
    """A layer with every number drawn at random from its whole allowed range."""
    rng = np.random.default_rng(seed)
    parts = len(spec.parts)
    levels_w, levels_a = 2**spec.bits.weight, 2**spec.bits.activation

    def scales(*shape: int) -> np.ndarray:
        return np.exp(rng.uniform(-3, 0, shape)).astype(np.float32)

    symmetric = spec.scheme == "symmetric"
    return QuantizedLayer(
        spec=spec,
        codes=rng.integers(0, levels_w, spec.weight_shape, np.uint8),
        weight_scale=scales(parts, spec.out_channels),
        weight_zero_point=rng.integers(0, levels_w, (parts, spec.out_channels), np.uint8),
        tau=scales(spec.in_channels),
        shift=rng.integers(0, largest_shift + 1, spec.in_channels).astype(np.uint8),
        scale=scales(steps, parts),
        zero_point=np.full((steps, parts), levels_a // 2, np.uint8)
        if symmetric
        else rng.integers(0, levels_a, (steps, parts), np.uint8),
        bias=rng.standard_normal(spec.out_channels).astype(np.float32) if bias else None,
    )


def random_input(spec: LayerSpec, *, seed: int = 0, batch: int = 2, size: int = 5) -> np.ndarray:
    """``[N, C, size, ...]`` or ``[N, size, C]``, most of it inside the quantizer's range, some outside."""
    rng = np.random.default_rng(seed)
    shape = (batch, size, spec.in_channels) if spec.kind == "linear" else (batch, spec.in_channels)
    if spec.kind != "linear":
        shape = (*shape, *[size] * len(spec.kernel))
    return (rng.standard_normal(shape) * 8).astype(np.float32)


@st.composite
def specs(draw: st.DrawFn) -> LayerSpec:
    """Any layer the tool supports, small."""
    bits = Bits(draw(st.integers(3, 8)), draw(st.integers(3, 8)))
    scheme = draw(st.sampled_from(["asymmetric", "symmetric"]))
    kind = draw(st.sampled_from(["linear", "conv1d", "conv2d"]))
    groups = 1 if kind == "linear" else draw(st.integers(1, 3))
    parts = (
        tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)))
        if groups == 1
        else (groups * draw(st.integers(1, 2)),)
    )
    common = {
        "parts": parts,
        "bits": bits,
        "scheme": scheme,
        "out_channels": groups * draw(st.integers(1, 3)),
    }
    if kind == "linear":
        return linear(**common)
    axes = 1 if kind == "conv1d" else 2

    def numbers(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(axes))

    shape = {"kernel": numbers(1, 3), "stride": numbers(1, 2), "padding": numbers(0, 2), "dilation": numbers(1, 2)}
    return conv2d(kind=kind, groups=groups, **common, **shape)


def marked_model(spec: LayerSpec, x: np.ndarray) -> ir.Model:
    """What tracing leaves of a network that is one layer."""
    batched = ir.Shape(["batch", *x.shape[1:]])
    sample = ir.Value(name="sample", shape=batched, type=ir.TensorType(ir.DataType.FLOAT))
    timestep = ir.Value(name="timestep", shape=ir.Shape([]), type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("Layer", [sample], {"layer": spec.name}, domain="dmq", num_outputs=1)
    node.outputs[0].name = "marked"
    node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    node.outputs[0].shape = ir.Shape([None] * x.ndim)
    out = ir.node("Identity", [node.outputs[0]], num_outputs=1)
    out.outputs[0].name = "out_sample"
    out.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph(
        [sample, timestep], [out.outputs[0]], nodes=[node, out], opset_imports={"": 21, "dmq": 1}, name="one_layer"
    )
    return ir.Model(graph, ir_version=10)
