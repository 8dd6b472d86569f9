"""What scripts/verify_tensorrt.sh needs besides the command line.

    python bench/trt_verdict.py shapes int8.onnx 2              # the --shapes of trt-build for a batch of 2
    python bench/trt_verdict.py float16 int8.onnx float16.onnx  # the plain float16 network of the same graph
    python bench/trt_verdict.py verdict CHECKPOINT FOLDER       # whether FOLDER/int8.plan computes what it should

Shapes and graphs need no GPU; the verdict needs one, and has not been run by us.
"""

from __future__ import annotations

import sys
from pathlib import Path

import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dmq_export.common.table import table
from dmq_export.errors import DmqError
from dmq_export.graph.compare import rms_ratio
from dmq_export.graph.onnx_file import input_sizes, load_onnx


def shape_option(model: ir.Model, batch: int) -> str:
    """``sample:2x4x64x64`` for the only size that our exports leave open."""
    sizes = input_sizes(model)["sample"]
    return "sample:" + "x".join(str(size if isinstance(size, int) else batch) for size in sizes)


def verdict(checkpoint_folder: Path, folder: Path) -> bool:
    """Compare with the portable graph; prints tables, returns whether the numbers and the kernels are as meant."""
    from dmq_export.checkpoint import load_checkpoint
    from engines.onnxruntime import OnnxRuntimeDenoiser
    from engines.tensorrt.engine import TensorRtDenoiser
    from engines.tensorrt.plan_file import read_plan_metadata

    probe = load_checkpoint(checkpoint_folder).probe
    portable = OnnxRuntimeDenoiser(folder / "portable.onnx")
    engine = TensorRtDenoiser(folder / "int8.plan")
    rows, good = [], True
    for step, timestep in enumerate(probe.timesteps):
        x, t = probe.sample[step], float(timestep)
        expected = portable(x, t, **probe.conditioning)
        drift = rms_ratio(engine(x, t, **probe.conditioning) - expected, expected)
        error = rms_ratio(expected - probe.prediction[step], probe.prediction[step])
        good &= drift <= error  # false for NaN too
        rows.append((f"{timestep:g}", f"{drift:.1e}", f"{error:.1e}", "yes" if drift <= error else "NO"))
    print(table(("timestep", "engine to portable", "portable to float", "below it"), rows, right=(0, 1, 2)))
    metadata = read_plan_metadata(folder / "int8.plan")
    integer = metadata.layers.get("int8", 0) if metadata.kernels is None else len(metadata.kernels.integer)
    print(f"{metadata.machine.title}: {integer} {'layers' if metadata.kernels is None else 'products'} run in Int8")
    return good and integer > 0


def main() -> None:
    command, *arguments = sys.argv[1:]
    if command == "shapes":
        print(shape_option(load_onnx(Path(arguments[0])), int(arguments[1])))
    elif command == "float16":
        from dmq_export.graph.export import save_onnx
        from dmq_export.graph.float_twin import float_twin

        save_onnx(float_twin(load_onnx(Path(arguments[0]))), Path(arguments[1]))
    elif command == "verdict":
        good = verdict(Path(arguments[0]), Path(arguments[1]))
        print("VERDICT:", "the engine computes what was exported" if good else "the engine is NOT what was exported")
        sys.exit(0 if good else 1)
    else:
        sys.exit(f"unknown command {command}")


if __name__ == "__main__":
    try:
        main()
    except DmqError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(2)
