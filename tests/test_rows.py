"""Rows: what is read from int8 is what was rounded, and what grows keeps what it has."""

import numpy as np
import pytest

from tfrec.errors import InputError
from tfrec.rows import Growing, GrowingRows, Int8Rows, growing, int8_rows


def vectors(count=50, width=6, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


class TestInt8Rows:
    def test_rows_are_those_that_were_rounded(self):
        given = vectors()
        codes, scales = int8_rows(given)
        rows, whole = Int8Rows(codes, scales), codes * scales[:, None]
        assert (len(rows), rows.shape, rows.dtype) == (50, (50, 6), np.float32)
        for which in (slice(1, None), np.array([3, 3, 0]), np.array([[1, 2], [4, 49]]), [7]):
            assert rows[which].dtype == np.float32
            np.testing.assert_array_equal(rows[which], whole[which])
        assert np.abs(rows[:] - given).max() <= np.abs(given).max() / 254 + 1e-7

    def test_zeros_stay_zeros(self):
        assert not Int8Rows(*int8_rows(np.zeros((3, 4), np.float32)))[:].any()

    def test_scales_of_others_are_refused(self):
        with pytest.raises(InputError, match="3 rows and 2 scales"):
            Int8Rows(np.zeros((3, 4), np.int8), np.ones(2, np.float32))


class TestGrowingRows:
    def test_rows_are_added_and_replaced(self):
        base, more = vectors(), vectors(200, seed=1)
        grown = growing(Int8Rows(*int8_rows(base)))
        assert isinstance(grown, GrowingRows)
        for row, values in enumerate(more, start=50):
            grown.put(row, values)
        grown.put(3, more[0])
        expected = Int8Rows(*int8_rows(np.concatenate([base, more])))[:]
        expected[3] = expected[50]
        np.testing.assert_array_equal(grown.array[:], expected)

    def test_floats_stay_floats(self):
        grown = growing(vectors())
        assert isinstance(grown, Growing)
        np.testing.assert_array_equal(grown.array, vectors())


class TestGrowing:
    def test_rows_are_added_and_replaced_and_what_was_given_is_not_touched(self):
        given = np.arange(6, dtype=np.float32).reshape(3, 2)
        kept = given.copy()
        grown = Growing(given)
        grown.put(1, np.float32([9, 9]))
        grown.put(3, np.float32([7, 8]))
        assert grown.array.tolist() == [[0, 1], [9, 9], [4, 5], [7, 8]]
        np.testing.assert_array_equal(given, kept)

    @pytest.mark.parametrize("shape", [(0, 3), (5, 3), (1,), (4, 0)])
    def test_it_grows_past_any_room_that_was_reserved(self, shape):
        rng = np.random.default_rng(0)
        expected = rng.normal(size=shape).astype(np.float32)
        grown = Growing(expected)
        for _ in range(500):
            row = rng.normal(size=shape[1:]).astype(np.float32)
            grown.put(len(expected), row)
            expected = np.concatenate([expected, row[None]])
        np.testing.assert_array_equal(grown.array, expected)
        assert grown.array.dtype == np.float32

    def test_rows_are_copied_seldom(self):
        grown = Growing(np.zeros((100, 2), np.float32))
        rooms = set()
        for row in range(100, 2000):
            grown.put(row, np.zeros(2, np.float32))
            rooms.add(grown.array.base.__array_interface__["data"][0])
        assert len(rooms) < 10
