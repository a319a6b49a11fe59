"""Breaker: a server that fails is left alone, and found again."""

import time

from tfrec.engines.breaker import Breaker


def fail(breaker, times):
    out = []
    for _ in range(times):
        breaker.turn()
        out.append(breaker.failed("gone"))
    return out


def test_so_many_failures_in_a_row_and_it_is_left_alone():
    breaker = Breaker(failures=3, pause=60)
    assert fail(breaker, 2) == [False, False]
    assert breaker.turn() == "ask"
    breaker.answered()
    assert fail(breaker, 3) == [False, False, True]
    assert [breaker.turn() for _ in range(3)] == ["leave"] * 3
    told = breaker.status()
    assert (told.state, told.reason) == ("away", "gone")
    assert (told.calls, told.answered, told.failed, told.fallbacks) == (9, 1, 5, 8)


def test_one_call_at_a_time_tries_it_again():
    breaker = Breaker(failures=1, pause=0.05)
    assert fail(breaker, 1) == [True]
    for _ in range(2):
        time.sleep(0.06)
        assert [breaker.turn() for _ in range(3)] == ["test", "leave", "leave"]
        assert breaker.failed("still gone") is False
    assert breaker.status().reason == "still gone"


def test_an_answer_that_was_on_its_way_does_not_bring_it_back():
    breaker = Breaker(failures=1, pause=60)
    breaker.turn()
    fail(breaker, 1)
    breaker.answered()
    assert breaker.turn() == "leave"


def test_after_a_test_it_is_asked_as_before():
    breaker = Breaker(failures=2, pause=0.0)
    fail(breaker, 2)
    assert breaker.turn() == "test"
    assert breaker.back() is True
    assert breaker.back() is False
    assert breaker.status().state == str(breaker.status()) == "ok"
    assert fail(breaker, 1) == [False]


def test_away_from_the_start_and_since_when():
    breaker = Breaker(pause=60)
    before = time.time()
    assert breaker.leave("another version") is True
    assert breaker.leave("another version") is False
    assert before <= breaker.status().since <= time.time()
    assert str(breaker.status()).startswith("away since 2")
    assert str(breaker.status()).endswith(" UTC: another version")
