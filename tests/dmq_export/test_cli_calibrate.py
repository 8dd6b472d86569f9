"""``calibrate`` as a user meets it: plans, limits, logs, and going on after a stop."""

import json
import re
from pathlib import Path

import pytest
from command_line import TINY, assert_refused, run

import calib.run.stages


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
        stopped.setattr(calib.run.stages, "run_tasks", stop)
        interrupted = run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY)
        assert interrupted.exit_code == 130
        assert interrupted.stderr.endswith(
            f"Error: interrupted: what is finished is in {tmp_path / 'ckpt.work'}, the same command goes on\n"
        )
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.work"]
    for dry in ([], ["--dry-run"]):
        other = run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY, "--seed", "1", *dry)
        assert_refused(other, "ckpt.work holds an unfinished calibration with seed 0, this one has 1: repeat the")
    assert run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eta", "nan"], "nan is no finite number"),
        (["--guidance-scale", "inf"], "inf is no finite number"),
        (["--timestep-alpha", "inf"], "inf is no finite number"),
        (["--guidance-scale", "-1"], "-1.0 is not in the range x>=0"),
        (["--labels", "9-0"], "'9-0' runs backwards from 9 to 0: write 0-9"),
        (["--round-iters", "5"], "--round-iters is of AdaRound, the rounding is gptq"),
        (["--scheduler", "euler", "--eta", "0.5"], "EulerDiscreteScheduler takes none: use --scheduler ddim"),
    ],
)
def test_settings_that_make_no_sense_are_refused_by_the_plan_too(
    tiny_model: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    refused = run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY, *options, "--dry-run")
    assert_refused(refused, re.escape(message))
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_cannot_be_written_is_refused_at_once(tiny_model: Path, tmp_path: Path) -> None:
    log = tmp_path / "missing" / "log.jsonl"
    refused = run("calibrate", tiny_model, "-o", tmp_path / "ckpt", *TINY, "--log-json", log)
    assert_refused(refused, f"No such file or directory: {log}")
