"""Batches that become one file: whole or absent, from any number of processes, with the same bytes."""

import fcntl
import json
import re
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmq_export.errors import DmqError
from dmq_export.sampling.npz_shards import LOCK, SampleShards

SETTINGS = {"seed": 1, "labels": [1, 2], "eta": None}
BATCHES = [range(0, 3), range(3, 6), range(6, 7)]
SAMPLES = np.random.default_rng(0).standard_normal((7, 2, 4, 4), np.float32)
LABELS = {"labels": np.arange(7)}


def shards(target: Path, **changes: Any) -> SampleShards:
    return SampleShards(target, SETTINGS | changes, BATCHES)


def save(one: SampleShards, batches: list[range]) -> None:
    for indices in batches:
        one.save(indices, SAMPLES[indices.start : indices.stop])


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "samples.npz"


def test_all_batches_become_one_file_and_nothing_else(target: Path) -> None:
    one = shards(target)
    assert not one.finished()
    save(one, BATCHES)
    assert one.merge(LABELS)
    assert one.finished()
    assert [path.name for path in target.parent.iterdir()] == ["samples.npz"]
    with np.load(target) as file:
        assert set(file) == {"samples", "labels", "settings"}
        np.testing.assert_array_equal(file["samples"], SAMPLES)
        np.testing.assert_array_equal(file["labels"], LABELS["labels"])
        assert json.loads(str(file["settings"])) == SETTINGS


def test_the_files_samples_come_batch_by_batch(target: Path) -> None:
    one = shards(target)
    save(one, BATCHES)
    one.merge(LABELS)
    batches = list(one.samples())
    assert [len(batch) for batch in batches] == [3, 3, 1]
    np.testing.assert_array_equal(np.concatenate(batches), SAMPLES)


def test_numpy_reads_what_savez_would_have_written(target: Path) -> None:
    one = shards(target)
    save(one, BATCHES)
    one.merge({})
    np.savez(target.with_name("numpy.npz"), samples=SAMPLES, settings=np.array(json.dumps(SETTINGS)))
    assert target.read_bytes() == target.with_name("numpy.npz").read_bytes()


@given(order=st.permutations(range(3)), stops=st.lists(st.integers(0, 3), max_size=4))
@settings(max_examples=25, deadline=None)
def test_the_bytes_do_not_depend_on_order_or_restarts(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], stops: list[int]
) -> None:
    folder = tmp_path_factory.mktemp("order")
    whole = shards(folder / "whole.npz")
    save(whole, BATCHES)
    assert whole.merge(LABELS)
    target = folder / "parts.npz"
    for stop in [*stops, 3]:
        again = shards(target)
        missing = again.missing()
        save(again, [BATCHES[i] for i in order[:stop] if BATCHES[i] in missing])
        complete = not again.missing()
        assert again.merge(LABELS) is complete
        if complete:
            break
    assert target.read_bytes() == (folder / "whole.npz").read_bytes()


def test_without_all_batches_there_is_no_file(target: Path) -> None:
    one = shards(target)
    save(one, BATCHES[1:])
    assert one.missing() == BATCHES[:1]
    assert not one.merge(LABELS)
    assert not target.exists()
    assert shards(target).missing() == BATCHES[:1]


def test_a_process_that_comes_after_the_merge_finds_it_done(target: Path) -> None:
    late = shards(target)
    first = shards(target)
    save(first, BATCHES)
    assert first.merge(LABELS)
    assert late.merge(LABELS)
    assert late.finished()


def test_one_process_merges_at_a_time(target: Path) -> None:
    one = shards(target)
    save(one, BATCHES)
    with (one.folder / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        merge = threading.Thread(target=one.merge, args=(LABELS,))
        merge.start()
        merge.join(timeout=0.2)
        assert merge.is_alive()
        assert not target.exists()
    merge.join()
    assert one.finished()


def test_a_batch_that_was_being_written_is_missing(target: Path) -> None:
    one = shards(target)
    save(one, BATCHES)
    kept = next(path for path in one.folder.iterdir() if path.name.startswith("00000003"))
    kept.rename(one.folder / ".00000003-00000006.npy.half")
    assert shards(target).missing() == [BATCHES[1]]


def test_other_settings_are_refused_by_name(target: Path) -> None:
    save(shards(target), BATCHES[:1])
    with pytest.raises(DmqError, match=r"samples.npz.parts holds part of another run \(seed 1 there, 2 here\)"):
        shards(target, seed=2)


def test_a_run_that_began_since_is_not_mixed_with(target: Path) -> None:
    mine = shards(target)
    save(shards(target, seed=2), BATCHES[:1])
    with pytest.raises(DmqError, match=re.escape("(seed 2 there, 1 here)")):
        save(mine, BATCHES[1:])


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04damaged"])
def test_another_file_in_its_place_is_not_taken_for_it(target: Path, content: bytes) -> None:
    target.write_bytes(content)
    assert not shards(target).finished()


def test_a_file_of_other_settings_is_replaced(target: Path) -> None:
    np.savez(target, samples=np.zeros(3))
    one = shards(target)
    assert not one.finished()
    save(one, BATCHES)
    assert one.merge(LABELS)
    assert one.finished()
    assert not shards(target, seed=3).finished()


def test_nothing_is_made_before_the_first_batch(target: Path) -> None:
    shards(target)
    assert list(target.parent.iterdir()) == []
