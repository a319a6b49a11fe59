"""What becomes of cells: ids stay as written, numbers and times are read or refused."""

from datetime import UTC, date, datetime

import numpy as np
import pyarrow as pa
import pytest

from tfrec.data.columns import BadCell, Codes, Times, numbers, strings

NEW_YEAR_2024 = 1_704_067_200


def seconds(*cells, unit="auto"):
    times = Times(unit)
    times.add(pa.array(list(cells)))
    return [value / 1e6 for value in times.microseconds().tolist()]


def test_ids_are_opaque_and_keep_leading_zeros():
    assert strings(pa.array(["007", " a ", "é", ""])).to_pylist() == ["007", " a ", "é", ""]


def test_whole_numbers_become_decimal_strings_even_if_pandas_made_them_floats():
    assert strings(pa.array([10**12, 7])).to_pylist() == ["1000000000000", "7"]
    assert strings(pa.array([17.0, None, 3.0])).to_pylist() == ["17", "", "3"]


def test_other_floats_and_booleans_are_written_out():
    assert strings(pa.array([0.5, 3.0])).to_pylist() == ["0.5", "3"]
    assert strings(pa.array([True, None])).to_pylist() == ["true", ""]


def test_lists_are_joined_by_the_separator():
    assert strings(pa.array([["a", "b"], None, []]), ";").to_pylist() == ["a;b", "", ""]


def test_a_nested_column_is_refused():
    with pytest.raises(BadCell, match="struct"):
        strings(pa.array([{"a": 1}]))


def test_codes_number_ids_by_first_appearance_across_batches():
    codes = Codes()
    assert codes.encode(pa.array(["b", "a", "b", ""])).tolist() == [0, 1, 0, -1]
    assert codes.encode(pa.array(["c", None, "a"])).tolist() == [2, -1, 1]
    assert codes.ids == ("b", "a", "c")


def test_codes_of_nothing_are_nothing():
    assert Codes().encode(pa.array([], pa.string())).tolist() == []


def test_empty_cells_are_no_number_and_the_rest_are_read():
    values = numbers(pa.array(["1.5", "", None, "-2", " 3 "]))
    np.testing.assert_array_equal(values, [1.5, np.nan, np.nan, -2, 3])


@pytest.mark.parametrize("cell", ["NaN", "inf", "-Infinity", "good", "1_0"])
def test_a_cell_that_is_no_finite_number_is_refused_at_its_row(cell):
    with pytest.raises(BadCell, match=cell) as caught:
        numbers(pa.array(["1", cell]))
    assert caught.value.row == 1


def test_infinity_in_a_float_column_is_refused():
    with pytest.raises(BadCell, match="inf") as caught:
        numbers(pa.array([1.0, 2.0, float("inf")]))
    assert caught.value.row == 2


@pytest.mark.parametrize(
    "cell",
    [
        "2024-01-01",
        "2024-01-01T00:00",
        "2024-01-01 00:00:00",
        "2024-01-01T00:00:00.000",
        "2024-01-01T00:00:00Z",
        "2024-01-01T02:00:00+02:00",
        "2023-12-31T19:00:00-0500",
        " 2024-01-01 ",
    ],
)
def test_iso_8601_is_read_and_is_utc_where_it_names_no_zone(cell):
    assert seconds(cell) == [NEW_YEAR_2024]


def test_zoned_and_plain_times_may_mix():
    assert seconds("2024-01-01T01:00:00+01:00", "2024-01-01") == [NEW_YEAR_2024] * 2


def test_dates_and_moments_of_arrow_are_read():
    assert seconds(date(2024, 1, 1)) == [NEW_YEAR_2024]
    assert seconds(datetime(2024, 1, 1, tzinfo=UTC)) == [NEW_YEAR_2024]


@pytest.mark.parametrize(
    ("factor", "unit"), [(1, "s"), (10**3, "ms"), (10**6, "us"), (10**9, "ns")]
)
def test_the_unit_of_numbers_is_told_by_their_size(factor, unit):
    given = [NEW_YEAR_2024 * factor, (NEW_YEAR_2024 + 1) * factor]
    expected = [NEW_YEAR_2024, NEW_YEAR_2024 + 1]
    assert seconds(*given) == expected
    assert seconds(*given, unit=unit) == expected
    assert seconds(*map(str, given)) == expected


def test_fractions_of_seconds_are_kept_for_the_order():
    assert seconds("1.25", "1e1") == [1.25, 10]
    assert seconds(0.5) == [0.5]


@pytest.mark.parametrize("cell", ["yesterday", "2024-13-01", "", "nan", "01/02/2024"])
def test_an_unparsable_time_is_refused_at_its_row(cell):
    with pytest.raises(BadCell) as caught:
        seconds("2024-01-01", cell)
    assert caught.value.row == 1


@pytest.mark.parametrize("cells", [["5", "x"], [5.0, float("nan")], [5, None], [None]])
def test_a_number_among_which_one_is_none_is_refused(cells):
    with pytest.raises(BadCell) as caught:
        seconds(*cells)
    assert caught.value.row == len(cells) - 1


def test_a_time_beyond_the_year_9999_is_refused():
    with pytest.raises(BadCell, match="no time in s"):
        seconds(10**12, unit="s")


def test_a_date_without_hyphens_is_not_taken_for_seconds():
    with pytest.raises(BadCell, match="without hyphens"):
        seconds(20240517, 20240518)
    assert seconds(20240517, unit="s") == [20240517]
