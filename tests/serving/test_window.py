"""The window of figures: percentiles that are right, steps that pass, memory that stays."""

import threading
from itertools import pairwise

import numpy as np
import pytest

from tfrec.serving.window import STEP, STEPS, Window


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def window(clock):
    return Window(("state", "total"), clock=clock, calendar=lambda: 5000.0 + clock.now)


def test_percentiles_are_those_of_the_times_within_a_few_percent(window):
    times = np.random.default_rng(1).lognormal(-5, 1, 3000)
    for took in times:
        window.record(False, {"total": float(took)})
    found = window.summary()["latency"]["total"]
    for name, share in (("p50", 50), ("p90", 90), ("p99", 99)):
        assert found[name] == pytest.approx(1000 * np.percentile(times, share), rel=0.04)
    assert found["count"] == 3000


@pytest.mark.parametrize("took", [0.0, 1e-9, 1e-5, 0.001, 99.0, 1e6])
def test_any_time_has_a_place(window, took):
    window.record(False, {"total": took})
    found = window.summary()["latency"]["total"]["p50"]
    assert found == pytest.approx(1000 * min(max(took, 1e-5), 100), rel=0.06)


def test_stages_are_apart(window):
    window.record(False, {"state": 0.001, "total": 0.1})
    window.record(False, {"total": 0.1})
    found = window.summary()["latency"]
    assert [found["state"]["count"], found["total"]["count"]] == [1, 2]
    assert found["state"]["p50"] < found["total"]["p50"]


def test_what_was_not_timed_has_no_percentile(window):
    window.record(True)
    found = window.summary()
    assert found["latency"]["total"] == {"p50": None, "p90": None, "p99": None, "count": 0}
    assert (found["requests"], found["errors"]) == (1, 1)


def test_percentiles_forget_after_five_minutes(window, clock):
    window.record(False, {"total": 5.0})
    clock.now += 5 * 60 + STEP
    window.record(False, {"total": 0.001})
    assert window.summary()["latency"]["total"]["count"] == 1


def test_the_series_has_a_step_for_each_ten_seconds_of_ten_minutes(window, clock):
    window.record(True, {"total": 0.02})
    clock.now += 2 * STEP
    window.record(False, {"total": 0.02})
    window.record(False, {"total": 0.02})
    series = window.summary()["series"]
    assert len(series) == STEPS
    assert [step["requests"] for step in series[-4:]] == [0, 1, 0, 2]
    assert [step["errors"] for step in series[-4:]] == [0, 1, 0, 0]
    assert [step["p50"] is None for step in series[-4:]] == [True, False, True, False]
    assert series[-1]["time"] == 5000.0 + clock.now
    assert {round(b["time"] - a["time"], 6) for a, b in pairwise(series)} == {STEP}


def test_a_pause_of_any_length_empties_the_steps_it_passed(window, clock):
    for pause in (STEP, STEP * (STEPS - 1), STEP * STEPS, STEP * STEPS * 10 + 3):
        window.record(False, {"total": 0.01})
        clock.now += pause
        found = window.summary()
        kept = 1 if pause < STEP * STEPS else 0
        assert sum(step["requests"] for step in found["series"][:1]) <= kept
        assert found["series"][-1]["requests"] == 0
    assert found["requests"] == 4
    assert sum(step["requests"] for step in found["series"]) == 0


def test_the_rate_is_that_of_the_last_minute(window, clock):
    for _ in range(20 * 60):
        clock.now += 0.5
        window.record(False)
    assert window.summary()["rate"] == pytest.approx(2.0, rel=0.02)


def test_the_rate_of_a_server_that_just_began_is_no_smaller_for_that(window, clock):
    clock.now += 5
    for _ in range(50):
        window.record(False)
    assert window.summary()["rate"] == 10


def test_a_clock_that_stands_still_or_goes_back_breaks_nothing(window, clock):
    clock.now += 35
    window.record(False, {"total": 0.01})
    clock.now -= 20
    window.record(False, {"total": 0.01})
    assert window.summary()["requests"] == 2


def test_many_threads_lose_nothing(window):
    def record() -> None:
        for _ in range(2000):
            window.record(False, {"state": 0.001, "total": 0.002})

    threads = [threading.Thread(target=record) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = window.summary()
    assert found["requests"] == found["latency"]["state"]["count"] == 8000
