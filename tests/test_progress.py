"""Bars on stderr, and the time each stage took."""

import os
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

from dmq_export.progress import Progress

ROOT = Path(__file__).resolve().parents[1]


def run_stage(progress: Progress, name: str = "layer fits") -> None:
    with progress.stage(name, 2, "layer") as advance:
        advance(1)
        advance(1)


def test_every_stage_is_timed_under_its_name() -> None:
    progress = Progress(show=False)
    run_stage(progress, "fit")
    run_stage(progress, "check")
    assert list(progress.seconds) == ["fit", "check"]
    assert min(progress.seconds.values()) > 0


def test_seconds_of_stages_with_one_name_add_up() -> None:
    progress = Progress(show=False)
    progress.seconds["fit"] = 1000.0
    run_stage(progress, "fit")
    assert 1000 < progress.seconds["fit"] < 1100
    assert list(progress.seconds) == ["fit"]


def test_an_error_in_a_stage_is_passed_on() -> None:
    with pytest.raises(RuntimeError, match="inside"), Progress(show=False).stage("fit", 1, "layer"):
        raise RuntimeError("inside")


def test_nothing_is_shown_where_stderr_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    run_stage(Progress())
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("show", "shown"), [(None, True), (True, True), (False, False)])
def test_a_terminal_shows_the_stage_unless_bars_are_off(
    monkeypatch: pytest.MonkeyPatch, show: bool | None, shown: bool
) -> None:
    terminal = StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    run_stage(Progress(show=show))
    assert ("layer fits" in terminal.getvalue()) == shown


def test_a_restarted_progress_has_counted_nothing_and_shows_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    first = Progress(show=True)
    run_stage(first)
    capsys.readouterr()
    second = first.restarted()
    assert second.seconds == {}
    run_stage(second, "again")
    assert "again" in capsys.readouterr().err
    assert list(first.seconds) == ["layer fits"]


def test_the_bar_counts_on_stderr_and_leaves_stdout_alone() -> None:
    program = """
from dmq_export.progress import Progress
with Progress(show=True).stage("fits", 5, "layer") as advance:
    advance(1)
    advance(4)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env=os.environ | {"TQDM_MININTERVAL": "0"},  # every advance is drawn
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == ""
    assert [count in done.stderr for count in ("0/5", "1/5", "5/5", "2/5")] == [True, True, True, False]
