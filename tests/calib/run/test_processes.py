"""Processes that wait for each other; their shares are in test_rank.py, the bytes they end with in test_resume.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from calib.run.processes import ProcessGroup, process_group
from dmq_export.errors import DmqError

ROOT = Path(__file__).resolve().parents[3]


def test_outside_of_torchrun_a_process_is_alone_and_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with process_group() as group:
        assert group == ProcessGroup(0, 1)
        assert group.leads
        group.wait()  # for nobody


AGREE = """
import sys
from calib.run.processes import process_group
with process_group() as group:  # a line at once, or lines of two processes mix
    sys.stdout.write(f"{group.index} {group.agree(lambda: f'chosen by {group.index}')}\\n")
"""


def together(script: Path) -> subprocess.CompletedProcess[str]:
    """Two processes that run it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*launcher, str(script)], env=environment, check=True, capture_output=True, text=True, timeout=120
    )


def test_all_processes_do_as_the_leader_chooses(tmp_path: Path) -> None:
    assert ProcessGroup().agree(lambda: 7) == 7
    (tmp_path / "agree.py").write_text(AGREE)
    done = together(tmp_path / "agree.py")
    assert sorted(done.stdout.splitlines()) == ["0 chosen by 0", "1 chosen by 0"]


LEAVE = """
import sys
from calib.run.processes import process_group
from dmq_export.errors import DmqError
try:
    with process_group() as group:
        if group.leads:
            raise DmqError("the reason")
        group.wait()
except DmqError as error:
    sys.stdout.write(f"{error}\\n")
"""


def test_the_others_say_that_one_has_ended(tmp_path: Path) -> None:
    (tmp_path / "leave.py").write_text(LEAVE)
    done = together(tmp_path / "leave.py")
    ended = "another process of this calibration has ended: its own message says why"
    assert sorted(done.stdout.splitlines()) == [ended, "the reason"]


def test_processes_that_nobody_introduced_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(DmqError, match=r"do not find each other \(.*MASTER_ADDR.*\): start them with torchrun"):
        process_group().__enter__()
