"""RedisState: Redis gone, slow, back, full and newer, and several servers at once."""

import contextlib
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis
from redis_server import RedisServer

from tfrec.errors import ConfigError, StateError
from tfrec.serving.redis_state import RedisState
from tfrec.serving.state import Event, Item, open_state

TESTS = Path(__file__).resolve().parent.parent


def liked(event_id, user_id="u"):
    return Event(event_id, user_id, "i", "like", 1.5)


@pytest.fixture
def server(tmp_path):
    server = RedisServer(tmp_path)
    yield server
    server.close()


@pytest.fixture
def state(server):
    state = RedisState(server.url, timeout=0.5)
    yield state
    state.close()


def test_redis_gone_is_one_clear_line_and_redis_back_is_all_it_needs(server, state):
    state.append([liked("a")])
    for turn in range(2):
        server.kill()
        began = time.monotonic()
        with pytest.raises(StateError, match=rf"Redis at 127\.0\.0\.1:{server.port}/0 cannot be"):
            state.append([liked("lost")])
        with pytest.raises(StateError):
            state.history("u")
        assert time.monotonic() - began < 5
        server.start()
        assert len(state.history("u")) == turn + 1
        assert state.append([liked(f"b{turn}")]) == [True]


def test_connections_of_many_threads_come_back(server, state):
    gate = threading.Barrier(8)

    def append(number):
        gate.wait(20)  # so that each has a connection of its own
        return state.append([liked(str(number))])

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(append, range(8)))
        server.kill()
        server.start()
        assert list(pool.map(append, range(8, 16))) == [[True]] * 8
    assert len(state.history("u")) == 16


def test_a_redis_that_does_not_answer_costs_its_timeout(server, state):
    state.append([liked("a")])
    server.signal(signal.SIGSTOP)
    try:
        began = time.monotonic()
        with pytest.raises(StateError, match="cannot be reached: Timeout"):
            state.history("u")
        assert 0.4 < time.monotonic() - began < 5
    finally:
        server.signal(signal.SIGCONT)
    assert state.history("u") == [liked("a")]


def test_ten_kills_of_redis_under_load_lose_and_double_nothing(server):
    acknowledged, stop = [], threading.Event()

    def work(thread):
        state = RedisState(server.url, timeout=2)
        for number in range(1_000_000):
            event_id = f"{thread}-{number}"
            while not stop.is_set():
                try:
                    state.append([liked(event_id, f"u{thread}")])
                except StateError:
                    continue  # sent again, with the same id
                acknowledged.append(event_id)
                break
            if stop.is_set():
                break
        state.close()

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(work, thread) for thread in range(4)]
        for turn in range(10):
            wanted = len(acknowledged) + 20 + turn
            while len(acknowledged) < wanted:
                time.sleep(0.005)
            server.kill()
            server.start()
        stop.set()
        for one in running:
            one.result()
    state = RedisState(server.url)
    kept = [event.event_id for _, event in state.events()]
    assert len(kept) == len(set(kept)) == state.counts()["events"]
    assert set(acknowledged) <= set(kept)
    for thread in range(4):
        numbers = [int(e.event_id.split("-")[1]) for e in state.history(f"u{thread}")]
        assert numbers == list(range(len(numbers)))
    state.close()


def test_a_kill_of_the_server_loses_and_doubles_nothing(server, state):
    acknowledged = []
    for turn in range(3):
        command = [sys.executable, str(TESTS / "appending.py"), server.url, str(turn), "4"]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            told = b""
            while told.count(b"\n") < 50:
                told += process.stdout.read1()
            process.kill()
            told += process.stdout.read()
        acknowledged += told.decode().split("\n")[:-1]
    kept = [event.event_id for _, event in state.events()]
    assert len(kept) == len(set(kept))
    assert set(acknowledged) <= set(kept)


def test_two_servers_see_each_others_writes_at_once(server, state):
    other = open_state(server.url)
    state.append([liked("a")])
    assert other.history("u") == [liked("a")]
    assert other.append([liked("a"), liked("b")]) == [False, True]
    other.put_items([Item("1", "one")])
    assert [item.title for _, item in state.items()] == ["one"]
    other.forget("u")
    assert state.history("u") == []
    assert state.forgotten(["u"]) == {"u"}
    other.close()


def test_a_full_redis_takes_all_of_a_call_or_nothing(server, state):
    state.append([liked("a")])
    with redis.Redis.from_url(server.url) as told:
        told.config_set("maxmemory", "1mb")
        with pytest.raises(StateError, match=r"refuses: .*maxmemory"):
            state.append([liked(str(number)) for number in range(500)])
        assert state.history("u") == [liked("a")]
        assert state.counts()["events"] == 1
        told.config_set("maxmemory", "0")
        assert state.append([liked("b")]) == [True]
        told.config_set("maxmemory", told.info("memory")["used_memory"] + 20_000)
        outcome = []  # it becomes full on the way
        with contextlib.suppress(StateError):
            outcome = state.append([liked(f"c{number}") for number in range(500)])
        assert len(state.history("u")) == 2 + len(outcome)


def test_a_newer_schema_is_refused(server, state):
    with redis.Redis.from_url(server.url) as told:
        told.hset("tfrec:numbers", "schema", 7)
    with pytest.raises(StateError, match="has schema 7, and this tfrec knows 1"):
        RedisState(server.url)


def test_no_redis_at_the_start_is_said_without_its_password(server):
    with pytest.raises(StateError, match=r"Redis at 127\.0\.0\.1:1/3 cannot be reached") as caught:
        open_state("redis://me:geheim@127.0.0.1:1/3")
    assert "geheim" not in str(caught.value)


@pytest.mark.parametrize("url", ["redis://host:port/0", "redis://host/x"])
def test_an_address_that_is_none_is_a_wrong_setting(url):
    with pytest.raises(ConfigError, match="redis://HOST:PORT/DB"):
        open_state(url)


@pytest.mark.parametrize(
    ("fsync", "says"),
    [
        ("always", r"an acknowledged event survives a kill and a power cut$"),
        ("everysec", r"may cost up to two seconds of events; set `appendfsync always`"),
        ("none", r"costs all events since its last snapshot; set `appendonly yes`"),
    ],
)
def test_it_says_what_redis_was_told_to_keep(tmp_path, fsync, says):
    server = RedisServer(tmp_path, fsync)
    state = RedisState(server.url)
    try:
        assert state.durability().startswith(f"Redis at 127.0.0.1:{server.port}/0: ")
        assert re.search(says, state.durability())
    finally:
        state.close()
        server.close()


def test_it_warns_of_a_redis_that_drops_histories(server, state):
    with redis.Redis.from_url(server.url) as told:
        told.config_set("maxmemory", "100mb")
        told.config_set("maxmemory-policy", "volatile-lru")
        assert "drops" not in state.durability()
        told.config_set("maxmemory-policy", "allkeys-lru")
    assert "maxmemory-policy allkeys-lru drops histories" in state.durability()


def test_a_redis_that_may_not_be_asked_is_no_error(server, state):
    with redis.Redis.from_url(server.url) as told:
        told.acl_setuser("default", commands=["-config"])
    assert "does not tell what it keeps" in state.durability()
