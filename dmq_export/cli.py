"""The command line: parses, calls one function, prints. Results go to stdout, all else to stderr."""

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from dmq_export import __version__
from dmq_export.cli_options import (
    FOLDER,
    BatchSizes,
    BitWidths,
    LabelList,
    Number,
    Size,
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
    dmq-export quickstart                            the whole road on the bundled model
    dmq-export calibrate digits -o ckpt              quantize: a diffusers folder, or the bundled model
    dmq-export onnx ckpt -o model.onnx               export, and prove the export equal
    dmq-export sample model.onnx -o samples.png      pictures
    """


@main.command()
@click.argument("model")
@click.option("-o", "--output", type=FOLDER, required=True, help="Checkpoint folder to write.")
@click.option("--preset", type=choice(Preset), default="balanced", help="Where the other defaults come from.")
@preset_option("--bits", field="bits", type=BitWidths(), help="Weight and activation bits, w3a3 to w8a8.")
@preset_option("--samples", field="samples", type=click.IntRange(min=1), help="Trajectories to calibrate on.")
@preset_option("--steps", field="steps", type=click.IntRange(min=1), help="Sampling steps of a trajectory.")
@preset_option("--scheduler", field="scheduler", type=click.Choice(list(SCHEDULERS)), help="Instead of the model's.")
@preset_option("--eta", field="eta", type=Number(0, 1), help="DDIM's noise share.")
@preset_option("--labels", field="labels", type=LabelList(), help="Class labels, such as 0-9.")
@preset_option("--null-label", field="null_label", type=int, help="The label that stands for no label.")
@preset_option("--guidance-scale", field="guidance_scale", type=Number(min=0), help="Classifier-free guidance.")
@click.option("--prompts", type=FOLDER, help="Text file, a prompt per line, for the pipeline's own text encoder.")
@click.option("--prompt-embeds", type=FOLDER, help="NPZ file of embeddings by argument name, instead of prompts.")
@preset_option("--sample-size", field="sample_size", type=click.IntRange(min=2), help="Latents of a Flux model.")
@preset_option("--rounding", field="rounding", type=choice(Rounding), help="Of the weights.")
@preset_option("--les-iters", field="les_iterations", type=click.IntRange(min=0), help="Equivalent scaling.")
@preset_option("--timestep-alpha", field="timestep_alpha", type=Number(min=0), help="Adaptive step weight.")
@preset_option("--round-iters", field="round_iterations", type=click.IntRange(min=0), help="AdaRound, per block.")
@preset_option("--activation-scheme", field="scheme", type=choice(Scheme), help="Zero point free or fixed.")
@preset_option("--activation-scales", field="scales", type=choice(Scales), help="A range per step, or one.")
@preset_option("--pts-layers", field="pts_layers", type=choice(PtsLayers), help="Power-of-two scaling.")
@preset_option("--sensitive-share", field="sensitive_share", type=Number(0, 1), help="Of the weights, for w7a8.")
@click.option("--float-layer", "float_layers", multiple=True, metavar="GLOB", help="Leave matching layers float.")
@seed_option
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="To calibrate on.")
@click.option("--max-memory", type=Size(), show_default="what is free", help="Such as 8GB; of the GPU on CUDA.")
@click.option("--workers", type=click.IntRange(min=1), show_default="cores", help="Processes that fit on the CPU.")
@click.option("--dry-run", is_flag=True, help="Only say what would be quantized, and what that would take.")
@click.option("--log-json", type=click.Path(path_type=Path, dir_okay=False), help="File for a line of JSON per event.")
@click.option("--strict", is_flag=True, help="Fail if a layer stays float for another reason than policy.")
@click.option("--fresh", is_flag=True, help="Replace an existing checkpoint; discard unfinished work.")
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
    from dmq_export.commands.calibrate import Job, Means, calibrate_model, plan_model
    from dmq_export.commands.prompts import Prompting

    recipe = recipe_from(preset, **settings)
    means = Means(device, max_memory, workers, log_json)
    prompting = Prompting(file=prompts, embeddings=prompt_embeds)
    job = Job(model, output, recipe, means, prompting, strict=strict, fresh=fresh)
    result = plan_model(job) if dry_run else calibrate_model(job)
    if result is not None:  # one of the processes of torchrun speaks for all
        click.echo(json.dumps(result.to_json(), indent=1) if as_json else result.text())


@main.command()
@click.argument("checkpoint", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, help="ONNX file to write.")
@click.option("--target", type=choice(Target), default="portable", help="The runtime whose kernels the graph is for.")
@click.option("--dtype", type=choice(FloatType), default="float32", help="Of all that is not integer (TensorRT).")
@click.option("--batch", type=BatchSizes(), help="Such as 8, or 1:4:8 (from 1 to 8, tuned for 4).  [default: any]")
@click.option("--verify/--no-verify", default=True, help="Prove the file equal to the PyTorch reference.")
@json_option
def onnx(checkpoint: Path, output: Path, verify: bool, as_json: bool, **choices: Any) -> None:
    """Export a DMQ CHECKPOINT to ONNX: QuantizeLinear/DequantizeLinear, 4-bit weights."""
    from dmq_export.commands.export import export_onnx
    from dmq_export.common.progress import Progress

    export = export_onnx(checkpoint, output, Progress(), verify=verify, **choices)
    for note in export.notes:
        click.echo(note, err=True)
    click.echo(json.dumps(asdict(export), indent=1, default=str) if as_json else export.text())


@main.command()
@click.argument("file", type=FOLDER)
@json_option
def lint(file: Path, as_json: bool) -> None:
    """Check the ONNX FILE, of any tool, against TensorRT's rules for quantized graphs; exit 1 on errors."""
    from dmq_export.commands.lint import lint_file

    result = lint_file(file)
    click.echo(json.dumps(result.to_json(), indent=1) if as_json else result.text())
    click.get_current_context().exit(0 if result.ok else 1)


@main.command()
@click.argument("path", type=FOLDER)
@json_option
def inspect(path: Path, as_json: bool) -> None:
    """Say what PATH is: a checkpoint folder, an ONNX file, or a plan of TensorRT or TensorRT-RTX."""
    from dmq_export.commands.inspect import inspect as run

    result = run(path)
    click.echo(json.dumps(result.to_json(), indent=1) if as_json else result.text())


@main.command()
@click.argument("onnx", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, help="Plan to write, with its .engine.json beside it.")
@click.option(
    "--runtime", type=choice(RuntimeChoice), default="auto", help="auto: TensorRT if it and a GPU are there, else RTX."
)
@click.option("--shapes", multiple=True, metavar="NAME:MIN,OPT,MAX", help="Of an input of open size: 1x4x64x64,...")
@click.option("--strict", is_flag=True, help="Fail, and write nothing, if a product meant for Int8 runs in float.")
@click.option(
    "--compute-capability",
    multiple=True,
    metavar="X.Y",
    help="GPU to build for, such as 8.9 (RTX).  [default: NVIDIA's]",
)
@click.option("--beside-float16", is_flag=True, help="Compile the graph without quantizers too, to compare (RTX).")
@click.option("--timing-cache", type=FOLDER, metavar="FILE", help="Read and extended; makes later builds faster.")
@click.option("--optimization-level", type=click.IntRange(0, 5), default=3, help="5 builds longest and runs fastest.")
@click.option("--workspace", type=Size(), metavar="SIZE", help="GPU memory for kernels.  [default: all]")
@click.option("--version-compatible", is_flag=True, help="Run on later TensorRT versions too.")
@click.option(
    "--hardware-compatible", type=choice(HardwareCompatibility), default="none", help="Run on other GPUs too."
)
@click.option("--refit", is_flag=True, help="Weights can be replaced later.")
@click.option("--strip-weights", is_flag=True, help="Leave the weights out; loading needs the ONNX file.")
@click.option("--lint-only", is_flag=True, help="Check the file and stop; needs neither TensorRT nor a GPU.")
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

    TensorRT-RTX (--runtime tensorrt-rtx) builds on any machine for GeForce and RTX GPUs. TensorRT builds on a machine
    with a GPU, for that GPU; the options from --timing-cache on are for it.

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


@main.command()
@click.argument("engine", type=FOLDER)
@click.option("-o", "--output", "picture", type=FOLDER, help="PNG file to write.")
@click.option("--npz", type=FOLDER, help="Raw samples (and labels) to write; resumes, and shares under torchrun.")
@backend_option
@provider_option
@threads_option
@click.option("--reference", metavar="MODEL", help="Float model to sample beside, from the same noise.")
@click.option("--num", "count", type=click.IntRange(min=1), default=20, help="Samples.")
@click.option("--steps", type=click.IntRange(min=1), help="Sampling steps.  [default: as calibrated]")
@click.option("--scheduler", type=click.Choice(list(SCHEDULERS)), help="[default: as calibrated]")
@click.option("--eta", type=Number(0, 1), help="DDIM's noise share.  [default: as calibrated]")
@click.option("--labels", type=LabelList(), default=(), show_default="all", help="Class labels, such as 0-9.")
@click.option("--guidance-scale", type=Number(min=0), help="Classifier-free guidance.  [default: none]")
@click.option("--null-label", type=int, help="The label that stands for no label.")
@click.option("--pipeline", type=FOLDER, help="Its text encoder reads prompts, its decoder makes pictures of latents.")
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="To draw; several take turns.")
@click.option("--prompts", "prompt_file", type=FOLDER, help="Text file, a prompt per line.")
@click.option("--prompt-embeds", type=FOLDER, help="NPZ file of embeddings by argument name, instead of prompts.")
@click.option("--batch", type=click.IntRange(min=1), show_default="the graph's, or 32", help="Samples per evaluation.")
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


@main.command()
@click.argument("engines", nargs=-1, required=True, metavar="ENGINE...")
@click.option("--reference", metavar="MODEL", help="Float model to measure too; ratios are to it.")
@click.option("--batch", type=click.IntRange(min=1), show_default="the graph's, or 1", help="Samples per evaluation.")
@click.option("--repeat", type=click.IntRange(min=1), default=50, help="Evaluations of each that are timed.")
@click.option("--warm-up", type=click.IntRange(min=1), default=3, help="Evaluations of each before, not timed.")
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


@main.command()
@json_option
def doctor(as_json: bool) -> None:
    """Say what this machine can calibrate, export, build and run, and how to get what is missing."""
    from dmq_export.commands.doctor import examine

    result = examine()
    click.echo(json.dumps(asdict(result), indent=1) if as_json else result.text())


@main.command()
@click.option("-o", "--output", type=FOLDER, default=Path("dmq-quickstart"), help="Folder for all results.")
@click.option("--num", "count", type=click.IntRange(min=1), default=400, help="Samples per model.")
@seed_option
@json_option
def quickstart(output: Path, count: int, seed: int, as_json: bool) -> None:
    """Calibrate, export and sample the bundled model at W4A8 and W4A6, and compare."""
    from dmq_export.commands.quickstart import quickstart as run
    from dmq_export.common.progress import Progress

    result = run(output, Progress(), count=count, seed=seed)
    click.echo(json.dumps(asdict(result), indent=1, default=str) if as_json else result.text())
