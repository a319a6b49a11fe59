"""Catalog and Users: ids and rows, attributes and features."""

import numpy as np
import pytest

from tfrec.data.catalog import Catalog, FeatureSchema, LiveCatalog, Users
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


def genres(*cells):
    return catalog(tuple(f"i{n}" for n in range(1, len(cells) + 1)), genre=cells)


def test_items_are_found_by_any_of_the_values_they_have():
    made = genres("War|Action", "Comedy", "", "Action", "War|War")
    assert made.having("genre", ["War"]).tolist() == [1, 5]
    assert made.having("genre", ["Action", "Comedy", "nowhere", "Action"]).tolist() == [1, 2, 4]
    assert made.having("genre", []).tolist() == []
    assert made.having("genre", [""]).tolist() == []
    assert made.having("genre", ["War"]).dtype == np.int32
    with pytest.raises(InputError, match="no attribute 'nope' to filter by; they have: genre"):
        made.having("nope", ["War"])


def test_values_come_by_how_many_items_have_them_then_by_name():
    made = genres("War|Action", "Comedy", "Comedy|Action", "Action|Action")
    assert made.values("genre") == ["Action", "Comedy", "War"]
    assert genres("b", "a").values("genre") == ["a", "b"]
    with pytest.raises(InputError, match="nope"):
        made.values("nope")


def test_cells_are_split_and_empty_ones_left_out():
    made = catalog(("a", "b"), genre=("War|Action", ""), year=("1990", "2000"))
    assert made.cells(1) == {"genre": ["War", "Action"], "year": ["1990"]}
    assert made.cells(2) == {"year": ["2000"]}
    assert made.cells(0) == {}


class TestLiveCatalog:
    def test_it_begins_as_its_base_and_does_not_change_it(self):
        base = catalog()
        live = LiveCatalog(base)
        live.put("c", "Title c", "Text c", {"genre": "Comedy", "year": "2010"})
        live.put("a", "Other", "Words", {})
        assert base.ids == ("", "a", "b")
        assert base.titles[1] == "Title a"
        assert base.cells(1) == {"genre": ["War", "Action"], "year": ["1990"]}
        np.testing.assert_array_equal(base.features, catalog().features)

    def test_what_was_put_is_as_in_a_catalog_that_was_built_with_it(self):
        live = LiveCatalog(catalog())
        assert live.put("c", "Title c", "Text c", {"genre": "Comedy|War", "year": "2010"}) == 3
        built = catalog(("a", "b", "c"), genre=("War|Action", "Opera", "Comedy|War"),
                        year=("1990", "", "2010"))  # fmt: skip
        assert tuple(live.ids) == built.ids
        assert tuple(live.titles) == built.titles
        assert tuple(live.texts) == built.texts
        assert live.digest() == built.digest()
        np.testing.assert_array_equal(live.features, built.features)
        for row in range(4):
            assert live.cells(row) == built.cells(row)
        assert live.values("genre") == built.values("genre")
        assert live.num_items == len(live) - 1 == 3

    @pytest.mark.parametrize("looked_before", [False, True])
    def test_putting_again_keeps_the_row_and_moves_the_item_to_its_new_values(self, looked_before):
        live = LiveCatalog(catalog())
        if looked_before:
            assert live.having("genre", ["War"]).tolist() == [1]
        assert live.put("a", "New", "Words", {"genre": "Comedy|Comedy"}) == 1
        assert live.row("a") == 1
        assert live.having("genre", ["War", "Action"]).tolist() == []
        assert live.having("genre", ["Comedy"]).tolist() == [1]
        assert live.values("genre") == ["Comedy", "Opera"]
        assert live.features[1].tolist() == [0, 1, 0, 0]
        assert (live.titles[1], live.texts[1]) == ("New", "Words")

    def test_rows_of_a_value_stay_in_order_whoever_comes_and_goes(self):
        live = LiveCatalog(catalog())
        live.values("genre")
        for genre in ("War", "Comedy", "War"):
            live.put("a", "A", "", {"genre": genre})
            live.put("b", "B", "", {"genre": "War"})
        live.put("c", "C", "", {"genre": "War"})
        assert live.having("genre", ["War"]).tolist() == [1, 2, 3]

    def test_columns_that_it_does_not_have_are_left_out(self):
        live = LiveCatalog(catalog())
        row = live.put("c", "C", "", {"colour": "red"})
        assert live.cells(row) == {}
        assert set(live.attributes) == {"genre", "year"}

    @pytest.mark.parametrize(
        ("item_id", "attributes", "says"),
        [("", {}, "id is empty"), ("c", {"year": "soon"}, "'year' holds 'soon'")],
    )
    def test_what_is_wrong_changes_nothing(self, item_id, attributes, says):
        live = LiveCatalog(catalog())
        with pytest.raises(InputError, match=says):
            live.put(item_id, "C", "", attributes)
        with pytest.raises(InputError, match=says):
            live.put(item_id and "a", "C", "", attributes)
        assert len(live) == len(live.features) == 3
        assert live.digest() == catalog().digest()
        assert live.cells(1) == {"genre": ["War", "Action"], "year": ["1990"]}
