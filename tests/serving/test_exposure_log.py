"""ExposureLog: whole files or none, nobody forgotten left in them, and read again by prepare."""

import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tfrec import cli
from tfrec.data.dataset import Dataset
from tfrec.errors import InputError, SetupError, StateError
from tfrec.serving.exposures import COLUMNS, ExposureLog, Shown, export_events
from tfrec.serving.sqlite_state import SqliteState
from tfrec.serving.state import Event

TESTS = Path(__file__).resolve().parent.parent


def shown(user_id="u", items=("a", "b"), request_id="r", timestamp=1_700_000_000.25):
    k = len(items)
    scores, propensities = [2.5 - n for n in range(k)], [1.0 / (n + 1) for n in range(k)]
    sources = ["behaviour", "text", "popular"][:k]
    return Shown(request_id, user_id, items, scores, propensities, sources, "p1", "3", timestamp)


def rows_of(folder):
    files = sorted(folder.glob("[!.]*"))
    assert all(file.suffix == ".parquet" for file in files)
    return [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]


@pytest.fixture
def log(tmp_path):
    log = ExposureLog(tmp_path / "log", rows=1000, seconds=1000)
    yield log
    log.close()


def test_each_place_of_a_list_is_a_row(log):
    log.record(shown())
    log.close()
    (file,) = log.folder.glob("*.parquet")
    found = pq.ParquetFile(file)
    assert found.schema_arrow.equals(COLUMNS)
    assert found.metadata.row_group(0).column(0).compression == "ZSTD"
    same = {
        "request_id": "r",
        "user_id": "u",
        "policy": "p1",
        "model_version": "3",
        "timestamp": 1_700_000_000.25,
        "event": "exposure",
    }
    assert found.read().to_pylist() == [
        {"item_id": "a", "position": 1, "score": 2.5, "propensity": 1.0, "source": "behaviour"}
        | same,
        {"item_id": "b", "position": 2, "score": 1.5, "propensity": 0.5, "source": "text"} | same,
    ]
    assert (log.written, log.dropped, log.problem) == (2, 0, "")


def waits_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_file_is_closed_after_so_many_rows(tmp_path):
    log = ExposureLog(tmp_path, rows=4, seconds=1000)
    for number in range(3):
        log.record(shown(request_id=str(2 * number)))
        log.record(shown(request_id=str(2 * number + 1)))
        waits_for(lambda: log.written == 4 * (number + 1))  # noqa: B023
    log.close()
    assert len(list(tmp_path.glob("*.parquet"))) == 3
    assert [row["request_id"] for row in rows_of(tmp_path)[::2]] == list("012345")


def test_a_file_is_closed_after_so_many_seconds(tmp_path):
    log = ExposureLog(tmp_path, rows=1000, seconds=0.05)
    log.record(shown())
    waits_for(lambda: log.written == 2)
    time.sleep(0.2)
    log.close()
    assert len(list(tmp_path.glob("*.parquet"))) == 1


def test_many_lists_make_one_file_in_their_order(log):
    for number in range(499):
        log.record(shown(request_id=str(number)))
    log.close()
    assert len(list(log.folder.glob("*.parquet"))) == 1
    assert [row["request_id"] for row in rows_of(log.folder)[::2]] == [str(n) for n in range(499)]


def test_nothing_shown_makes_no_file(log):
    log.flush()
    log.close()
    assert rows_of(log.folder) == []


def test_what_comes_faster_than_the_disk_takes_it_is_dropped_and_counted(log):
    with log._writing:  # a disk that hangs
        for _ in range(2000):
            log.record(shown())
    log.close()
    assert log.dropped + log.written == 4000
    assert log.written == len(rows_of(log.folder)) >= 2000
    assert log.problem == "the disk is too slow"


def test_a_closed_log_drops_and_counts(log):
    log.close()
    log.record(shown())
    assert (log.dropped, log.problem) == (2, "the log is closed")


def test_a_folder_that_goes_away_stops_nothing(log):
    log.record(shown())
    log.folder.rmdir()
    log.flush()
    assert log.dropped == 2
    assert "No such file" in log.problem
    log.folder.mkdir()
    log.record(shown())
    log.flush()
    assert log.written == 2


def test_lists_of_unequal_length_and_half_characters_are_refused_where_they_are_made():
    with pytest.raises(InputError, match=r"differ in length: \[1, 2, 2, 2\]"):
        Shown("r", "u", ["a"], [1, 2], [1, 1], ["new", "new"], "p", "3", 1.0)
    with pytest.raises(InputError, match="half a character"):
        shown("\ud800")


def test_a_kill_leaves_whole_files_only_and_the_next_start_tidies_up(tmp_path):
    for _ in range(3):
        command = [sys.executable, str(TESTS / "showing.py"), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(0.05)
            process.kill()
    rows = rows_of(tmp_path)
    assert len(rows) >= 3 * 50 * 50
    assert len(rows) % 50 == 0
    for path in [tmp_path / ".old.partial", tmp_path / ".new.partial"]:
        path.write_bytes(b"half")
    os.utime(tmp_path / ".old.partial", (1, 1))
    ExposureLog(tmp_path).close()
    assert not (tmp_path / ".old.partial").exists()
    assert (tmp_path / ".new.partial").exists()  # it may be another process's, under way


def test_a_forgotten_user_is_taken_out_of_files_and_of_what_waits(log):
    log.record(shown("u"))
    log.record(shown("v", ["x"]))
    log.flush()
    log.record(shown("u", ["c"]))
    log.flush()
    log.record(shown("v", ["y"]))
    log.record(shown("u"))
    files = set(log.folder.glob("*.parquet"))
    assert log.forget("u") == 5
    assert log.forget("u") == 0
    assert len(files & set(log.folder.glob("*.parquet"))) == 1
    log.close()
    assert [(row["user_id"], row["item_id"]) for row in rows_of(log.folder)] == [
        ("v", "x"),
        ("v", "y"),
    ]


def test_a_damaged_file_does_not_keep_a_user_in_the_others(log):
    (log.folder / "0.parquet").write_bytes(b"no parquet")
    log.record(shown("u"))
    log.flush()
    with pytest.raises(StateError, match=r"0\.parquet"):
        log.forget("u")
    assert [path.name for path in log.folder.glob("*.parquet")] == ["0.parquet"]


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="log cannot be written"):
        ExposureLog(tmp_path / "file" / "log")


def test_prepare_reads_the_log_again(log, tmp_path):
    for number in range(6):
        log.record(shown(f"u{number % 2}", ["a", "b", "c"], timestamp=1_700_000_000.5 + number))
        if number % 2:
            log.flush()
    log.close()
    out = tmp_path / "run"
    setting = f"data.interactions={log.folder}"
    assert cli.main(["prepare", "files", "--set", setting, "--out", str(out)]) == 0
    events = Dataset.load(out / "prepare").interactions
    assert len(events) == 18
    assert set(events.event_names) == {"exposure"}


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_live_events_become_a_file_that_prepare_reads(tmp_path, ending):
    state = SqliteState(tmp_path / "state")
    quoted = 'i"1",\n2'
    state.append([Event(f"a{n}", "u,1", quoted, "like", 1_700_000_000.0 + n) for n in range(3)])
    state.append([Event("b", "007", "é", "rating", 1_700_000_000.0, 4.5)])
    file = tmp_path / f"events{ending}"
    assert export_events(state, file) == 4
    state.close()
    assert {path.name for path in tmp_path.iterdir()} == {"state", file.name}
    out = tmp_path / "run"
    setting = f"data.interactions={file}"
    assert cli.main(["prepare", "files", "--set", setting, "--out", str(out)]) == 0
    dataset = Dataset.load(out / "prepare")
    assert set(dataset.users.ids) == {"u,1", "007"}
    assert set(dataset.catalog.ids[1:]) == {quoted, "é"}
    ratings = [float(value) for value in dataset.interactions.rating]
    assert [value for value in ratings if not math.isnan(value)] == [4.5]
    assert set(dataset.interactions.event_names) == {"like", "rating"}


def test_live_events_need_a_name_that_says_the_format(tmp_path):
    state = SqliteState(tmp_path / "state")
    with pytest.raises(InputError, match=r"expected \.parquet or \.csv"):
        export_events(state, tmp_path / "events.xlsx")
    state.close()


def test_a_full_disk_leaves_no_half_file_of_events(tmp_path, monkeypatch):
    state = SqliteState(tmp_path / "state")
    state.append([Event("a", "u", "i", "like", 1.0)])

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SetupError, match="no space left"):
        export_events(state, tmp_path / "events.csv")
    monkeypatch.undo()
    state.close()
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
