"""Types of the command line's options, and the options that several commands share."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import click

from dmq_export.batch import Batch
from dmq_export.bits import Bits
from dmq_export.commands.engine import Backend
from dmq_export.common.memory import parse_size
from dmq_export.recipe import PRESETS

FOLDER = click.Path(path_type=Path)
Command = Callable[..., Any]


class LabelList(click.ParamType[tuple[int, ...]]):
    """``0,3,7`` or ``0-9``, also mixed."""

    name = "labels"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        if isinstance(value, tuple):
            return value
        labels: list[int] = []
        for piece in str(value).split(","):
            first, _, last = piece.strip().partition("-")
            if not first.isdigit() or not (last.isdigit() or not last):
                self.fail(f"{value!r} is no list of labels: write 0,3,7 or 0-9", param, ctx)
            if int(last or first) < int(first):
                self.fail(f"{value!r} runs backwards from {first} to {last}: write {last}-{first}", param, ctx)
            labels += range(int(first), int(last or first) + 1)
        return tuple(labels)


class Whole(click.IntRange):
    """A whole number in a range."""

    name = "n"


class Number(click.FloatRange):
    """A number in a range; click's own takes ``nan`` for one."""

    name = "x"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number", param, ctx)
        return number


class Size(click.ParamType[int]):
    """``8GB``."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        return value if isinstance(value, int) else parse_size(str(value))


class BitWidths(click.ParamType[Bits]):
    """``w4a8``."""

    name = "bits"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Bits:
        return value if isinstance(value, Bits) else Bits.parse(str(value))


class BatchSizes(click.ParamType[Batch]):
    """``8``, or ``1:4:8``."""

    name = "sizes"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Batch:
        return value if isinstance(value, Batch) else Batch.parse(str(value))


class Grouped(click.Command):
    """A command whose options stand under headings.

    Args:
        groups: parameters by heading; all others stand under ``Options`` at the end.
    """

    def __init__(self, *args: Any, groups: Mapping[str, Sequence[str]], **attributes: Any) -> None:
        super().__init__(*args, **attributes)
        self.groups = groups

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per heading."""
        options = [param for param in self.get_params(ctx) if isinstance(param, click.Option)]
        records = {option.name: option.get_help_record(ctx) for option in options}
        sections = {heading: [records.pop(name) for name in names] for heading, names in self.groups.items()}
        for heading, rows in {**sections, "Options": list(records.values())}.items():
            with formatter.section(heading):
                formatter.write_dl([row for row in rows if row is not None])


def preset_option(name: str, field: str, kind: Any, text: str) -> Callable[[Command], Command]:
    """An option for the recipe's ``field`` whose default is the preset's; the help shows each preset's value."""
    values = {preset: getattr(recipe, field) for preset, recipe in PRESETS.items()}
    words = {None: "none", (): "all"}
    shown = [str(words.get(value, value)) for value in values.values()]
    default = shown[0] if len(set(shown)) == 1 else f"{'/'.join(shown)} with {'/'.join(values)}"
    help_text = f"{text}  [default: {default}]"
    return click.option(name, field, type=kind, default=None, show_default=False, help=help_text)


def choice(literal: Any) -> click.Choice[str]:
    return click.Choice(list(get_args(literal)))


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
seed_option = click.option("--seed", type=Whole(0), default=0, help="Decides everything that is random.")
backend_option = click.option(
    "--backend", type=choice(Backend), default="auto", help="The runtime to run on; auto goes by the file."
)
provider_option = click.option(
    "--provider", metavar="NAME", help="Where ONNX Runtime runs: cpu, cuda, tensorrt or tensorrt-rtx.  [default: cpu]"
)
threads_option = click.option("--threads", type=Whole(1), help="How many CPU threads to use.  [default: the backend's]")
