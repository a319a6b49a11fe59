"""Dataset: built from columns, saved and loaded as it was."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tfrec.artifact import Artifact
from tfrec.config import DataConfig
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID
from tfrec.errors import ArtifactError, InputError

EVENTS = {
    "user_id": ["b", "b", "a", "b", "a", "a", "stranger"],
    "item_id": ["i2", "i1", "i1", "new", "i2", "i3", "i1"],
    "timestamp": [3, 1, 1, 2, 2, 3, 1],
    "event": ["buy", "view", "view", "view", "buy", "view", "view"],
    "rating": [5, None, 3, None, 4, None, None],
}
ITEMS = {
    "item_id": ["i3", "i1", "i2", "i4"],
    "title": ["Three", "One", "", "Four"],
    "colour": ["red", "blue", "red", "blue"],
    "price": [1, 2, 3, None],
    "blurb": ["A third thing", "The first of all", "", "Fourth"],
}
USERS = {"user_id": ["a", "idle", "b"], "age": [30, 40, 50], "town": ["Graz", "Graz", "Linz"]}


def dataset(**config):
    return Dataset.from_columns(EVENTS, ITEMS, USERS, DataConfig(**config))


def test_items_are_numbered_by_their_table_then_by_first_appearance():
    assert dataset().catalog.ids == ("", "i3", "i1", "i2", "i4", "new")


def test_users_are_numbered_by_their_table_then_by_first_appearance():
    made = dataset()
    assert made.users.ids == ("a", "idle", "b", "stranger")
    assert made.interactions.num_users == 4


def test_events_are_in_order_of_user_and_time():
    made = dataset()
    ids = np.array(made.catalog.ids)
    assert [list(ids[h]) for h in made.interactions.histories([0, 1, 2, 3])] == [
        ["i1", "i2", "i3"],
        [],
        ["i1", "new", "i2"],
        ["i1"],
    ]
    assert made.interactions.timestamp.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert made.interactions.split.tolist() == [TRAIN, VALID, TEST, TRAIN, VALID, TEST, TRAIN]
    assert made.interactions.event_names == ("buy", "view")
    assert made.interactions.event.tolist() == [1, 0, 1, 1, 1, 0, 1]


def test_an_item_without_a_title_is_called_by_its_id():
    assert dataset().catalog.titles == ("", "Three", "One", "i2", "Four", "new")


def test_the_text_is_the_title_then_every_text_or_categorical_column():
    assert dataset().catalog.texts == (
        "",
        "Three. red. A third thing",
        "One. blue. The first of all",
        "red",
        "Four. blue. Fourth",
        "",
    )


def test_attributes_are_the_categorical_and_numeric_columns():
    catalog = dataset().catalog
    assert set(catalog.attributes) == {"colour", "price"}
    assert catalog.schema.vocabularies == {"colour": ("blue", "red")}
    assert catalog.schema.numeric["price"][0] == 2
    assert catalog.features[5].tolist() == [0, 0, 0]


def test_texts_and_attributes_can_be_chosen():
    catalog = dataset(item_text=["blurb", "title"], item_attributes=["blurb"]).catalog
    assert catalog.texts[1] == "A third thing. Three"
    assert catalog.schema.vocabularies["blurb"] == ("A third thing", "Fourth", "The first of all")


@pytest.mark.parametrize("setting", ["item_text", "item_attributes"])
def test_a_chosen_column_must_exist(setting):
    with pytest.raises(InputError, match=f"data.{setting} names the column 'size'.*title, colour"):
        dataset(**{setting: ["size"]})


def test_users_have_a_profile_and_attributes_and_strangers_have_none():
    users = dataset().users
    assert users.texts == ("age 30, town Graz", "age 40, town Graz", "age 50, town Linz", "")
    assert users.schema.numeric["age"] == (40.0, pytest.approx((200 / 3) ** 0.5))
    assert not users.features[3].any()


def test_without_tables_ids_are_the_titles_and_there_is_no_text():
    made = Dataset.from_columns(EVENTS)
    assert made.catalog.ids == ("", "i2", "i1", "new", "i3")
    assert made.catalog.titles == made.catalog.ids
    assert set(made.catalog.texts) == {""}
    assert made.users.ids == ("b", "a", "stranger")


def test_items_that_cleaning_drops_leave_the_catalog():
    made = dataset(min_item_events=2, split="none")
    assert made.catalog.ids == ("", "i1", "i2")
    assert made.users.ids == ("a", "idle", "b", "stranger")
    assert made.interactions.item.tolist() == [1, 2, 1, 2, 1]


def test_unknown_items_that_are_dropped_leave_no_row():
    assert dataset(unknown_items="drop", split="none").catalog.ids == ("", "i3", "i1", "i2", "i4")


def equal(one, other):
    for name in ("user", "item", "timestamp", "event", "rating", "weight", "split"):
        a, b = getattr(one.interactions, name), getattr(other.interactions, name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    assert one.interactions.num_users == other.interactions.num_users
    assert one.interactions.event_names == other.interactions.event_names
    for a, b in ((one.catalog, other.catalog), (one.users, other.users)):
        assert (a.ids, a.titles, a.texts) == (b.ids, b.titles, b.texts)
        assert list(a.attributes.items()) == list(b.attributes.items())
        assert a.schema == b.schema
        np.testing.assert_array_equal(a.features, b.features)


def test_what_is_loaded_equals_what_was_saved(tmp_path):
    made = dataset()
    made.save(tmp_path / "data")
    equal(made, Dataset.load(tmp_path / "data"))
    equal(made, Dataset.load(Artifact.load(tmp_path / "data")))


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8)


@settings(
    max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.tuples(texts, texts, texts), min_size=1, max_size=8, unique_by=lambda r: r[0]))
def test_any_text_survives_saving(tmp_path, rows):
    keys, titles, colours = (list(column) for column in zip(*rows, strict=True))
    events = {"user_id": keys, "item_id": keys, "timestamp": [0] * len(keys)}
    items = {"item_id": keys, "title": titles, "colour": colours}
    settings = DataConfig(split="none", categorical=["colour"])
    made = Dataset.from_columns(events, items, None, settings)
    assert made.users.ids == tuple(keys)
    made.save(tmp_path / "data")
    equal(made, Dataset.load(tmp_path / "data"))


def test_a_changed_byte_is_found(tmp_path):
    dataset().save(tmp_path / "data")
    path = tmp_path / "data" / "interactions.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"interactions\.parquet does not match its digest"):
        Dataset.load(tmp_path / "data")


def test_a_folder_without_a_manifest_is_unfinished(tmp_path):
    dataset().save(tmp_path / "data")
    (tmp_path / "data" / "manifest.json").unlink()
    with pytest.raises(ArtifactError, match="unfinished"):
        Dataset.load(tmp_path / "data")


def test_columns_may_be_arrays():
    made = Dataset.from_columns(
        {
            "user_id": np.array([1, 1, 1]),
            "item_id": np.array(["x", "y", "z"]),
            "timestamp": np.array(["2024-01-01", "2024-01-02", "2024-01-03"], "datetime64[D]"),
            "rating": np.array([1, np.nan, 2]),
        }
    )
    assert made.users.ids == ("1",)
    assert made.interactions.timestamp.tolist() == [1704067200, 1704153600, 1704240000]
    np.testing.assert_array_equal(made.interactions.rating, np.float32([1, np.nan, 2]))
