"""The table of kernels that TensorRT's compiler writes into its verbose log, without a GPU.

One line a kernel: its name, its type, the tensors it reads and writes, its constants and the ONNX nodes it is made of.
It says which product runs in integers, what is fused with what, and how many bytes move. The form is that of
TensorRT-RTX 1.7.1 with ``ProfilingVerbosity.DETAILED``.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

BITS = {
    "Double": 64,
    "Int64": 64,
    "Float": 32,
    "Int32": 32,
    "Half": 16,
    "BFloat16": 16,
    "Int8": 8,
    "UInt8": 8,
    "Bool": 8,
    "FP8": 8,
    "E8M0": 8,
    "Int4": 4,
    "FP4": 4,
}
PRODUCTS = frozenset({"convolution", "matrix product"})
INTEGER_TYPES = frozenset({"correlation", "gemm"})
NO_KERNELS = frozenset({"wait", "signal", "shape_call"})  # what the table lists beside kernels
KINDS = {  # the table's word: ours
    "correlation": "convolution",
    "conv": "convolution",
    "gemm": "matrix product",
    "kgen": "pointwise",
    "fmha": "fused attention",
}
NAMED = (("Fc", "matrix product"), ("Inor", "normalization"))  # parts of names, where the table's word says nothing
LINE = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<type>\w+), Inputs: \[(?P<inputs>.*?)\], Constants: \[(?P<constants>.*?)\], "
    r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), StreamId: .*?Metadata: ?(?P<metadata>.*)"
)
TENSOR = re.compile(r"\{ Name: (?P<name>.*?), Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<type>\w+)")
NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Tensor:
    """What a kernel reads or writes; a size of -1 is open."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def bytes(self) -> float:
        """Its size; open sizes count once."""
        return math.prod(map(abs, self.shape)) * BITS.get(self.type, 32) / 8


@dataclass(frozen=True)
class Kernel:
    """One line of the table.

    Attributes:
        name: the compiler's.
        type: the compiler's word for what it is: ``correlation``, ``gemm``, ``kgen``, ...
        nodes: names of the ONNX nodes it is made of.
    """

    name: str
    type: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[str, ...]

    @property
    def kind(self) -> str:
        """In words."""
        if "mha" in self.name:  # also where it is a generated kernel
            return "fused attention"
        return KINDS.get(self.type) or next((kind for part, kind in NAMED if part in self.name), "other")

    @property
    def is_product(self) -> bool:
        return self.kind in PRODUCTS

    @property
    def integer(self) -> bool:
        """Whether it multiplies 8-bit integers; a fused product that reads them dequantizes them first."""
        return self.type in INTEGER_TYPES and any(tensor.type == "Int8" for tensor in self.inputs)

    @property
    def moved(self) -> float:
        """Bytes of activations that it reads and writes; open sizes count once."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs))


@dataclass(frozen=True)
class LayerTable:
    """An engine's kernels."""

    kernels: tuple[Kernel, ...]

    @property
    def kinds(self) -> Mapping[str, int]:
        """Kernels by kind."""
        return Counter(kernel.kind for kernel in self.kernels)

    @property
    def fixed(self) -> bool:
        """Whether every size is known, so that bytes mean something."""
        tensors = (tensor for kernel in self.kernels for tensor in (*kernel.inputs, *kernel.outputs))
        return all(size >= 0 for tensor in tensors for size in tensor.shape)

    @property
    def activation_bytes(self) -> float:
        """Bytes that all kernels read and write of activations."""
        return sum(kernel.moved for kernel in self.kernels)

    @property
    def constant_bytes(self) -> float:
        """Bytes of weights and other constants, as stored."""
        seen = {tensor.name: tensor.bytes for kernel in self.kernels for tensor in kernel.constants}
        return sum(seen.values())

    def integer_nodes(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Those of the ONNX nodes ``wanted`` that an integer kernel computes."""
        integer = {node for kernel in self.kernels if kernel.integer for node in kernel.nodes}
        return tuple(name for name in wanted if name in integer)

    def float_nodes(self, wanted: Iterable[str]) -> tuple[str, ...]:
        """Those of the ONNX nodes ``wanted`` that a convolution or matrix product of another type computes."""
        other = {node for kernel in self.kernels if kernel.is_product and not kernel.integer for node in kernel.nodes}
        return tuple(name for name in wanted if name in other)


def read_layer_table(log: str | Sequence[str]) -> LayerTable:
    """The kernels in a verbose log; empty where it has no table."""
    text = log if isinstance(log, str) else "\n".join(log)
    kernels = (_kernel(match) for match in map(LINE.match, text.splitlines()) if match)
    return LayerTable(tuple(kernel for kernel in kernels if kernel.type not in NO_KERNELS))


def _kernel(match: re.Match[str]) -> Kernel:
    return Kernel(
        name=match["name"],
        type=match["type"],
        inputs=_tensors(match["inputs"]),
        constants=_tensors(match["constants"]),
        outputs=_tensors(match["outputs"]),
        nodes=tuple(dict.fromkeys(NODE.findall(match["metadata"]))),
    )


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(match["name"], tuple(map(int, filter(None, match["shape"].split(",")))), match["type"])
        for match in TENSOR.finditer(text)
    )
