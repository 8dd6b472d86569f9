"""Builds the nodes that replace one layer, every name below the layer's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.layer import LayerSpec


def conv_attributes(spec: LayerSpec, padding: tuple[int, ...]) -> dict[str, Any]:
    """Attributes of the layer's Conv node with ``padding`` on both sides of each spatial axis."""
    return {
        "kernel_shape": spec.kernel,
        "strides": spec.stride,
        "pads": (*padding, *padding),
        "dilations": spec.dilation,
        "group": spec.groups,
    }


class NodeBuilder:
    """Collects nodes and initializers named ``<prefix>/<name>``.

    Args:
        graph: takes the initializers; the nodes wait in :attr:`nodes` until someone inserts them.
        prefix: the layer's name in the diffusers model.
    """

    def __init__(self, graph: ir.Graph, prefix: str) -> None:
        self.graph = graph
        self.prefix = prefix
        self.nodes: list[ir.Node] = []

    def constant(self, name: str, value: NDArray[Any]) -> ir.Value:
        """An initializer."""
        full = f"{self.prefix}/{name}"
        shape, kind = ir.Shape(value.shape), ir.DataType.from_numpy(value.dtype)
        # a view, such as a transposed weight, is copied when it is written: the copies of all would take as much again
        tensor = ir.LazyTensor(lambda: ir.tensor(np.asarray(value, order="C")), dtype=kind, shape=shape, name=full)
        initializer = ir.Value(name=full, shape=shape, type=ir.TensorType(kind), const_value=tensor)
        self.graph.register_initializer(initializer)
        return initializer

    def op(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        name: str,
    ) -> ir.Value:
        """A node with one output; both are called ``<prefix>/<name>``."""
        full = f"{self.prefix}/{name}"
        node = ir.node(op_type, inputs, attributes, outputs=[ir.Value(name=full)], name=full)
        self.nodes.append(node)
        return node.outputs[0]

    def renamed(self, value: ir.Value, name: str) -> ir.Value:
        """``value`` and the node of this builder that gives it, called ``<prefix>/<name>``."""
        node = value.producer()
        assert node in self.nodes
        value.name = node.name = f"{self.prefix}/{name}"
        return value
