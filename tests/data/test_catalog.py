"""Catalog and Users: ids and rows, attributes and features."""

import numpy as np
import pytest

from tfrec.data.catalog import Catalog, FeatureSchema, Users
from tfrec.errors import InputError

SCHEMA = FeatureSchema({"genre": ("Action", "Comedy", "War")}, {"year": (2000.0, 10.0)})


def catalog(ids=("a", "b"), **attributes):
    given = attributes or {"genre": ("War|Action", "Opera"), "year": ("1990", "")}
    return Catalog(
        ids=("", *ids),
        titles=("", *(f"Title {i}" for i in ids)),
        texts=("", *(f"Text {i}" for i in ids)),
        attributes={name: ("", *cells) for name, cells in given.items()},
        schema=SCHEMA,
    )


def test_rows_of_items_begin_at_one_and_zero_is_the_unknown():
    made = catalog()
    assert [made.row(i) for i in ("a", "b", "z", "")] == [1, 2, 0, 0]
    assert made.rows(["b", "z", "a"]).tolist() == [2, 0, 1]
    assert made.num_items == 2


def test_a_cell_of_several_values_has_length_one_and_unknown_words_are_zeros():
    half = 2**-0.5
    expected = [[0, 0, 0, 0], [half, 0, half, -1], [0, 0, 0, 0]]
    np.testing.assert_allclose(catalog().features, expected, rtol=1e-6)


def test_a_value_that_stands_twice_in_a_cell_counts_once():
    features = SCHEMA.encode({"genre": ["War|War"]}, 1)
    assert features.tolist() == [[0, 0, 1, 0]]


def test_columns_that_are_missing_give_zeros():
    assert SCHEMA.encode({}, 2).tolist() == [[0] * 4] * 2


def test_a_numeric_cell_that_is_no_number_is_refused():
    for cell in ("soon", "nan", "inf"):
        with pytest.raises(InputError, match=f"'year' holds '{cell}'"):
            SCHEMA.encode({"year": [cell]}, 1)


def test_adding_items_moves_no_row():
    more = catalog(("c",), genre=("Comedy",), year=("2010",))
    both = catalog().added(more)
    assert [both.row(i) for i in "abc"] == [1, 2, 3]
    assert both.titles[3] == "Title c"
    np.testing.assert_array_equal(both.features[:3], catalog().features)
    assert both.features[3].tolist() == [0, 1, 0, 1]


def test_an_id_stands_once():
    with pytest.raises(InputError, match="item id 'a' stands there twice"):
        catalog(("a", "a"))
    with pytest.raises(InputError, match="item id 'a' stands there twice"):
        catalog().added(catalog())


def test_a_catalog_begins_with_the_unknown_item():
    with pytest.raises(InputError, match="row 0"):
        Catalog(ids=("a",), titles=("A",), texts=("",))


def test_columns_have_one_cell_for_each_row():
    with pytest.raises(InputError, match="'titles' has 1 rows and there are 2 ids"):
        Catalog(ids=("", "a"), titles=("",), texts=("", ""))


def test_rows_of_users_begin_at_zero():
    users = Users(ids=("u", "v"), titles=("u", "v"), texts=("", ""))
    assert [users.row(i) for i in ("u", "v", "w")] == [0, 1, -1]
