"""What TensorRT's log says went wrong: where, why, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT_LAYER = "leave it float: calibrate --float-layer {layer}, export again"
SHAPES = "give every open size with --shapes NAME:MIN,OPT,MAX"
MEMORY = "free GPU memory, lower the largest --shapes, or build with --optimization-level 2"
LINT = "dmq-export lint names the rule"
UPDATE = "build again with the TensorRT that will run the plan"

# the first that matches anything in the log explains the failure; {node} is where, if the text says so
CAUSES: tuple[tuple[str, str, str], ...] = (
    (
        r"Skipping tactic .* due to insufficient memory|insufficient workspace",
        "no kernel fits the workspace",
        "raise --workspace",
    ),
    (r"out of memory|OutOfMemory|Error Code 1: Cuda Runtime \(.*memory", "the GPU ran out of memory", MEMORY),
    (r"ymmetric quantization|[Nn]on-zero zero point", "a zero point other than 0", LINT),
    (r"[Ss]cale coefficients must all be positive", "a scale of 0 or below", FLOAT_LAYER),
    (
        r"number of scales is not equal to the number of output channels",
        "a scale per channel along the wrong axis",
        LINT,
    ),
    (
        r"No importer registered for op: \w+|Plugin not found|UNSUPPORTED_NODE",
        "an operator TensorRT does not have",
        LINT,
    ),
    (
        r"must have (the )?same (input )?types?|[Mm]ismatched? (data )?types?",
        "float types that do not agree",
        "export again with one --dtype; " + LINT,
    ),
    (r"[Cc]ould not fuse .*kernel weights", "quantized weights that TensorRT does not recognise", LINT),
    (
        r"Could not find any implementation for node (?P<node>.+?)\.?\)?$",
        "no kernel for this layer on this GPU",
        FLOAT_LAYER,
    ),
    (r"Could not infer output types for operation", "types the kernel compiler cannot infer on this GPU", FLOAT_LAYER),
    (
        r"no optimization profile has been defined|dynamic or shape inputs",
        "an input of open size without a range",
        SHAPES,
    ),
    (
        r"inconsistent|does not satisfy any optimization profile|profile dimension",
        "a --shapes range the graph cannot take",
        SHAPES,
    ),
    (
        r"timing cache.*(mismatch|not compatible|different)",
        "a --timing-cache of another GPU or TensorRT",
        "name another file",
    ),
    (r"not compatible with this version of TensorRT|[Ss]erialization.*magic tag", "a plan of another TensorRT", UPDATE),
    (
        r"initialization error|no CUDA-capable device|CUDA driver version is insufficient",
        "no usable NVIDIA driver",
        "see dmq-export doctor",
    ),
)
NODE = (
    r"[Ii]n node \d+ with name: (?P<node>.+?) and operator",
    r"ForeignNode\[(?P<node>[^\]]+)\]",
    r"(?:for|at) node (?P<node>.+?)(?:\.?\)?$|: )",
    r"^\S*\s*(?:\[TRT\] )?(?:ITensor::|IBuilder::)?(?P<node>[\w./-]+/[\w.-]+): .*(?:type|dimension)",
)


@dataclass(frozen=True)
class Failure:
    """Why a build failed.

    Attributes:
        layers: the model's layers that the log names; empty if it names none.
        reason: in our words, or TensorRT's where it is unknown to us.
        remedy: what to do next.
        log: TensorRT's own line.
    """

    layers: tuple[str, ...]
    reason: str
    remedy: str
    log: str

    def text(self) -> str:
        """All of it on one line."""
        where = f"layer {', '.join(self.layers)}: " if self.layers else ""
        own = f" ({self.log})" if self.log and self.log != self.reason else ""
        return f"{where}{self.reason}: {self.remedy}{own}"


def explain(log: Sequence[str], layers: Sequence[str] = ()) -> Failure:
    """The first cause that the lines of a failed build give.

    Args:
        log: lines as TensorRT and Polygraphy wrote them, oldest first.
        layers: the model's layers, of which the longest that begins a node's name is named.
    """
    lines = [_plain(line) for line in log]
    for pattern, reason, remedy in CAUSES:
        for line in lines:
            if re.search(pattern, line):
                return _failure(lines, line, layers, reason, remedy)
    errors = [_plain(line) for line in log if re.search(r"\[[E!F]\]|Error", line)]
    last = (errors or lines or ["TensorRT gave no reason"])[-1]
    return _failure(lines, last, layers, last, "see TensorRT's documentation, or report it with the ONNX file")


def layers_in(text: str, layers: Sequence[str]) -> tuple[str, ...]:
    """Those of ``layers`` that ``text``, a name that TensorRT made by fusing nodes, is made of, in their order."""
    names = node_names(text)
    found = {max(matching, key=len) for name in names if (matching := [own for own in layers if _below(name, own)])}
    return tuple(layer for layer in layers if layer in found)


def node_names(text: str) -> list[str]:
    """The ONNX names in a fused layer's name: ``a + PWN(b, c)`` to ``[a, b, c]``."""
    pieces = re.split(r"\s+\+\s+|\s*\|\|\s*|,\s*|\.\.\.|PWN\(|\{ForeignNode\[|\[ONNX Layer: |[()\]}\s]+", text)
    return [piece for piece in pieces if piece]


def _below(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}/")


def _failure(lines: Sequence[str], line: str, layers: Sequence[str], reason: str, remedy: str) -> Failure:
    node = _node(line) or next((found for found in map(_node, lines) if found), "")
    named = layers_in(node, layers) or layers_in(line, layers) or tuple(node_names(node)[:1])
    return Failure(named, reason, remedy.format(layer=named[0] if named else "NAME"), line)


def _node(line: str) -> str:
    for pattern in NODE:
        match = re.search(pattern, line)
        if match:
            return match["node"]
    return ""


def _plain(line: str) -> str:
    """Without colours, time, severity and source position."""
    line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    line = re.sub(r"^(\[[\d/:\s-]+\]\s*)?((\[[A-Z!]\]|\[TRT\])\s*)*", "", line)
    return re.sub(r"^(Error\[\d+\]|\d+): |\[\w+\.\w+::[^\]]*\]\s*", "", line)
