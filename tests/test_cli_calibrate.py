"""``calibrate`` as a user meets it: plans, limits, logs, and going on after a stop."""

import json
import re
from pathlib import Path

import pytest
from test_cli import TINY, assert_refused, run

import calib.stages


def test_a_dry_run_says_what_would_happen_and_writes_nothing(tiny_model: Path, tmp_path: Path) -> None:
    shown = run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY, "--dry-run")
    assert shown.exit_code == 0, shown.output
    for words in ("conv_in", "first layer", "layers quantized", "peak memory", "time: total"):
        assert words in shown.stdout
    plan = json.loads(run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY, "--dry-run", "--json").stdout)
    assert plan["layers"] == len(plan["quantized"]) > 0
    assert plan["passes"] == 1
    assert plan["seconds"]["layer fits"] > 0
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_is_refused_before_any_work(tiny_model: Path, tmp_path: Path) -> None:
    for extra in ([], ["--dry-run"]):
        refused = run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY, "--max-memory", "10MB", *extra)
        assert_refused(refused, "takes about .*, 10.0 MiB is allowed: raise --max-memory")
    assert list(tmp_path.iterdir()) == []


def test_a_size_that_is_none_is_one_line(tiny_model: Path, tmp_path: Path) -> None:
    assert_refused(run("calibrate", tiny_model, "-o", tmp_path / "ckpt", "--max-memory", "much"), "'much' is no size")


def test_the_log_tells_every_stage_and_layer(tiny_model: Path, tmp_path: Path) -> None:
    done = run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY, "--log-json", tmp_path / "log.jsonl", "--json")
    assert done.exit_code == 0, done.output
    facts = json.loads(done.stdout)
    events = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert {e["name"] for e in events if e["event"] == "layer"} == set(facts["quantized"])
    assert {e["stage"] for e in events if e["event"] == "stage done"} == set(facts["seconds"])
    assert events[-1]["event"] == "done"
    assert facts["peak_memory_bytes"] > 2**27
    assert "peak_memory_of_a_worker_bytes" not in facts  # there was none


def test_the_memory_of_workers_is_told(tiny_model: Path, tmp_path: Path) -> None:
    done = run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY, "--workers", "2")
    assert re.search(r"peak memory [\d.]+ [MG]iB, [\d.]+ [MG]iB in a worker\n", done.stdout)


def test_the_same_command_goes_on_and_another_is_refused_in_one_line(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(calib.stages, "run_tasks", stop)
        assert run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY).exit_code != 0
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.work"]
    other = run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY, "--seed", "1")
    assert_refused(other, "ckpt.work holds an unfinished calibration with recipe.seed 0, this one has 1: repeat the")
    assert run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]
