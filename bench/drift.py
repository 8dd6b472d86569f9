"""How far two correct executions of the same quantized network drift apart, against what quantization costs.

    python bench/drift.py            # about 6 minutes

For each rounding of the weights: the difference end to end between ONNX Runtime and the PyTorch reference, between
the reference and itself with every layer's input changed by a relative 1e-6, and the quantization error, as root mean
squares relative to the prediction, at the first, middle and last step.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from calib.calibrate import calibrated
from calib.model.layers import select_layers
from calib.model.load import load_model
from calib.run.plan import Resources
from dmq_export.bits import Bits
from dmq_export.commands.export import export_graph
from dmq_export.commands.verify import Verification, verify
from dmq_export.common.bundled import BUNDLED
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.recipe import Rounding, recipe_from

ROUNDINGS: tuple[Rounding, ...] = ("nearest", "gptq")


def verification(bits: Bits, rounding: Rounding) -> Verification:
    """Calibrate, export and verify the bundled model in memory."""
    source = load_model(BUNDLED / "digits", torch.device("cpu"))
    recipe = replace(recipe_from("fast"), bits=bits, rounding=rounding, null_label=10)
    selection = select_layers(source, recipe.bits, recipe.scheme, recipe.float_layers)
    checkpoint = calibrated(source, selection, recipe, Resources(torch.device("cpu")), Progress(show=False))
    return verify(export_graph(checkpoint), checkpoint, Progress(show=False))


def main() -> None:
    rows = []
    for bits in (Bits(4, 8), Bits(4, 6)):
        for rounding in ROUNDINGS:
            for step in verification(bits, rounding).drift:
                shares = (f"{drift:.1e} ({drift / step.quantization:.2f})" for drift in (step.graph, step.perturbed))
                rows.append((str(bits), rounding, f"{step.timestep:g}", *shares, f"{step.quantization:.1e}"))
    header = ("bits", "rounding", "timestep", "graph (of quantization)", "perturbed (of quantization)", "quantization")
    print(table(header, rows, right=(2, 3, 4, 5)))


if __name__ == "__main__":
    main()
