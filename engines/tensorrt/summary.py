"""What an engine is made of, in the few figures that are worth keeping of the compiler's table of kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dmq_export.common.memory import in_words
from dmq_export.common.table import table
from engines.tensorrt.layer_table import LayerTable

KINDS = ("convolution", "matrix product", "fused attention", "normalization", "pointwise", "other")
FIX = "Bytes moved are known where every size is fixed: export with --batch N, or give one shape with --shapes."


@dataclass(frozen=True)
class KernelSummary:
    """An engine in figures.

    Attributes:
        integer: nodes meant to run in 8-bit integers that do.
        not_integer: nodes meant to run in 8-bit integers that run in a float type.
        float_products: the other convolutions and matrix products, by the names of their nodes.
        kinds: kernels by kind: ``convolution``, ``matrix product``, ``fused attention``, ``normalization``,
            ``pointwise``, ``other``.
        activation_bytes: that all kernels read and write; None where a size is open.
        constant_bytes: of weights and other constants, as stored.
        engine_bytes: of the engine itself.
    """

    integer: tuple[str, ...]
    not_integer: tuple[str, ...]
    float_products: tuple[str, ...]
    kinds: Mapping[str, int]
    activation_bytes: int | None
    constant_bytes: int
    engine_bytes: int

    @property
    def kernels(self) -> int:
        return sum(self.kinds.values())

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> KernelSummary:
        """What :func:`dataclasses.asdict` made of one.

        Raises:
            KeyError, TypeError: it is none.
        """
        lists = {name: tuple(content[name]) for name in ("integer", "not_integer", "float_products")}
        return cls(**{**content, **lists})


def summarize(layers: LayerTable, engine: bytes, wanted: Sequence[str], products: Sequence[str]) -> KernelSummary:
    """The figures of an engine.

    Args:
        layers: the compiler's table of its kernels.
        wanted: nodes meant to run in 8-bit integers.
        products: all convolutions and matrix products of the graph.
    """
    integer = layers.integer_nodes(wanted)
    others = [name for name in products if name not in set(wanted)]
    return KernelSummary(
        integer=integer,
        not_integer=tuple(name for name in wanted if name not in set(integer)),
        float_products=layers.float_nodes(others),
        kinds=dict(layers.kinds),
        activation_bytes=round(layers.activation_bytes) if layers.fixed else None,
        constant_bytes=round(layers.constant_bytes),
        engine_bytes=len(engine),
    )


def summary_text(engine: KernelSummary, float16: KernelSummary | None = None) -> str:
    """Every product with its type, then the figures, beside those of the ``float16`` graph where there are some."""
    runs = {name: "Int8" for name in layer_names(engine.integer)}
    runs |= {name: "float" for name in layer_names(engine.float_products)}
    runs |= {name: "float, meant for Int8" for name in layer_names(engine.not_integer)}
    figures = figures_table({"engine": engine} | ({} if float16 is None else {"plain float16": float16}))
    notes = [FIX] if engine.activation_bytes is None else []
    return "\n\n".join([table(("product", "runs in"), list(runs.items())), figures, *notes])


def figures_table(engines: Mapping[str, KernelSummary]) -> str:
    """A column of figures for each engine, under its name."""
    columns = {name: _figures(summary) for name, summary in engines.items()}
    rows = [(what, *(figures[what] for figures in columns.values())) for what in next(iter(columns.values()))]
    return table(("", *columns), rows, right=range(1, len(columns) + 1))


def layer_names(nodes: Sequence[str]) -> list[str]:
    """The modules that nodes lie in, each once."""
    return list(dict.fromkeys(name.rpartition("/")[0] or name for name in nodes))


def _figures(summary: KernelSummary) -> dict[str, str]:
    moved = "unknown" if summary.activation_bytes is None else in_words(summary.activation_bytes)
    return {
        "products in Int8": str(len(summary.integer)),
        "products in float": str(len(summary.float_products) + len(summary.not_integer)),
        **{f"kernels: {kind}": str(summary.kinds.get(kind, 0)) for kind in KINDS},
        "kernels": str(summary.kernels),
        "activations moved": moved,
        "constants": in_words(summary.constant_bytes),
        "engine": in_words(summary.engine_bytes),
    }
