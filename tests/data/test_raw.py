"""Tables of events, items and users, before cleaning."""

import numpy as np
import pytest

from tfrec.data.raw import read_events, read_table
from tfrec.data.tables import Columns, open_table
from tfrec.errors import InputError


def events(names=None, **columns):
    given = {"user_id": ["b", "a", "b"], "item_id": ["x", "y", "x"], "timestamp": [3, 2, 1]}
    return read_events(Columns("the interactions", given | columns), names or {})


def test_events_keep_the_order_of_the_file_and_ids_that_of_first_appearance():
    read = events()
    assert read.user.tolist() == [0, 1, 0]
    assert (read.user_ids, read.item_ids) == (("b", "a"), ("x", "y"))
    assert read.time.tolist() == [3_000_000, 2_000_000, 1_000_000]


def test_without_optional_columns_there_is_one_kind_of_event_of_weight_one():
    read = events()
    assert read.event_names == ("interaction",)
    assert read.event.tolist() == [0, 0, 0]
    assert np.isnan(read.rating).all()
    assert read.weight.tolist() == [1, 1, 1]


def test_optional_columns_are_read_where_they_are():
    read = events(event=["buy", "view", "buy"], rating=[4, None, 2.5], weight=[0, None, 2])
    assert [read.event_names[code] for code in read.event] == ["buy", "view", "buy"]
    np.testing.assert_array_equal(read.rating, np.array([4, np.nan, 2.5], np.float32))
    assert read.weight.tolist() == [0, 1, 2]


def test_an_event_without_a_name_is_an_interaction():
    read = events(event=["buy", "", None])
    assert [read.event_names[code] for code in read.event] == ["buy", "interaction", "interaction"]


def test_other_columns_are_left_alone():
    assert len(events(colour=["red", "blue", None])) == 3


def test_columns_are_found_under_the_names_given():
    given = {"wer": ["a"], "was": ["x"], "wann": ["2024-01-01"], "sterne": [5]}
    names = {"user_id": "wer", "item_id": "was", "timestamp": "wann", "rating": "sterne"}
    read = read_events(Columns("the interactions", given), names)
    assert (read.user_ids, read.rating.tolist()) == (("a",), [5.0])


@pytest.mark.parametrize("missing", ["user_id", "item_id", "timestamp"])
def test_a_missing_column_is_named_beside_those_that_there_are(tmp_path, missing):
    columns = {"user_id": "a", "item_id": "x", "timestamp": "1"}
    del columns[missing]
    path = tmp_path / "events.csv"
    path.write_text(",".join(columns) + "\n" + ",".join(columns.values()) + "\n")
    with pytest.raises(InputError, match=f"no column '{missing}'; it has {', '.join(columns)}"):
        read_events(open_table(path, "data.interactions"), {})


def test_a_column_named_by_the_user_must_exist_even_if_it_is_optional():
    with pytest.raises(InputError, match="no column 'stars'"):
        events({"rating": "stars"})


def test_a_header_alone_is_an_empty_table(tmp_path):
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id,timestamp\n")
    with pytest.raises(InputError, match="is empty: it has no rows"):
        read_events(open_table(path, "data.interactions"), {})


@pytest.mark.parametrize(
    ("column", "cell"),
    [
        ("timestamp", "yesterday"),
        ("timestamp", ""),
        ("timestamp", "NaN"),
        ("rating", "NaN"),
        ("rating", "inf"),
        ("rating", "good"),
        ("weight", "-inf"),
        ("weight", "-1"),
    ],
)
def test_a_bad_value_is_named_with_file_line_and_column(tmp_path, column, cell):
    good = {"user_id": "a", "item_id": "x", "timestamp": "1", "rating": "4", "weight": "1"}
    lines = [good, good.values(), good.values(), (good | {column: cell}).values()]
    path = tmp_path / "events.csv"
    path.write_text("".join(",".join(line) + "\n" for line in lines))
    with pytest.raises(InputError) as caught:
        read_events(open_table(path, "data.interactions"), {})
    assert f"events.csv, line 4: column '{column}' is '{cell}'" in str(caught.value)


def test_a_bad_value_in_a_later_batch_is_named_by_its_own_row(monkeypatch, tmp_path):
    monkeypatch.setattr("tfrec.data.tables._BLOCK", 100)
    path = tmp_path / "events.csv"
    path.write_text("user_id,item_id,timestamp\n" + "a,x,1\n" * 500 + "a,x,never\n")
    with pytest.raises(InputError, match="line 502: column 'timestamp' is 'never'"):
        read_events(open_table(path, "data.interactions"), {})


def test_batches_join_to_the_same_events_as_one(monkeypatch, tmp_path):
    path = tmp_path / "events.csv"
    rows = [f"u{i * i % 37},i{i * 7 % 101},{i}\n" for i in range(1000)]
    path.write_text("user_id,item_id,timestamp\n" + "".join(rows))
    whole = read_events(open_table(path, "data.interactions"), {})
    monkeypatch.setattr("tfrec.data.tables._BLOCK", 64)
    parts = read_events(open_table(path, "data.interactions"), {})
    assert (whole.user_ids, whole.item_ids) == (parts.user_ids, parts.item_ids)
    np.testing.assert_array_equal(whole.user, parts.user)
    np.testing.assert_array_equal(whole.item, parts.item)
    np.testing.assert_array_equal(whole.time, parts.time)


def test_more_than_127_kinds_of_events_are_refused():
    n = 128
    with pytest.raises(InputError, match="at most 127"):
        events(
            user_id=["a"] * n,
            item_id=["x"] * n,
            timestamp=[1] * n,
            event=[str(i) for i in range(n)],
        )


def test_a_table_keeps_its_order_and_every_other_column():
    reader = Columns("the items", {"item_id": [7, 3], "name": ["B", None], "price": [1.5, 2]})
    table = read_table(reader, "item_id", {"title": "name"})
    assert table.ids == ("7", "3")
    assert dict(table.columns) == {"title": ("B", ""), "price": ("1.5", "2")}


def test_the_key_of_a_table_may_have_our_name_although_another_is_given():
    names = {"item_id": "asin"}
    for key in ("asin", "item_id"):
        assert read_table(Columns("the items", {key: ["a"]}), "item_id", names).ids == ("a",)


def test_a_title_column_that_is_named_must_exist():
    with pytest.raises(InputError, match="no column 'name'; it has item_id"):
        read_table(Columns("the items", {"item_id": ["a"]}), "item_id", {"title": "name"})


def test_a_duplicate_id_is_named_with_both_lines(tmp_path):
    path = tmp_path / "items.csv"
    path.write_text("item_id,title\na,A\nb,B\na,C\n")
    with pytest.raises(InputError, match="item_id 'a' stands there twice, in line 2 and line 4"):
        read_table(open_table(path, "data.items"), "item_id", {})


def test_an_empty_id_in_a_table_is_refused(tmp_path):
    path = tmp_path / "users.csv"
    path.write_text("user_id,age\na,1\n,2\n")
    with pytest.raises(InputError, match="line 3: the user_id is empty"):
        read_table(open_table(path, "data.users"), "user_id", {})
