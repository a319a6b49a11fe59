"""How a column is judged, and the texts and features made of it."""

import pytest

from tfrec.config import DataConfig
from tfrec.data.attributes import joined_texts, kind_of, kinds_of, profiles, schema_of
from tfrec.errors import InputError


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "2.5", "", "-3e2"], "numeric"),
        (["red", "blue", "red", "blue"], "categorical"),
        (["Action|War", "War", "Action"], "categorical"),
        (["1", "two", "1", "two"], "categorical"),
        (["Bosch", "Makita", "Fein"], "text"),  # none comes again
        (["a film about a dog and his boy"] * 4, "text"),  # they come again and are long
        (["", " ", ""], "empty"),
        (["|"], "empty"),
        (["1_000", "1_000"], "categorical"),
    ],
)
def test_a_column_is_judged_by_its_cells(cells, kind):
    assert kind_of(cells, "|") == kind


def test_a_column_may_be_called_categorical():
    settings = DataConfig(categorical=["shelf"])
    kinds = kinds_of({"shelf": ["1", "2"], "price": ["1", "2"]}, settings)
    assert kinds == {"shelf": "categorical", "price": "numeric"}


def test_vocabularies_hold_the_most_frequent_values():
    cells = ["b|a", "b|c", "b|c", "d"]
    schema = schema_of(list("1234"), {"x": cells}, {"x": "categorical"}, DataConfig(max_values=2))
    assert schema.vocabularies == {"x": ("b", "c")}
    # a and d stand there once each: the tie goes to the alphabet
    schema = schema_of(list("1234"), {"x": cells}, {"x": "categorical"}, DataConfig(max_values=3))
    assert schema.vocabularies == {"x": ("a", "b", "c")}


def test_numbers_are_normalised_by_what_is_known_of_them():
    columns = {"price": ["1", "", "3"], "same": ["5", "5", "5"]}
    schema = schema_of(list("abc"), columns, dict.fromkeys(columns, "numeric"), DataConfig())
    assert schema.numeric == {"price": (2.0, 1.0), "same": (5.0, 1.0)}
    assert schema.encode(columns, 3).tolist() == [[-1, 0], [0, 0], [1, 0]]


@pytest.mark.parametrize("cell", ["NaN", "inf", "-Infinity"])
def test_a_number_that_is_not_finite_is_refused_with_the_item(cell):
    columns = {"price": ["1", cell]}
    kinds = kinds_of(columns, DataConfig())
    with pytest.raises(InputError, match=f"column 'price' of 'b' is '{cell}'"):
        schema_of(["a", "b"], columns, kinds, DataConfig())


def test_a_text_is_made_of_the_cells_that_hold_something():
    columns = [["Toy Story (1995)", "", "Heat"], ["Animation|Comedy", "War", " "]]
    texts = joined_texts(columns, "|")
    assert texts == ("Toy Story (1995). Animation, Comedy", "War", "Heat")


def test_a_profile_names_each_column_and_leaves_out_empty_ones():
    columns = {"age": ["24", ""], "home_town": ["Graz", "Linz|Wien"]}
    assert profiles(columns, "|", 2) == ("age 24, home town Graz", "home town Linz, Wien")
    assert profiles({}, "|", 2) == ("", "")
