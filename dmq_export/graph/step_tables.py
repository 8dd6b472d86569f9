"""Tables with a row per sampling step, looked up by the ``timestep`` input.

The integer graphs have several small tables in each layer; reading each by a Gather of its own would cost more than
using it, so tables of one rank lie side by side in one, which is read once and split.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from dmq_export.graph.node_builder import NodeBuilder

STEP = "step"  # the prefix of what serves all layers


class StepTables:
    """The tables of one graph.

    Args:
        graph: gets the nodes that read them, before its first node.
        timesteps: the calibrated ones, ``[T]``; row ``i`` of a table belongs to ``timesteps[i]``.
    """

    def __init__(self, graph: ir.Graph, timesteps: NDArray[np.float32]) -> None:
        self.builder = NodeBuilder(graph, STEP)
        self.timesteps = timesteps
        self._row: ir.Value | None = None
        self._pieces: dict[int, list[tuple[ir.Value, NDArray[Any]]]] = {}

    @property
    def row(self) -> ir.Value:
        """The row of the calibrated timestep nearest to the ``timestep`` input, the first of two equally near."""
        if self._row is None:
            build = self.builder
            timestep = next(value for value in build.graph.inputs if value.name == "timestep")
            timesteps = build.constant("timesteps", self.timesteps[None])  # TensorRT's ArgMin takes two dimensions
            difference = build.op("Sub", [timesteps, timestep], name="difference")
            distance = build.op("Abs", [difference], name="distance")
            rows = build.op("ArgMin", [distance], {"axis": 1, "keepdims": 0}, name="rows")
            self._row = build.op("Squeeze", [rows, build.constant("row_axis", np.zeros(1, np.int64))], name="row")
            self._row.type = ir.TensorType(ir.DataType.INT64)
        return self._row

    def value(self, name: str, table: NDArray[np.float32]) -> ir.Value:
        """The current row of ``table``, which is ``[T, n]`` or ``[T, 1, n, 1, ...]``, called ``name``."""
        current = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(table.shape[1:]))
        self._pieces.setdefault(table.ndim, []).append((current, table))
        return current

    def finish(self) -> None:
        """Put the nodes that compute all rows into the graph."""
        for rank, pieces in self._pieces.items():
            build, axis = self.builder, min(rank - 1, 2)
            table = build.constant(f"table_{rank - 1}", np.concatenate([piece for _, piece in pieces], axis))
            row = build.op("Gather", [table, self.row], {"axis": 0}, name=f"row_{rank - 1}")
            sizes = build.constant(f"sizes_{rank - 1}", np.array([piece.shape[axis] for _, piece in pieces], np.int64))
            outputs, name = [value for value, _ in pieces], f"{STEP}/split_{rank - 1}"
            build.nodes.append(ir.node("Split", [row, sizes], {"axis": axis - 1}, outputs=outputs, name=name))
        self.builder.graph.insert_before(self.builder.graph[0], self.builder.nodes)
