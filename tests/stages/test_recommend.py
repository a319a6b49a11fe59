"""recommend: files of recommendations out of a finished run."""

import csv
import json

import checkerboard as board
import pytest

from tfrec.data.dataset import Dataset
from tfrec.errors import ArtifactError, InputError
from tfrec.stages import recommend

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return board.trained(tmp_path_factory)


@pytest.fixture(scope="module")
def dataset(run):
    return Dataset.load(run / "prepare")


@pytest.fixture(autouse=True)
def _loaded_once(run, monkeypatch):
    """Loading costs seconds; the loaded recommender keeps no state."""
    load = recommend.load_recommender
    found = _cache.get(run) or _cache.setdefault(run, load(run))
    monkeypatch.setattr(recommend, "load_recommender", lambda d: found if d == run else load(d))


_cache: dict = {}


@pytest.fixture
def ask(run, tmp_path):
    """Rows of the CSV file that is written, as lists of cells, without the header."""

    def ask(**request):
        out = tmp_path / "recs.csv"
        recommend.run(run, out=out, **request)
        with out.open(newline="") as stream:
            header, *rows = list(csv.reader(stream))
        assert header == ["user_id", "item_id", "rank", "score"]
        return rows

    return ask


def items_of(rows):
    return [row[1] for row in rows]


def test_everyone_of_a_file_gets_exactly_k_rows_in_order(ask, tmp_path):
    users = [f"u{u}" for u in range(30)] + ["stranger"]
    (tmp_path / "users.csv").write_text("name,user_id\n" + "".join(f"x,{u}\n" for u in users))
    rows = ask(users_file=tmp_path / "users.csv", k=7)
    assert [row[0] for row in rows] == [user for user in users for _ in range(7)]
    assert [row[2] for row in rows] == [str(rank) for _ in users for rank in range(1, 8)]
    for start in range(0, len(rows), 7):
        scores = [float(row[3]) for row in rows[start : start + 7]]
        assert scores == sorted(scores, reverse=True)
        assert len(set(items_of(rows[start : start + 7]))) == 7


def test_what_was_seen_in_any_part_of_the_split_does_not_come(ask, dataset):
    rows = ask(user_ids=["u3"], k=100)
    user = dataset.users.row("u3")
    seen = {dataset.catalog.ids[i] for i in dataset.interactions.histories([user])[0]}
    assert set(items_of(rows)) == set(dataset.catalog.ids[1:]) - seen
    assert len(items_of(ask(user_ids=["u3"], k=100, include_seen=True))) == board.ITEMS


def test_ten_items_come_if_nothing_is_said(ask):
    assert len(ask(user_ids=["u3"])) == 10


def test_a_raw_history_is_answered_in_its_colour(ask):
    for start in (0, 1):
        history = [f"i{start + 2 * n}" for n in range(6)]
        found = items_of(ask(history=history, k=3))
        assert {board.colour(i) for i in found} == {start}
        assert not set(found) & set(history)


def test_a_profile_alone_is_answered_by_text(ask, capsys):
    rows = ask(profile=f"{board.TITLES[1]} 5", k=3)
    assert [row[0] for row in rows] == [""] * 3
    assert board.colour(rows[0][1]) == 1
    assert "1 rest on profile text" in capsys.readouterr().err


def test_a_long_profile_is_read_from_its_start_and_that_is_said(ask, capsys):
    start = f"{board.TITLES[1]} 5 " * 10
    rows = ask(profile=start + "war " * 25_000, k=3)
    assert "--profile is long" in capsys.readouterr().err
    assert items_of(rows) == items_of(ask(profile=start, k=3))


def test_a_profile_of_some_unknown_words_is_answered_and_that_is_said(ask, capsys):
    assert len(ask(profile="我需要一套优雅的商务西装 love", k=3)) == 3
    said = capsys.readouterr().err
    assert "75% of its characters are outside the vocabulary" in said
    assert "multilingual-e5-small" in said


def test_a_stranger_is_answered_by_popularity_and_it_is_said(ask, capsys):
    ask(user_ids=["u1", "nobody"], k=3)
    assert capsys.readouterr().err == (
        "tfrec: of 2 lists, for want of events, 1 rest on popularity\n"
    )


def test_lists_of_items_and_filters_hold(ask):
    assert "i4" not in items_of(ask(user_ids=["nobody"], exclude=["i4"], k=100))
    assert set(items_of(ask(user_ids=["nobody"], include=["i4", "i5"], k=9))) == {"i4", "i5"}
    pale = items_of(ask(user_ids=["nobody"], filters={"shade": ["pale"]}, k=100))
    assert {board.colour(i) for i in pale} == {1}
    both = ask(user_ids=["nobody"], filters={"shade": ["pale", "black"]}, k=100)
    assert len(both) == board.ITEMS


def test_json_lines_have_titles_and_sources(run, tmp_path):
    out = tmp_path / "recs.jsonl"
    recommend.run(run, user_ids=["u1", "nobody"], k=2, out=out, format="jsonl")
    known, stranger = (json.loads(line) for line in out.read_text().splitlines())
    assert (known["user_id"], stranger["user_id"]) == ("u1", "nobody")
    assert [len(line["items"]) for line in (known, stranger)] == [2, 2]
    assert {item["source"] for item in known["items"]} == {"behaviour"}
    assert {item["source"] for item in stranger["items"]} == {"popular"}
    assert set(known["items"][0]) == {"item_id", "title", "score", "source"}
    assert known["items"][0]["title"].startswith(board.TITLES[1])


def test_without_a_file_it_is_printed(run, capsys):
    recommend.run(run, user_ids=["u1"], k=2)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "user_id,item_id,rank,score"
    assert len(printed) == 3


def test_unknown_items_are_said_and_left_out(ask, capsys):
    rows = ask(history=["i1", "nix"], exclude=["nox"], k=3)
    assert len(rows) == 3
    said = capsys.readouterr().err
    assert "--history: there is no item 'nix'" in said
    assert "--exclude: there is no item 'nox'" in said


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"profile": ""}, "--profile is empty"),
        ({"user_ids": ["u1"], "profile": " \n"}, "--profile is empty"),
        ({"profile": "我需要西装"}, "knows no word of '我需要西装'.*multilingual-e5-small"),
        ({"profile": "\u200b\x00"}, "knows no word of"),
        ({"user_ids": ["u1"], "include": ["nix"]}, "'nix'"),
        ({"user_ids": ["u1"], "filters": {"hue": ["red"]}}, "no attribute 'hue'.*shade"),
    ],
)
def test_what_cannot_be_done_is_an_error_and_nothing_is_written(run, tmp_path, request_, said):
    with pytest.raises(InputError, match=said):
        recommend.run(run, out=tmp_path / "recs.csv", **request_)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, r"users\.csv"),
        ("user_id\n", "empty|no row"),
        ("id\nu1\n", "user_id"),
        ("", "empty"),
    ],
)
def test_a_users_file_that_cannot_be_used_is_an_error(run, tmp_path, content, said):
    path = tmp_path / "users.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=said):
        recommend.run(run, users_file=path, out=tmp_path / "recs.csv")
    assert not (tmp_path / "recs.csv").exists()


def test_an_unfinished_run_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="prepare"):
        recommend.run(tmp_path, user_ids=["u1"])
