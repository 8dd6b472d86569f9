"""Interleaved measuring: every call is timed as often, in rotating order."""

from collections import Counter

import pytest

from dmq_export.commands.bench import Latency, measure_interleaved


def test_percentiles_are_those_of_the_calls() -> None:
    latency = Latency((5.0, 1.0, 4.0, 2.0, 3.0))
    assert [latency.percentile(percent) for percent in (0, 50, 75, 100)] == [1, 3, 4, 5]


def test_each_call_comes_once_per_round_and_first_in_turn() -> None:
    order: list[tuple[str, int]] = []
    calls = {name: (lambda number, name=name: order.append((name, number))) for name in "abc"}
    done: list[int] = []
    latencies = measure_interleaved(calls, 4, done.append)
    assert Counter(order) == Counter((name, number) for name in "abc" for number in range(4))
    assert [name for name, _ in order[::3]] == ["a", "b", "c", "a"]
    assert [number for _, number in order] == sorted(number for _, number in order)
    assert {name: len(latency.seconds) for name, latency in latencies.items()} == dict.fromkeys("abc", 4)
    assert sum(done) == 12


def test_a_call_is_timed_from_its_start_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("dmq_export.commands.bench.time.perf_counter", lambda: now)
    latencies = measure_interleaved(
        {"a": lambda _: wait(2), "b": lambda number: wait(3 + number)}, 2, lambda _: wait(9)
    )
    assert {name: latency.seconds for name, latency in latencies.items()} == {"a": (2, 2), "b": (3, 4)}
