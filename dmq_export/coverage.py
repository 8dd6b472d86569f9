"""Which layers run in integers, and why the others do not."""

from collections.abc import Sequence
from dataclasses import dataclass

from dmq_export.bits import Bits
from dmq_export.common.table import table
from dmq_export.layer import LayerSpec


@dataclass(frozen=True)
class FloatLayer:
    """A layer that stays in the graph's float type.

    Attributes:
        by_design: the method or the user wants it so; otherwise the layer could not be quantized.
    """

    name: str
    kind: str
    parameters: int
    reason: str
    by_design: bool


@dataclass(frozen=True)
class Coverage:
    """Every layer of the model, in the order in which it runs; layers that never run come last."""

    quantized: tuple[LayerSpec, ...]
    float_layers: tuple[FloatLayer, ...]

    @property
    def quantized_parameters(self) -> int:
        return sum(spec.weight_count for spec in self.quantized)

    @property
    def parameters(self) -> int:
        return self.quantized_parameters + sum(layer.parameters for layer in self.float_layers)

    def summary(self) -> str:
        """One line: layer counts, the share of weights that is quantized, and that of each width if they differ."""
        widths = [self._share(spec.bits) for spec in {spec.bits: spec for spec in self.quantized}.values()]
        return (
            f"{len(self.quantized)} layers quantized ({self._percent(self.quantized_parameters)} of "
            f"{self.parameters:,} layer parameters{': ' + ', '.join(widths) if len(widths) > 1 else ''}), "
            f"{len(self.float_layers)} left float"
        )

    def _share(self, bits: Bits) -> str:
        return f"{self._percent(sum(spec.weight_count for spec in self.quantized if spec.bits == bits))} {bits}"

    def _percent(self, parameters: int) -> str:
        return f"{100 * parameters / max(self.parameters, 1):.1f} %"

    def table(self) -> str:
        """The whole list, one row a layer."""
        rows: list[Sequence[str]] = [
            (spec.name, spec.kind, f"{spec.weight_count:,}", str(spec.bits), _parts(spec)) for spec in self.quantized
        ]
        rows += [
            (layer.name, layer.kind, f"{layer.parameters:,}", "float", layer.reason) for layer in self.float_layers
        ]
        return table(("layer", "kind", "parameters", "bits", "note"), rows, right=(2,))


def _parts(spec: LayerSpec) -> str:
    return f"split at {spec.parts[0]}" if len(spec.parts) > 1 else ""
