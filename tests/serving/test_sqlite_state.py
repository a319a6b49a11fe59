"""SqliteState: kills, full disks, damaged and foreign files, and who may use a folder."""

import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tfrec.errors import StateError
from tfrec.serving import sqlite_state
from tfrec.serving.sqlite_state import SqliteState
from tfrec.serving.state import Event, Item

TESTS = Path(__file__).resolve().parent.parent


def liked(event_id, user_id="u"):
    return Event(event_id, user_id, "i", "like", 1.5)


def killed_while_appending(where, prefix, at_least):
    """Ids that a process acknowledged before it was killed, without mercy."""
    command = [sys.executable, str(TESTS / "appending.py"), str(where), prefix, "4"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        told = b""
        while told.count(b"\n") < at_least:
            told += process.stdout.read1()
        process.send_signal(signal.SIGKILL)
        told += process.stdout.read()
    return told.decode().split("\n")[:-1]  # what follows the last end of line is cut off


@pytest.mark.parametrize("synchronous", ["full", "normal"])
def test_ten_kills_under_load_lose_and_double_nothing(tmp_path, synchronous):
    acknowledged = []
    for turn in range(10 if synchronous == "full" else 2):
        acknowledged += killed_while_appending(tmp_path / "s", str(turn), 20 + 17 * turn)
    state = SqliteState(tmp_path / "s", synchronous)
    kept = [event.event_id for _, event in state.events()]
    assert len(kept) == len(set(kept)) == state.counts()["events"]
    assert set(acknowledged) <= set(kept)
    assert len(kept) - len(acknowledged) <= 40  # at most one under way for each thread and kill
    for thread in range(4):
        ids = [event.event_id for event in state.history(f"u{thread}")]
        assert ids == [event_id for event_id in kept if event_id.split("-")[1] == str(thread)]
    state.close()


def test_a_second_server_is_refused_until_the_first_is_gone(tmp_path):
    first = SqliteState(tmp_path / "s")
    with pytest.raises(StateError, match=r"another server uses the state .*/s; .*redis://"):
        SqliteState(tmp_path / "s")
    first.close()
    SqliteState(tmp_path / "s").close()


def test_another_process_is_refused_too(tmp_path):
    first = SqliteState(tmp_path / "s")
    code = f"from tfrec.serving.state import open_state; open_state({str(tmp_path / 's')!r})"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "another server uses the state" in other.stderr
    first.close()


@pytest.mark.parametrize("way", ["limit", "tmpfs"])
def test_a_full_disk_costs_nothing_acknowledged_and_is_survived(tmp_path, way):
    command = [sys.executable, str(TESTS / "filling.py"), str(tmp_path), way]
    if way == "tmpfs":
        own = ["unshare", "--user", "--map-root-user", "--mount"]
        if not shutil.which("unshare") or subprocess.run([*own, "true"]).returncode:
            pytest.skip("this user may not mount a file system of his own")
        script = (
            'mount -t tmpfs -o size=3m none "$0" && '
            'head -c 1000000 /dev/zero > "$0/ballast" && exec "$@"'
        )
        command = [*own, "sh", "-c", script, str(tmp_path), *command]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stderr == ""
    seen = json.loads(done.stdout)
    assert seen["acknowledged"] > 10
    words = "is full; nothing was written" if way == "tmpfs" else "cannot be read or written"
    assert words in seen["message"]
    assert seen["kept"] == [20 * seen["acknowledged"]] * 2
    assert seen["again"] == 20
    assert seen["reopened"] == 20 * seen["acknowledged"] + 20
    dropped, written, problem, files = seen["exposures"]
    assert (dropped, written, files) == (200_000, 0, [])
    assert ("No space left" if way == "tmpfs" else "File too large") in problem


def make(folder, events=2000):
    state = SqliteState(folder)
    state.append([liked(str(number), f"u{number % 7}") for number in range(events)])
    state.close()
    return folder / sqlite_state.FILE


def test_a_file_that_is_no_database_is_named_with_what_to_do(tmp_path):
    file = make(tmp_path)
    file.write_bytes(b"x" * 5000)
    with pytest.raises(StateError, match=r"state\.sqlite is damaged .*\.recover.*another --state"):
        SqliteState(tmp_path)


def test_a_file_that_was_cut_off_is_damaged(tmp_path):
    file = make(tmp_path)
    file.write_bytes(file.read_bytes()[: 10 * 4096])
    with pytest.raises(StateError, match="is damaged"):
        SqliteState(tmp_path)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(StateError, match="is damaged"):
        SqliteState(tmp_path)


def test_damage_that_is_found_later_is_an_error_of_that_call(tmp_path):
    file = make(tmp_path)
    with sqlite3.connect(file) as database:
        query = "SELECT rootpage FROM sqlite_schema WHERE name = 'events'"
        ((page,),) = database.execute(query)
    database.close()
    with file.open("r+b") as stream:
        stream.seek((page - 1) * 4096)
        stream.write(b"\xee" * 4096)
    state = SqliteState(tmp_path)
    with pytest.raises(StateError, match="is damaged"):
        list(state.events())
    with pytest.raises(StateError, match="is damaged"):
        state.append([liked("new")])
    state.close()


def test_a_refused_file_lets_go_of_the_folder(tmp_path):
    file = make(tmp_path)
    whole = file.read_bytes()
    file.write_bytes(b"x" * 5000)
    with pytest.raises(StateError):
        SqliteState(tmp_path)
    file.write_bytes(whole)
    SqliteState(tmp_path).close()


def test_a_newer_schema_is_refused(tmp_path):
    with sqlite3.connect(make(tmp_path)) as database:
        database.execute("PRAGMA user_version = 7")
    database.close()
    with pytest.raises(StateError, match=r"has schema 7, and this tfrec knows 1: .* upgrade"):
        SqliteState(tmp_path)


def test_somebody_elses_database_is_refused_and_left_alone(tmp_path):
    with sqlite3.connect(tmp_path / sqlite_state.FILE) as database:
        database.execute("CREATE TABLE theirs (x)")
    database.close()
    before = (tmp_path / sqlite_state.FILE).read_bytes()
    with pytest.raises(StateError, match="is not of tfrec"):
        SqliteState(tmp_path)
    assert (tmp_path / sqlite_state.FILE).read_bytes() == before


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match=r"the state .*/file/s cannot be written"):
        SqliteState(tmp_path / "file" / "s")


def test_a_forgotten_user_is_in_no_byte_of_the_folder(tmp_path):
    state = SqliteState(tmp_path)
    state.append([Event(f"e{n}", "u", f"secret{n:05}", "like", 1.0) for n in range(300)])
    state.append([liked(f"f{n}", "v") for n in range(300)])
    assert any(b"secret" in file.read_bytes() for file in tmp_path.iterdir())
    state.forget("u")
    assert not any(b"secret" in file.read_bytes() for file in tmp_path.iterdir())
    state.close()


def test_it_says_what_survives_what(tmp_path):
    full = SqliteState(tmp_path / "full")
    normal = SqliteState(tmp_path / "normal", "normal")
    assert "survives a kill and a power cut" in full.durability()
    assert "a power cut may cost" in normal.durability()
    full.close()
    normal.close()


def test_histories_are_right_however_few_are_held_in_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(sqlite_state, "_RECENT_EVENTS", 10)
    state = SqliteState(tmp_path)
    for number in range(60):
        state.append([liked(str(number), f"u{number % 4}")])
        state.put_items([Item("1")])
        for user in range(4):
            ids = [int(event.event_id) for event in state.history(f"u{user}")]
            assert ids == list(range(user, number + 1, 4))
    state.close()


def test_readers_do_not_wait_for_a_writer(tmp_path):
    state = SqliteState(tmp_path)
    state.append([liked("a")])
    entered, go_on = threading.Event(), threading.Event()

    def slow(connection):
        connection.execute("INSERT INTO settings VALUES ('a', 'b')")
        entered.set()
        go_on.wait(20)

    writer = threading.Thread(target=lambda: state._commits.run(slow))
    writer.start()
    entered.wait(20)
    began = time.monotonic()
    assert state.history("u") == [liked("a")]
    assert state.get("a") == ""
    assert time.monotonic() - began < 4  # SQLite itself would wait five seconds
    go_on.set()
    writer.join()
    assert state.get("a") == "b"
    state.close()


def test_a_reader_between_a_commit_and_its_being_told_doubles_nothing(tmp_path):
    state = SqliteState(tmp_path)
    add = state._recent.add

    def late(events):
        assert [event.event_id for event in state.history("u")] == ["a"]
        add(events)

    state._recent.add = late
    state.append([Event("a", "u", "i", "like", 1.5)])
    assert [event.event_id for event in state.history("u")] == ["a"]
    state.close()
