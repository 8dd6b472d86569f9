"""Bars on stderr, and the time each stage took."""

import json
import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pytest

import dmq_export.common.progress
from dmq_export.common.progress import Progress

ROOT = Path(__file__).resolve().parents[3]


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


def test_a_short_stage_leaves_nothing_in_a_log_file(capsys: pytest.CaptureFixture[str]) -> None:
    run_stage(Progress())
    assert capsys.readouterr() == ("", "")


def test_a_stage_of_some_seconds_leaves_a_line_at_its_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmq_export.common.progress, "SHORT", 0.0)
    run_stage(Progress())
    run_stage(Progress(show=False))
    assert capsys.readouterr() == ("", "layer fits: done in 0 s\n")


def test_a_log_that_cannot_be_written_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Progress(log=tmp_path / "missing" / "log.jsonl")


@pytest.mark.parametrize("show", [None, False])
def test_a_long_stage_leaves_lines_in_a_log_file_unless_bars_are_off(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, show: bool | None
) -> None:
    monkeypatch.setattr(dmq_export.common.progress, "LINE_SECONDS", 0.0)
    with Progress(show=show).stage("layer fits", 40, "layer") as advance:
        advance(10, "mid_block.to_q")
        advance(30)
    out, err = capsys.readouterr()
    assert out == ""
    first, *rest = err.splitlines() or ["", ""]
    if show is False:
        assert err == ""
    else:
        assert re.fullmatch(r"layer fits: 10 of 40 layers, 00:00 gone, 00:00 to go mid_block.to_q", first)
        assert rest == ["layer fits: 40 of 40 layers, 00:00 gone, 00:00 to go"]


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


def drawn(advances: str) -> subprocess.CompletedProcess[str]:
    """A stage of five in a process of its own, every advance drawn."""
    program = f"""
import dmq_export.common.progress
from dmq_export.common.progress import Progress
with Progress(show=True).stage("fits", 5, "layer") as advance:
    {advances}
"""
    environment = os.environ | {"TQDM_MININTERVAL": "0"}
    return subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )


def test_the_bar_counts_on_stderr_and_leaves_stdout_alone() -> None:
    done = drawn("advance(1); advance(4)")
    assert done.stdout == ""
    assert [count in done.stderr for count in ("0/5", "1/5", "5/5", "2/5")] == [True, True, True, False]


def test_the_log_has_a_line_of_json_for_everything_that_happens(tmp_path: Path) -> None:
    progress = Progress(show=False, log=tmp_path / "log")
    with progress.stage("fits", 5, "layer") as advance:
        advance(1, "to_q")
        advance(4)
    progress.note("done", checkpoint="out")
    progress.restarted().note("again")
    events = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    assert [event["event"] for event in events] == ["stage", "progress", "progress", "stage done", "done", "again"]
    assert all(event["at"] >= 0 for event in events)
    stage, first, second, finished, done, _ = ({key: e[key] for key in e if key != "at"} for e in events)
    assert stage == {"event": "stage", "stage": "fits", "total": 5, "unit": "layer"}
    assert first == {"event": "progress", "stage": "fits", "done": 1, "total": 5, "what": "to_q"}
    assert second == {"event": "progress", "stage": "fits", "done": 5, "total": 5}
    assert finished["peak_memory_bytes"] > 2**20
    assert 0 <= finished["seconds"] < 60
    assert done == {"event": "done", "checkpoint": "out"}


def test_the_bar_names_what_was_done() -> None:
    assert "to_k" in drawn("advance(1, 'to_q'); advance(4, 'to_k')").stderr


def test_a_stage_of_unknown_length_says_what_it_does_and_since_when(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dmq_export.common.progress, "LINE_SECONDS", 0.0)
    with Progress().stage("building", None, "phase") as advance:
        advance(0, "Optimizing graph")
    assert capsys.readouterr().err == "building: 00:00 gone Optimizing graph\n"
