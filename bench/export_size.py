"""What exporting a large model costs: peak memory against the source's weights, seconds and bytes.

    python bench/export_size.py                  # 300 million parameters, about 2 minutes
    python bench/export_size.py --size sdxl      # 2.6 billion, weights of float16

The weights are random and nothing is calibrated: a checkpoint with random codes is written first, by another process.
The export is a process of its own too, whose peak is that of its resident memory, libraries included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


@dataclass(frozen=True)
class Size:
    """A model: its diffusers class, its configuration, and the bytes of one of its source's weights."""

    class_name: str
    config: dict[str, Any]
    weight_bytes: int


SIZES = {
    "small": Size(
        "UNet2DModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (64, 128),
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
        4,
    ),
    "medium": Size(
        "UNet2DModel",
        {
            "sample_size": 32,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (256, 512, 1024),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        },
        4,
    ),
    "sdxl": Size(
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        2,
    ),
}


def make(size: Size, folder: Path) -> dict[str, int]:
    """Write a checkpoint with random numbers; returns the model's parameters."""
    import diffusers
    import numpy as np
    import torch

    from calib.model.families import example_conditioning
    from calib.model.layers import select_layers
    from calib.model.load import SourceModel
    from dmq_export.bits import Bits
    from dmq_export.checkpoint import Checkpoint, Probe, SourceInfo, save_checkpoint
    from dmq_export.recipe import recipe_from

    with torch.device("meta"):  # neither memory nor arithmetic: shapes are all that is needed
        network = getattr(diffusers, size.class_name)(**size.config).eval()
    config = json.loads(json.dumps(dict(network.config)))
    source = SourceModel(network, size.class_name, config, {}, "0" * 64)
    coverage = select_layers(source, Bits(4, 8), "symmetric", ()).coverage
    quantized = {spec.name for spec in coverage.quantized}
    rng = np.random.default_rng(0)
    named = [*network.named_parameters(), *network.named_buffers()]
    floats = {
        name: rng.standard_normal(tuple(tensor.shape), np.float32) * np.float32(0.02)
        for name, tensor in named
        if name.rpartition(".")[0] not in quantized
    }
    sample = rng.standard_normal((1, 2, *source.sample_shape), np.float32)
    conditioning = {
        name: value.cpu().numpy() for name, value in example_conditioning(size.class_name, config, 2).items()
    }
    checkpoint = Checkpoint(
        model=SourceInfo(size.class_name, config, {}, "0" * 64),
        recipe={**vars(recipe_from("fast")), "bits": "w4a8"},
        timesteps=np.array([999], np.float32),
        layers=tuple(_random_layer(spec, rng) for spec in coverage.quantized),
        float_layers=coverage.float_layers,
        float_tensors=floats,
        probe=Probe(np.array([999], np.float32), sample, conditioning, sample),
        metrics={},
        versions={},
    )
    save_checkpoint(checkpoint, folder, run={})
    return {"parameters": sum(tensor.numel() for _, tensor in named)}


def export(folder: Path, output: Path) -> dict[str, float]:
    """Export; returns peaks in bytes before and after, and seconds."""
    # the libraries' own memory is told apart from the export's
    import diffusers.models.unets  # noqa: F401
    import torch.onnx  # noqa: F401

    from dmq_export.commands.export import export_onnx
    from dmq_export.common.progress import Progress

    before, start = _peak(), time.perf_counter()
    export_onnx(folder, output, Progress(show=False), verify=False)
    return {"libraries": before, "peak": _peak(), "seconds": time.perf_counter() - start}


def _random_layer(spec: Any, rng: Any) -> Any:
    import numpy as np

    from dmq_export.layer import QuantizedLayer

    parts = len(spec.parts)
    return QuantizedLayer(
        spec=spec,
        codes=rng.integers(0, 16, spec.weight_shape, np.uint8),
        weight_scale=np.full((parts, spec.out_channels), 0.01, np.float32),
        weight_zero_point=np.full((parts, spec.out_channels), 8, np.uint8),
        tau=np.ones(spec.in_channels, np.float32),
        shift=np.zeros(spec.in_channels, np.uint8),
        scale=np.full((1, parts), 0.02, np.float32),
        zero_point=np.full((1, parts), 128, np.uint8),
        bias=np.zeros(spec.out_channels, np.float32),
    )


def _peak() -> int:
    """Peak resident memory of this process alone, in bytes."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    (line,) = (line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def _child(*arguments: str) -> dict[str, float]:
    """Run one stage in a process of its own."""
    command = [sys.executable, __file__, *arguments]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    report: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="medium")
    parser.add_argument("--folder", type=Path, help="to keep the checkpoint and the export in")
    parser.add_argument("--stage", choices=("make", "export"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    size = SIZES[options.size]
    if options.stage == "make":
        print(json.dumps(make(size, options.folder / "checkpoint")))
    elif options.stage == "export":
        print(json.dumps(export(options.folder / "checkpoint", options.folder / "model.onnx")))
    else:
        with tempfile.TemporaryDirectory() as scratch:
            folder = options.folder or Path(scratch)
            stage = ("--size", options.size, "--folder", str(folder), "--stage")
            parameters = _child(*stage, "make")["parameters"]
            cost = _child(*stage, "export")
            written = sum(path.stat().st_size for path in folder.glob("model.onnx*"))
        weights = parameters * size.weight_bytes
        print(f"{options.size}: {parameters / 1e6:.0f} million parameters, source weights {weights / 1e9:.2f} GB")
        print(f"export {cost['seconds']:.0f} s, {written / 1e9:.2f} GB written")
        share = (cost["peak"] - cost["libraries"]) / weights
        print(f"peak {cost['peak'] / 1e9:.2f} GB: {cost['peak'] / weights:.2f} of the source's weights")
        print(f"without the {cost['libraries'] / 1e9:.2f} GB of the libraries: {share:.2f}")


if __name__ == "__main__":
    main()
