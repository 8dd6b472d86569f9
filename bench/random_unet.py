"""Models of random weights for the measurements that need a size and no pictures."""

from pathlib import Path
from typing import Any

import diffusers
import torch

# their constructors are not typed
UNet2DModel: Any = diffusers.UNet2DModel
DDIMScheduler: Any = diffusers.DDIMScheduler


def save_unet(folder: Path, *, steps_offset: int = 0, **config: Any) -> int:
    """Write an unconditional pipeline, always the same weights; returns their bytes in float32."""
    torch.manual_seed(0)
    network = UNet2DModel(**config)
    network.save_pretrained(folder / "unet")
    DDIMScheduler(steps_offset=steps_offset).save_pretrained(folder / "scheduler")
    return sum(4 * parameter.numel() for parameter in network.parameters())
