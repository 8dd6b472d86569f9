"""``dmq-export calibrate``: from a diffusers folder to a DMQ checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from calib.recipe import Recipe
from dmq_export.bundled import model_folder
from dmq_export.checkpoint import Checkpoint
from dmq_export.errors import DmqError
from dmq_export.progress import Progress
from dmq_export.table import table

Device = Literal["auto", "cpu", "cuda"]
WORST_SHOWN = 5


@dataclass(frozen=True)
class Calibration:
    """A written checkpoint and how long it took, by stage."""

    folder: Path
    checkpoint: Checkpoint
    seconds: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """The result as JSON values."""
        coverage = self.checkpoint.coverage
        return {
            "checkpoint": str(self.folder),
            "quantized": [layer.name for layer in coverage.quantized],
            "float": {layer.name: layer.reason for layer in coverage.float_layers},
            "prediction_sqnr_db": self.checkpoint.metrics["prediction_sqnr_db"],
            "seconds": self.seconds,
        }

    def text(self) -> str:
        """The coverage of every layer, then the quality, the worst layers and the time."""
        coverage = self.checkpoint.coverage
        total = sum(self.seconds.values())
        return "\n\n".join(
            [
                coverage.table(),
                self._quality(),
                self._worst_layers(),
                f"{coverage.summary()}\n{self.folder} written after {total:.0f} s",
            ]
        )

    def _quality(self) -> str:
        sqnr = self.checkpoint.metrics["prediction_sqnr_db"]
        rows = [
            (what, f"{sum(sqnr[what]) / len(sqnr[what]):.1f} dB", f"{min(sqnr[what]):.1f} dB")
            for what in ("weights", "activations", "both")
        ]
        return table(("quantized", "SQNR of the prediction, mean", "worst step"), rows, right=(1, 2))

    def _worst_layers(self) -> str:
        layers = self.checkpoint.metrics["layers"]
        worst = sorted(layers, key=lambda name: layers[name]["output_db"])[:WORST_SHOWN]
        columns = ("output_db", "weights_db", "activations_db")
        rows = [(name, *(f"{layers[name][column]:.1f} dB" for column in columns)) for name in worst]
        return table(("worst layers", "output SQNR", "weights alone", "activations alone"), rows, right=(1, 2, 3))


def calibrate_model(
    model: str,
    output: Path,
    recipe: Recipe,
    *,
    device: Device = "auto",
    strict: bool = False,
    fresh: bool = False,
) -> Calibration:
    """Calibrate a diffusers folder or a bundled model by name.

    Raises:
        DmqError: bad input; nothing is written then.
    """
    from calib.calibrate import Limits, calibrate

    progress = Progress()
    limits = Limits(choose_device(device))
    checkpoint = calibrate(model_folder(model), output, recipe, limits, progress, strict=strict, fresh=fresh)
    return Calibration(output, checkpoint, progress.seconds)


def choose_device(device: Device) -> Any:
    """The torch device; ``auto`` is CUDA where there is one.

    Raises:
        DmqError: ``cuda`` was asked for and is not there.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise DmqError(f"PyTorch {torch.__version__} sees no CUDA device: use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
