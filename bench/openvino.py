"""OpenVINO's int8 kernels on the exported graph against float engines of the same model, side by side in one run.

    python bench/openvino.py                                # about 20 minutes on two cores
    python bench/openvino.py --sizes 32 --batches 1 --seconds 2

The model is a UNet2DModel of random weights, 128, 256 and 256 channels wide; speed does not depend on the weights. The
engines take turns, one evaluation each, so that another load on the machine meets all of them; the figures are
medians over the turns.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel

from calib.calibrate import Limits, calibrated
from calib.model import load_model
from calib.recipe import Recipe, Scales
from calib.survey import survey
from dmq_export.bits import Bits
from dmq_export.checkpoint import Checkpoint
from dmq_export.progress import Progress

CHANNELS = (128, 256, 256)
Run = Callable[[], object]


def checkpoint_of(folder: Path, scales: Scales) -> Checkpoint:
    """A checkpoint at 32x32 by the quickest recipe."""
    source = load_model(folder, torch.device("cpu"))
    recipe = Recipe(
        bits=Bits(4, 8), samples=1, steps=10, check_samples=1, les_iterations=0, rounding="nearest", scales=scales
    )
    surveyed = survey(source, recipe.bits, recipe.scheme, recipe.float_layers)
    return calibrated(source, surveyed, recipe, Limits(torch.device("cpu")), Progress(show=False))


def save_model(folder: Path) -> None:
    torch.manual_seed(0)
    UNet2DModel(
        sample_size=32,
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    ).save_pretrained(folder / "unet")
    DDIMScheduler().save_pretrained(folder / "scheduler")
