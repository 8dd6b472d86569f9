"""Quantizes diffusers denoisers with DMQ and carries them to integer engines.

The names below are all there is to import from here; each is loaded when it is first used (docs/api.md).
"""

TYPE_CHECKING = False  # as type checkers know it; importing typing for it would take longer than all else here
if TYPE_CHECKING:
    from dmq_export.batch import Batch
    from dmq_export.bits import Bits
    from dmq_export.checkpoint import Checkpoint, load_checkpoint
    from dmq_export.commands.calibrate import Means
    from dmq_export.commands.calibrate import calibrate_model as calibrate
    from dmq_export.commands.engine import Engine, Execution, open_engine
    from dmq_export.commands.export import export_onnx as export
    from dmq_export.commands.inspect import inspect
    from dmq_export.commands.lint import lint_file
    from dmq_export.commands.pipeline import load_pipeline
    from dmq_export.commands.prompts import Prompting
    from dmq_export.commands.sampler import SampleSettings
    from dmq_export.commands.sampler import draw_samples as sample
    from dmq_export.commands.trt_build import Order
    from dmq_export.commands.trt_build import build_engine as build
    from dmq_export.errors import DmqError
    from dmq_export.recipe import Recipe

__version__ = "0.1.0"
__all__ = [
    "Batch",
    "Bits",
    "Checkpoint",
    "DmqError",
    "Engine",
    "Execution",
    "Means",
    "Order",
    "Prompting",
    "Recipe",
    "SampleSettings",
    "__version__",
    "build",
    "calibrate",
    "export",
    "inspect",
    "lint_file",
    "load_checkpoint",
    "load_pipeline",
    "open_engine",
    "sample",
]

_HOMES = {  # name here -> module and name there
    "Batch": ("batch", "Batch"),
    "Bits": ("bits", "Bits"),
    "Checkpoint": ("checkpoint", "Checkpoint"),
    "DmqError": ("errors", "DmqError"),
    "Engine": ("commands.engine", "Engine"),
    "Execution": ("commands.engine", "Execution"),
    "Means": ("commands.calibrate", "Means"),
    "Order": ("commands.trt_build", "Order"),
    "Prompting": ("commands.prompts", "Prompting"),
    "Recipe": ("recipe", "Recipe"),
    "SampleSettings": ("commands.sampler", "SampleSettings"),
    "build": ("commands.trt_build", "build_engine"),
    "calibrate": ("commands.calibrate", "calibrate_model"),
    "export": ("commands.export", "export_onnx"),
    "inspect": ("commands.inspect", "inspect"),
    "lint_file": ("commands.lint", "lint_file"),
    "load_checkpoint": ("checkpoint", "load_checkpoint"),
    "load_pipeline": ("commands.pipeline", "load_pipeline"),
    "open_engine": ("commands.engine", "open_engine"),
    "sample": ("commands.sampler", "draw_samples"),
}

if not TYPE_CHECKING:  # hidden from type checkers, so that they still report a name that does not exist

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name not in _HOMES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module, attribute = _HOMES[name]
        return getattr(import_module(f"{__name__}.{module}"), attribute)

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
