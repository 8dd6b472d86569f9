"""What NVIDIA's compiler makes of every family's export: family x recipe x type x batch.

    python bench/rtx_exports.py                                    # all 288; about an hour of a core
    python bench/rtx_exports.py --families sd flux --types float16 # some of them
    python bench/rtx_exports.py --every-case-once                  # what the tests run: 18

A small random network of each family (``networks.py``) is calibrated by each recipe, exported for TensorRT and compiled
by TensorRT-RTX for one GPU. The table says whether the export was parsed and built, how many of the products that are
meant to run in int8 do, and what the kernels move (where sizes are fixed). Exit status 1 unless all are built and all
products are integer. Numbers are not looked at: ``onnx`` proves them as it exports.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, get_args

import onnx_ir as ir
from networks import FAMILIES, save_network

from calib.model.trace import trace_network
from dmq_export.batch import Batch
from dmq_export.checkpoint import Checkpoint, load_checkpoint
from dmq_export.cli import main as dmq_export
from dmq_export.commands.trt_build import integer_nodes
from dmq_export.commands.verify import verify as verify_graph
from dmq_export.common.progress import Progress
from dmq_export.common.table import table
from dmq_export.graph.export import lower_graph, save_onnx
from dmq_export.graph.onnx_file import input_sizes, load_onnx
from dmq_export.target import FloatType
from engines.tensorrt.compiler import Refusal, Request, compile_onnx
from engines.tensorrt.profile import resolve_shapes

BATCHES = {"fixed": (2, 2, 2), "free": (1, 2, 4)}
QUICK = ("--samples", "2", "--steps", "2", "--les-iters", "2", "--rounding", "nearest", "--workers", "1")


@dataclass(frozen=True)
class Recipe:
    """What a checkpoint is calibrated to."""

    bits: str = "w4a8"
    scales: str = "per-step"
    scheme: str = "asymmetric"


@dataclass(frozen=True)
class Form:
    """How it is exported."""

    dtype: FloatType = "float16"
    batch: str = "fixed"


@dataclass(frozen=True)
class Row:
    """What the compiler made of one export.

    Attributes:
        refused: by the parser, the builder or a crash, and why; empty where there is an engine.
        products, integer: those meant to run in int8, and those that do.
        moved: megabytes of activations; None where sizes are free.
    """

    family: str
    recipe: Recipe
    form: Form
    refused: str
    products: int
    integer: int
    kernels: int
    moved: float | None
    constants: float

    @property
    def right(self) -> bool:
        return not self.refused and self.integer == self.products


RECIPES = [
    Recipe(*choice)
    for choice in itertools.product(("w4a8", "w4a6"), ("per-step", "static"), ("asymmetric", "symmetric"))
]
FORMS = [Form(dtype, batch) for dtype in get_args(FloatType) for batch in BATCHES]
# each family, each recipe and each form at least once, each recipe in both types and with both batches
CASES = {
    family: (recipe, (FORMS[0], FORMS[3]) if number % 2 else (FORMS[1], FORMS[2]))
    for number, (family, recipe) in enumerate(zip(FAMILIES, [*RECIPES, RECIPES[0]], strict=True))
}


def rows(family: str, recipes: Iterable[Recipe], forms: Iterable[Form], *, verify: bool = False) -> Iterator[Row]:
    """Calibrate, export and compile; ``verify`` proves each export's numbers too.

    Raises:
        DmqError: the model cannot be calibrated or exported, or an export differs from its checkpoint.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        arguments = save_network(family, folder / "model")
        traced: ir.Model | None = None
        for recipe in recipes:
            checkpoint = _calibrated(arguments, recipe, folder / "-".join(astuple(recipe)))
            # no recipe changes the network: tracing it takes longer than all the rest
            traced = traced or trace_network(checkpoint)
            for form in forms:
                graph = lower_graph(traced.clone(), checkpoint, "tensorrt", form.dtype, Batch(*BATCHES[form.batch]))
                if verify:
                    verify_graph(graph, checkpoint, Progress(show=False))
                save_onnx(graph.model, folder / "model.onnx")
                yield _row(family, recipe, form, folder / "model.onnx")


def _calibrated(arguments: Sequence[str], recipe: Recipe, folder: Path) -> Checkpoint:
    choice = ["--bits", recipe.bits, "--activation-scales", recipe.scales, "--activation-scheme", recipe.scheme]
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        command = ["calibrate", *arguments, "-o", str(folder), *QUICK, *choice]
        dmq_export.main(args=command, standalone_mode=False)
    return load_checkpoint(folder)


def _row(family: str, recipe: Recipe, form: Form, onnx: Path) -> Row:
    model = load_onnx(onnx)
    nodes = integer_nodes(model)
    shapes = resolve_shapes(input_sizes(model), {}, Batch(*BATCHES[form.batch]))
    found = compile_onnx(Request(onnx, shapes, ((8, 9),)))
    if isinstance(found, Refusal):
        why = "; ".join([f"{error.node}: {error.text}" for error in found.errors] or found.log)
        return Row(family, recipe, form, f"{found.by}: {why}", len(nodes), 0, 0, None, 0)
    moved = found.table.activation_bytes / 1e6 if found.table.fixed else None
    integer = len(found.table.integer_nodes(nodes))
    kernels, constants = len(found.table.kernels), found.table.constant_bytes / 1e6
    return Row(family, recipe, form, "", len(nodes), integer, kernels, moved, constants)


def report(found: Iterable[Row]) -> str:
    """The table."""
    header = ("family", "recipe", "type", "batch", "verdict", "int8", "kernels", "activations", "constants")
    cells = [
        (
            row.family,
            " ".join(astuple(row.recipe)),
            *astuple(row.form),
            row.refused[:60] or "built",
            f"{row.integer}/{row.products}",
            str(row.kernels),
            "" if row.moved is None else f"{row.moved:.1f} MB",
            f"{row.constants:.2f} MB",
        )
        for row in found
    ]
    return table(header, cells, right=(5, 6, 7, 8))


def main() -> None:
    arguments = _parsed()
    found = []
    for family in arguments.families:
        recipe, once = CASES[family]
        if arguments.every_case_once:
            recipes, forms = [recipe], list(once)
        else:
            recipes, forms = RECIPES, [form for form in FORMS if form.dtype in arguments.types]
        for row in rows(family, recipes, forms):
            found.append(row)
            print(report([row]).splitlines()[-1], file=sys.stderr, flush=True)
    print(json.dumps([vars(row) for row in found], default=vars) if arguments.json else report(found))
    built, right = sum(not row.refused for row in found), sum(row.right for row in found)
    print(f"{built} of {len(found)} built, {right} with every product in int8", file=sys.stderr)
    sys.exit(right < len(found))


def _parsed() -> Any:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--types", nargs="+", choices=["float16", "float32"], default=["float16", "float32"])
    parser.add_argument("--every-case-once", action="store_true")
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


if __name__ == "__main__":
    main()
