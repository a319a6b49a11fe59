"""Commits: what waits together shares a transaction, and one that fails takes nobody with it."""

import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from tfrec.errors import StateError
from tfrec.serving.commits import Commits


class Base:
    """A database in memory that counts its transactions."""

    def __init__(self):
        self.connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
        self.connection.execute("CREATE TABLE t (n INTEGER UNIQUE)")
        self.transactions = 0
        self.connection.set_trace_callback(self._trace)
        self.commits = Commits(self.connection, lambda error: StateError(f"told: {error}"))

    def _trace(self, statement):
        self.transactions += statement == "COMMIT"

    def put(self, number):
        self.commits.run(lambda c: c.execute("INSERT INTO t VALUES (?)", (number,)).rowcount)

    def rows(self):
        return [n for (n,) in self.connection.execute("SELECT n FROM t ORDER BY n")]

    def held_up(self, numbers):
        """Puts numbers from as many threads, all of which wait while a first write runs."""
        entered, go_on = threading.Event(), threading.Event()

        def first(_):
            entered.set()
            go_on.wait(20)

        def outcome(number):
            try:
                self.put(number)
            except StateError as error:
                return str(error)
            return "ok"

        with ThreadPoolExecutor(len(numbers) + 1) as pool:
            pool.submit(self.commits.run, first)
            entered.wait(20)
            puts = [pool.submit(outcome, number) for number in numbers]
            while len(self.commits._waiting) < len(numbers):
                pass
            go_on.set()
            return [put.result() for put in puts]


@pytest.fixture
def base():
    base = Base()
    yield base
    base.commits.close()
    base.connection.close()


def test_writes_that_wait_share_a_transaction(base):
    assert base.held_up(range(20)) == ["ok"] * 20
    assert base.rows() == list(range(20))
    assert base.transactions == 2


def test_one_that_fails_fails_alone(base):
    base.put(3)
    outcomes = base.held_up([1, 2, 3, 4])
    assert outcomes == ["ok", "ok", "told: UNIQUE constraint failed: t.n", "ok"]
    assert base.rows() == [1, 2, 3, 4]


def test_a_write_that_fails_leaves_nothing_of_itself(base):
    def half(connection):
        connection.execute("INSERT INTO t VALUES (1)")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        base.commits.run(half)
    assert base.rows() == []
    base.put(2)
    assert base.rows() == [2]


def test_a_write_alone_is_run_by_its_caller(base):
    assert base.commits.run(lambda _: threading.current_thread()) is threading.current_thread()


def test_a_caller_that_is_interrupted_leaves_nothing_and_blocks_nobody(base):
    def half(connection):
        connection.execute("INSERT INTO t VALUES (1)")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        base.commits.run(half)
    assert base.held_up([2, 3]) == ["ok", "ok"]
    assert base.rows() == [2, 3]


def test_what_follows_a_commit_sees_its_result_before_its_caller_goes_on(base):
    seen = []
    base.commits.run(lambda _: 7, seen.append)
    assert seen == [7]


def test_what_waited_when_it_was_closed_is_written(base):
    with ThreadPoolExecutor(8) as pool:
        puts = [pool.submit(base.put, number) for number in range(8)]
        for put in puts[:1]:
            put.result()
        base.commits.close()
        wrote = [put.exception() is None for put in puts]
    assert len(base.rows()) == sum(wrote)
    with pytest.raises(StateError, match="was closed"):
        base.put(100)
