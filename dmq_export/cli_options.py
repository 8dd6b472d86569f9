"""Types of the command line's options, and the options that several commands share."""

import math
from collections.abc import Callable
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


class Number(click.FloatRange):
    """A number in a range; click's own takes ``nan`` for one."""

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


def preset_option(*names: str, field: str, **attributes: Any) -> Callable[[Command], Command]:
    """An option whose default is the preset's; the help shows each preset's value."""
    values = {name: getattr(recipe, field) for name, recipe in PRESETS.items()}
    words = {None: "none", (): "all"}
    shown = [str(words.get(value, value)) for value in values.values()]
    default = shown[0] if len(set(shown)) == 1 else f"{'/'.join(shown)} with {'/'.join(values)}"
    attributes["help"] = f"{attributes['help']}  [default: {default}]"
    return click.option(*names, field, default=None, show_default=False, **attributes)


def choice(literal: Any) -> click.Choice[str]:
    return click.Choice(list(get_args(literal)))


json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
seed_option = click.option("--seed", type=click.IntRange(min=0), default=0, help="Of everything random.")
backend_option = click.option("--backend", type=choice(Backend), default="auto", help="To run on.")
provider_option = click.option("--provider", help="cpu, cuda, tensorrt or tensorrt-rtx.  [default: cpu]")
threads_option = click.option("--threads", type=click.IntRange(min=1), help="CPU threads.  [default: the backend's]")
