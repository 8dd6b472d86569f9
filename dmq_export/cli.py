"""The command line: parses, calls one function, prints. Results go to stdout, all else to stderr."""

import json
import os
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from dmq_export import __version__
from dmq_export.batch import Batch
from dmq_export.cli_options import (
    FOLDER,
    BatchSizes,
    BitWidths,
    Grouped,
    LabelList,
    Number,
    Size,
    Whole,
    backend_option,
    choice,
    json_option,
    preset_option,
    provider_option,
    seed_option,
    threads_option,
)
from dmq_export.common.extras import EXTRAS, install
from dmq_export.errors import DmqError, StoppedError
from dmq_export.layer import Scheme
from dmq_export.recipe import Preset, PtsLayers, Rounding, Scales, recipe_from
from dmq_export.sampling.names import SCHEDULERS
from dmq_export.target import FloatType, Target
from engines.tensorrt.plan_file import HardwareCompatibility, RuntimeChoice

CALIBRATE_GROUPS = {
    "What to calibrate on": (
        *("samples", "steps", "scheduler", "eta", "labels", "null_label", "guidance_scale"),
        *("prompts", "prompt_embeds", "sample_size"),
    ),
    "How to quantize": (
        *("preset", "bits", "rounding", "round_iterations", "les_iterations", "timestep_alpha", "scheme", "scales"),
        *("pts_layers", "sensitive_share", "float_layers", "strict"),
    ),
    "How to run": ("device", "max_memory", "workers", "dry_run", "fresh", "log_json", "seed"),
}
SAMPLE_GROUPS = {
    "What to draw": (
        *("count", "labels", "null_label", "guidance_scale", "prompts", "prompt_file", "prompt_embeds"),
        *("steps", "scheduler", "eta", "seed"),
    ),
    "What to draw with": ("backend", "provider", "threads", "batch", "pipeline", "reference"),
}
BUILD_GROUPS = {
    "For TensorRT-RTX": ("compute_capability", "beside_float16"),
    "For TensorRT": (
        *("timing_cache", "optimization_level", "workspace", "version_compatible", "hardware_compatible"),
        *("refit", "strip_weights"),
    ),
}


class Group(click.Group):
    """Ends with one clear line and the error's exit status where the user made a mistake."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DmqError as error:
            message, status = str(error), error.exit_code
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else ctx.command_path
            message, status = f"{error.format_message()} (see {where} -h)", error.exit_code
        except ModuleNotFoundError as error:
            library = str(error.name).partition(".")[0]
            if library not in EXTRAS:
                raise
            message = f"this needs {library}, which is not installed: {install(library)}"
            status = DmqError.exit_code
        except OSError as error:
            what = error.strerror or str(error) or type(error).__name__
            message = what if error.filename is None else f"{what}: {error.filename}"
            status = DmqError.exit_code
        except KeyboardInterrupt:
            message, status = "interrupted", StoppedError.exit_code
        click.echo(f"Error: {message}", err=True)
        ctx.exit(status)


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(__version__, prog_name="dmq-export")
def main() -> None:
    """Quantize a diffusers denoiser to W4A8 or W4A6 with DMQ and carry it to an integer engine.

    \b
    dmq-export quickstart                          take the bundled model the whole way
    dmq-export calibrate digits -o ckpt            quantize a diffusers folder
    dmq-export onnx ckpt -o model.onnx             export, and prove the export equal
    dmq-export sample model.onnx -o samples.png    draw pictures
    """


@main.command(cls=Grouped, groups=CALIBRATE_GROUPS, short_help="Quantize a diffusers denoiser.")
@click.argument("model")
@click.option("-o", "--output", type=FOLDER, required=True, help="The checkpoint folder to write.")
@click.option("--preset", type=choice(Preset), default="balanced", help="Decides the defaults of the other options.")
@preset_option("--bits", "bits", BitWidths(), "How many bits weights and activations get, w3a3 to w8a8.")
@preset_option("--samples", "samples", Whole(1), "How many trajectories to calibrate on.")
@preset_option("--steps", "steps", Whole(1), "How many sampling steps a trajectory has.")
@preset_option("--scheduler", "scheduler", click.Choice(list(SCHEDULERS)), "Replaces the model's scheduler.")
@preset_option("--eta", "eta", Number(0, 1), "How much fresh noise DDIM adds, 0 to 1.")
@preset_option("--labels", "labels", LabelList(), "The class labels to draw in turn, such as 0-9.")
@preset_option("--null-label", "null_label", int, "The label that stands for no label in guidance.")
@preset_option(
    "--guidance-scale", "guidance_scale", Number(min=0), "Calibrates with classifier-free guidance of this scale."
)
@click.option("--prompts", type=FOLDER, help="A text file with a prompt per line, for the pipeline's own text encoder.")
@click.option("--prompt-embeds", type=FOLDER, help="An NPZ file of embeddings by argument name, instead of prompts.")
@preset_option("--sample-size", "sample_size", Whole(2), "The height and width of a Flux model's latents.")
@preset_option("--rounding", "rounding", choice(Rounding), "How the weights are rounded.")
@preset_option(
    "--les-iters",
    "les_iterations",
    Whole(0),
    "How many iterations equivalent scaling (LES) takes per layer; 0 leaves it out.",
)
@preset_option(
    "--timestep-alpha",
    "timestep_alpha",
    Number(min=0),
    "The exponent of the adaptive timestep weight; 0 weighs all steps alike.",
)
@preset_option("--round-iters", "round_iterations", Whole(0), "How many iterations AdaRound takes per block.")
@preset_option(
    "--activation-scheme", "scheme", choice(Scheme), "Whether a range's zero point is free or in the middle."
)
@preset_option("--activation-scales", "scales", choice(Scales), "Whether each sampling step has a range of its own.")
@preset_option("--pts-layers", "pts_layers", choice(PtsLayers), "Which layers vote on power-of-two scaling (PTS).")
@preset_option(
    "--sensitive-share",
    "sensitive_share",
    Number(0, 1),
    "Gives this share of the weights, where fewer bits cost most, w7a8.",
)
@click.option(
    "--float-layer",
    "float_layers",
    multiple=True,
    metavar="GLOB",
    help="Leaves the matching layers float; may be repeated.",
)
@seed_option
@click.option(
    "--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="The device to calibrate on."
)
@click.option(
    "--max-memory", type=Size(), show_default="what is free", help="Bounds the memory, such as 8GB; on CUDA the GPU's."
)
@click.option("--workers", type=Whole(1), show_default="cores", help="How many processes fit layers on the CPU.")
@click.option("--dry-run", is_flag=True, help="Only says what would be quantized, and what that would take.")
@click.option(
    "--log-json", type=click.Path(path_type=Path, dir_okay=False), help="A file that gets a line of JSON per event."
)
@click.option("--strict", is_flag=True, help="Fails if a layer stays float for another reason than policy.")
@click.option("--fresh", is_flag=True, help="Replaces an existing checkpoint and discards unfinished work.")
@json_option
def calibrate(
    model: str,
    output: Path,
    preset: Preset,
    dry_run: bool,
    as_json: bool,
    device: Any,
    max_memory: int | None,
    workers: int | None,
    log_json: Path | None,
    strict: bool,
    fresh: bool,
    prompts: Path | None,
    prompt_embeds: Path | None,
    **settings: Any,
) -> None:
    """Quantize the denoiser in the diffusers folder MODEL (or the bundled model "digits").

    A calibration that was stopped goes on where it was when the same command is given again. Under torchrun,
    the processes share the work.

    \b
    dmq-export calibrate digits -o ckpt --bits w4a6 --null-label 10
    torchrun --nproc-per-node 4 -m dmq_export calibrate MODEL -o ckpt
    """
    from dmq_export.commands.calibrate import Means, calibrate_model, plan_model
    from dmq_export.commands.prompts import Prompting
    from dmq_export.common.distributed import Rank

    recipe = recipe_from(preset, **settings)
    means = Means(device, max_memory, workers, log_json)
    prompting = Prompting(file=prompts, embeddings=prompt_embeds)
    run = plan_model if dry_run else calibrate_model
    result = run(model, output, recipe, means, prompting, strict=strict, fresh=fresh)
    if not Rank.of(os.environ).index:  # one of the processes of torchrun speaks for all
        click.echo(json.dumps(result.to_json(), indent=1) if as_json else result.text())


@main.command(short_help="Export a checkpoint to ONNX and prove the export equal.")
@click.argument("checkpoint", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, help="The ONNX file to write.")
@click.option("--target", type=choice(Target), default="portable", help="The runtime whose kernels the graph is for.")
@click.option(
    "--dtype",
    type=choice(FloatType),
    help="The type of all that is not integer.  [default: float16 for tensorrt, else float32]",
)
@click.option(
    "--batch", type=BatchSizes(), help="Which batch sizes: 8, or 1:4:8 for 1 to 8, tuned for 4.  [default: any]"
)
@click.option("--verify/--no-verify", default=True, help="Whether to prove the file equal to the PyTorch reference.")
@json_option
def onnx(
    checkpoint: Path,
    output: Path,
    target: Target,
    dtype: FloatType | None,
    batch: Batch | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Export a DMQ CHECKPOINT to an ONNX file, and prove the file equal to it layer by layer.

    The portable graph has 4-bit weights and runs in ONNX Runtime as it is; the graphs for tensorrt and openvino have
    8-bit weights, which their integer kernels execute.

    \b
    dmq-export onnx ckpt -o model.onnx
    dmq-export onnx ckpt -o int8.onnx --target tensorrt --batch 2
    """
    from dmq_export.commands.export import export_onnx
    from dmq_export.common.progress import Progress

    export = export_onnx(checkpoint, output, Progress(), target=target, dtype=dtype, batch=batch, verify=verify)
    for note in export.notes:
        click.echo(note, err=True)
    click.echo(json.dumps(asdict(export), indent=1, default=str) if as_json else export.text())


@main.command(short_help="Say what NVIDIA's compiler would say of an ONNX file.")
@click.argument("file", type=FOLDER)
@click.option(
    "--runtime", type=click.Choice(["tensorrt-rtx", "tensorrt"]), default="tensorrt-rtx", help="Whose rules to check."
)
@click.option(
    "--runtime-version",
    "version",
    metavar="VERSION",
    help="Which version's rules.  [default: 1.7.1; 10.10 for tensorrt]",
)
@click.option(
    "--gpu", metavar="SM", help="The GPU's compute capability, such as sm89.  [default: the runtime's own choice]"
)
@click.option("--compile", "compiles", is_flag=True, help="Asks TensorRT-RTX's compiler too, which needs no GPU.")
@click.option(
    "--shapes", multiple=True, metavar="NAME:MIN,OPT,MAX", help="The sizes of open inputs for --compile.  [default: 1]"
)
@json_option
def lint(
    file: Path,
    runtime: Any,
    version: str | None,
    gpu: str | None,
    compiles: bool,
    shapes: tuple[str, ...],
    as_json: bool,
) -> None:
    """Say what TensorRT-RTX, or TensorRT, would say of the ONNX FILE, of any tool; exit 1 where it takes none.

    \b
    dmq-export lint model.onnx                       by rules, without either
    dmq-export lint model.onnx --compile             by rules and by TensorRT-RTX's compiler
    dmq-export lint model.onnx --runtime tensorrt --runtime-version 10.13
    """
    from dmq_export.commands.lint import lint_file
    from dmq_export.lint import lint_target
    from engines.tensorrt.profile import parse_shapes

    target = lint_target(runtime, version, gpu)
    if target.note is not None:
        click.echo(target.note, err=True)
    if shapes and not compiles:
        raise click.UsageError("--shapes is for --compile.")
    result = lint_file(file, target, parse_shapes(shapes) if compiles else None)
    click.echo(json.dumps(result.to_json(), indent=1) if as_json else result.text())
    click.get_current_context().exit(0 if result.ok else 1)


@main.command(short_help="Say what a checkpoint, an ONNX file or a plan is.")
@click.argument("path", type=FOLDER)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH is: a checkpoint folder, an ONNX file, or a plan of TensorRT or TensorRT-RTX."""
    from dmq_export.commands.inspect import inspect as run

    result = run(path)
    click.echo(json.dumps(result.to_json(), indent=1) if as_json else result.text())


@main.command(cls=Grouped, groups=BUILD_GROUPS, short_help="Build an engine for NVIDIA GPUs.")
@click.argument("onnx", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="The plan to write; its .engine.json comes beside it.")
@click.option(
    "--runtime",
    type=choice(RuntimeChoice),
    default="auto",
    help="Which runtime builds; auto takes TensorRT where it and a GPU are there, and TensorRT-RTX elsewhere.",
)
@click.option(
    "--shapes", multiple=True, metavar="NAME:MIN,OPT,MAX", help="The range of an input of open size: 1x4x64x64,..."
)
@click.option("--strict", is_flag=True, help="Write nothing and exit with 1 if a product meant for Int8 runs in float.")
@click.option(
    "--compute-capability",
    multiple=True,
    metavar="X.Y",
    help="A kind of GPU that TensorRT-RTX builds for, such as 8.9; may be repeated.  [default: NVIDIA's choice]",
)
@click.option(
    "--beside-float16", is_flag=True, help="Let TensorRT-RTX compile the graph before quantization too, to compare."
)
@click.option("--timing-cache", type=FOLDER, metavar="FILE", help="A file that makes later builds faster.")
@click.option("--optimization-level", type=Whole(0, 5), default=3, help="5 builds longest and runs fastest.")
@click.option("--workspace", type=Size(), metavar="SIZE", help="The GPU memory that kernels may use.  [default: all]")
@click.option("--version-compatible", is_flag=True, help="Let the plan run on later TensorRT versions too.")
@click.option(
    "--hardware-compatible",
    type=choice(HardwareCompatibility),
    default="none",
    help="Let the plan run on other GPUs too.",
)
@click.option("--refit", is_flag=True, help="Let the plan's weights be replaced later.")
@click.option("--strip-weights", is_flag=True, help="Leave the weights out; loading needs the ONNX file.")
@click.option("--lint-only", is_flag=True, help="Check the file and stop; this needs no runtime and no GPU.")
@json_option
def trt_build(
    onnx: Path,
    output: Path | None,
    runtime: RuntimeChoice,
    shapes: tuple[str, ...],
    strict: bool,
    compute_capability: tuple[str, ...],
    beside_float16: bool,
    lint_only: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Build a plan for NVIDIA GPUs from an ONNX file made by onnx --target tensorrt.

    TensorRT-RTX builds on any machine with Linux or Windows on x86-64, for GeForce and RTX GPUs. TensorRT builds on a
    machine with a GPU, for that GPU; the options from --timing-cache to --strip-weights are for it alone.

    \b
    dmq-export trt-build model.onnx -o model.plan --compute-capability 8.9
    dmq-export trt-build model.onnx -o model.plan --shapes sample:1x4x64x64,2x4x64x64,8x4x64x64
    """
    if lint_only:
        click.get_current_context().invoke(lint, file=onnx, as_json=as_json)
    if output is None:
        raise click.UsageError("Missing option '-o' / '--output'.")
    from dmq_export.commands.trt_build import Order, build_engine
    from dmq_export.common.progress import Progress
    from engines.tensorrt.build import BuildSettings
    from engines.tensorrt.capability import parse_capabilities
    from engines.tensorrt.profile import parse_shapes

    order = Order(runtime, parse_shapes(shapes), parse_capabilities(compute_capability), beside_float16, strict)
    note = partial(click.echo, err=True)
    result = build_engine(onnx, output, order, BuildSettings(**settings), Progress(), note)
    click.echo(json.dumps(result.to_json(), indent=1) if as_json else result.text())


@main.command(cls=Grouped, groups=SAMPLE_GROUPS, short_help="Draw pictures from an engine.")
@click.argument("engine", type=FOLDER)
@click.option("-o", "--output", "picture", type=FOLDER, help="The PNG file to write.")
@click.option(
    "--npz", type=FOLDER, help="An NPZ file for the raw samples; resumes, and shares the work under torchrun."
)
@backend_option
@provider_option
@threads_option
@click.option("--reference", metavar="MODEL", help="A float model to sample beside, from the same noise.")
@click.option("--num", "count", type=Whole(1), default=20, help="How many samples to draw.")
@click.option("--steps", type=Whole(1), help="How many sampling steps to take.  [default: as calibrated]")
@click.option(
    "--scheduler", type=click.Choice(list(SCHEDULERS)), help="Which scheduler samples.  [default: as calibrated]"
)
@click.option("--eta", type=Number(0, 1), help="How much fresh noise DDIM adds, 0 to 1.  [default: as calibrated]")
@click.option(
    "--labels", type=LabelList(), default=(), show_default="all", help="The class labels to draw in turn, such as 0-9."
)
@click.option(
    "--guidance-scale", type=Number(min=0), help="Samples with classifier-free guidance of this scale.  [default: none]"
)
@click.option("--null-label", type=int, help="The label that stands for no label in guidance.")
@click.option("--pipeline", type=FOLDER, help="Its text encoder reads prompts, its decoder makes pictures of latents.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="A prompt to draw; several take turns.")
@click.option("--prompts", "prompt_file", type=FOLDER, help="A text file with a prompt per line.")
@click.option("--prompt-embeds", type=FOLDER, help="An NPZ file of embeddings by argument name, instead of prompts.")
@click.option("--batch", type=Whole(1), show_default="the graph's, or 32", help="How many samples an evaluation takes.")
@seed_option
def sample(
    engine: Path,
    picture: Path | None,
    npz: Path | None,
    reference: str | None,
    backend: Any,
    provider: str | None,
    threads: int | None,
    pipeline: Path | None,
    prompts: tuple[str, ...],
    prompt_file: Path | None,
    prompt_embeds: Path | None,
    **settings: Any,
) -> None:
    """Draw pictures from ENGINE: a .plan, an ONNX file, or a checkpoint folder (the PyTorch reference)."""
    from dmq_export.commands.engine import Execution
    from dmq_export.commands.prompts import Prompting
    from dmq_export.commands.sample import Outputs, sample_engine
    from dmq_export.commands.sampler import SampleSettings
    from dmq_export.common.progress import Progress

    outputs = Outputs(picture, npz, reference, pipeline)
    execution = Execution(backend, provider, threads)
    prompting = Prompting(prompts, prompt_file, prompt_embeds)
    click.echo(sample_engine(engine, SampleSettings(**settings), outputs, Progress(), execution, prompting).text())


@main.command(short_help="Measure engines side by side in one run.")
@click.argument("engines", nargs=-1, required=True, metavar="ENGINE...")
@click.option("--reference", metavar="MODEL", help="A float model to measure too; ratios are to it.")
@click.option("--batch", type=Whole(1), show_default="the graph's, or 1", help="How many samples an evaluation takes.")
@click.option("--repeat", type=Whole(1), default=50, help="How many evaluations of each engine are timed.")
@click.option("--warm-up", type=Whole(1), default=3, help="How many evaluations of each engine come before.")
@threads_option
@json_option
def bench(engines: tuple[str, ...], reference: str | None, as_json: bool, **settings: Any) -> None:
    """Measure engines in turns within one run: latency, images/s, memory, and ratios.

    \b
    ENGINE is a path, BACKEND:PATH, or onnxruntime-PROVIDER:PATH:
    dmq-export bench onnxruntime:model.onnx openvino:model.onnx --reference digits
    """
    from dmq_export.commands.bench import BenchSettings, bench_engines
    from dmq_export.common.progress import Progress

    result = bench_engines(engines, BenchSettings(**settings), Progress(), reference)
    click.echo(json.dumps(asdict(result), indent=1) if as_json else result.text())


@main.command(short_help="Say what this machine can do, and how to get the rest.")
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can calibrate, export, build and run, and how to get what is missing."""
    from dmq_export.commands.doctor import examine

    result = examine()
    click.echo(json.dumps(asdict(result), indent=1) if as_json else result.text())


@main.command(short_help="Take the bundled model the whole way.")
@click.option("-o", "--output", type=FOLDER, default=Path("dmq-quickstart"), help="The folder for all results.")
@click.option("--num", "count", type=Whole(1), default=400, help="How many samples to draw of each model.")
@seed_option
@json_option
def quickstart(output: Path, count: int, seed: int, as_json: bool) -> None:
    """Calibrate, export, sample and compile the bundled model at W4A8 and W4A6, and compare."""
    from dmq_export.commands.quickstart import quickstart as run
    from dmq_export.common.progress import Progress

    result = run(output, Progress(), count=count, seed=seed)
    click.echo(json.dumps(asdict(result), indent=1, default=str) if as_json else result.text())
