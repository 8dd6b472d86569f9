"""What the log of TensorRT or TensorRT-RTX says went wrong: where, why, and what to do about it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

FLOAT_LAYER = "leave it float: calibrate --float-layer {layer}, export again"
SHAPES = "give every open size with --shapes NAME:MIN,OPT,MAX"
MEMORY = "free GPU memory, lower the largest --shapes, or build with --optimization-level 2"
LINT = "dmq-export lint names the rule"
REPORT = "report it with the ONNX file unless dmq-export lint names a rule that it breaks"
STATE_TYPES = "export it again with types, or add them with onnx.shape_inference"
UPDATE = "build again with the TensorRT that will run the plan"
# what TensorRT-RTX 1.7.1 logs as an error wherever there is no GPU, which it does not need
NOISE = r"CUDA driver version is insufficient"

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
    (r"Failed to convert ONNX date type", "an input or output of the graph that states no type", STATE_TYPES),
    (r"Failed to import initializer", "a constant of a type that is not read", LINT),
    (
        r"Quantized constant \(.*\) is only allowed before DQ",
        "an integer constant that no DequantizeLinear reads directly",
        LINT,
    ),
    (
        r"Cannot compile for target\(s\) .* HW-specific datatypes",
        "a type that one of the GPUs does not have",
        "name the GPUs that have it with --compute-capability",
    ),
    (r"at least \d+ dimensions are required", "data of too few dimensions", LINT),
    (r"not supported by a dedicated kernel", "attention of a type or size without a kernel", "use opset 22"),
    (r"Found unsupported input type", "a type that this operator does not take", LINT),
    (
        r"No importer registered for op: \w+|Plugin not found|UNSUPPORTED_NODE",
        "an operator that is not there",
        LINT,
    ),
    (
        r"must have (the )?same (input )?types?|[Mm]ismatched? (data )?types?",
        "float types that do not agree",
        "export again with one --dtype; " + LINT,
    ),
    (r"[Cc]ould not fuse .*kernel weights", "quantized weights that are not recognised", LINT),
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
    (r"Myelin.*CHECK\(.*\) failed", "the compiler gave up on the graph", REPORT),
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
    r"Failed to import initializer: (?P<node>[^\s:]+)$",
    r"Quantized constant \((?P<node>.+?)\) is only",
    r"ForeignNode\[(?P<node>[^\]]+)\]",
    r"(?:for|at) node (?P<node>.+?)(?:\.?\)?$|: )",
    r"^\S*\s*(?:\[TRT\] )?(?:ITensor::|IBuilder::)?(?P<node>[\w./-]+/[\w.-]+): .*(?:type|dimension)",
)


@dataclass(frozen=True)
class Failure:
    """Why a build failed.

    Attributes:
        layers: the model's layers that the log names; empty if it names none.
        reason: in our words, or the log's where it is unknown to us.
        remedy: what to do next.
        log: its own line.
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


def explain(log: Sequence[str], layers: Sequence[str] = (), node: str = "") -> Failure:
    """The first cause that the lines of a failed build give.

    Args:
        log: lines as they were written, oldest first.
        layers: the model's layers, of which the longest that begins a node's name is named.
        node: where it went wrong, if that is known beside the log.
    """
    lines = [_plain(line) for line in log]
    for pattern, reason, remedy in CAUSES:
        for line in lines:
            if re.search(pattern, line):
                return _failure(lines, line, layers, reason, remedy, node)
    errors = [_plain(line) for line in log if re.search(r"\[[E!F]\]|Error", line)]
    last = (errors or lines or ["the log gives no reason"])[-1]
    return _failure(lines, last, layers, last, REPORT, node)


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


def _failure(lines: Sequence[str], line: str, layers: Sequence[str], reason: str, remedy: str, node: str) -> Failure:
    node = node or _node(line) or next((found for found in map(_node, lines) if found), "")
    named = layers_in(node, layers) or layers_in(line, layers) or tuple(node_names(node)[:1])
    return Failure(named, reason, remedy.format(layer=named[0] if named else "NAME"), line)


def _node(line: str) -> str:
    for pattern in NODE:
        match = re.search(pattern, line)
        if match:
            return match["node"]
    return ""


def _plain(line: str) -> str:
    """Without colours, time, severity and source positions."""
    line = re.sub(r"\.? +In \w+ at /_src/[^\s)]+", "", line)
    line = re.sub(r"\x1b\[[0-9;]*m", "", line).strip()
    line = re.sub(r"^(\[[\d/:\s-]+\]\s*)?((\[[A-Z!]\]|\[TRT\])\s*)*", "", line)
    return re.sub(r"^(Error\[\d+\]|\d+): |\[\w+\.\w+::[^\]]*\]\s*", "", line)
