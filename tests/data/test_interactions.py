"""Interactions: frozen, and built only through checks."""

import numpy as np
import pytest

from tfrec.data.interactions import TEST, TRAIN, VALID, Interactions
from tfrec.errors import InputError


def interactions(**changes):
    columns = {
        "user": np.array([0, 0, 2, 2, 2], np.int32),
        "item": np.array([5, 3, 5, 1, 2], np.int32),
        "timestamp": np.array([1, 2, 1, 1, 7], np.int64),
        "event": np.zeros(5, np.int8),
        "rating": np.array([1, np.nan, 3, 4, 5], np.float32),
        "weight": np.ones(5, np.float32),
        "split": np.array([TRAIN, VALID, TRAIN, VALID, TEST], np.int8),
        "num_users": 4,
    }
    return Interactions(**(columns | changes))


def test_the_events_of_a_user_lie_between_his_offsets():
    made = interactions()
    assert made.offsets.tolist() == [0, 2, 2, 5, 5]
    assert [h.tolist() for h in made.histories([2, 0, 1])] == [[5, 1, 2], [5, 3], []]


def test_a_part_keeps_the_meaning_of_user_rows():
    part = interactions().part(TRAIN, TEST)
    assert part.item.tolist() == [5, 5, 2]
    assert part.user.tolist() == [0, 2, 2]
    assert part.num_users == 4


def test_nothing_can_be_changed_afterwards():
    with pytest.raises(ValueError, match="read-only"):
        interactions().item[0] = 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"item": np.zeros(4, np.int32)}, "4 values of 'item'"),
        ({"num_users": 2}, "outside 0..1"),
        ({"user": np.array([0, 0, 2, 1, 2], np.int32)}, "sorted by user"),
        ({"timestamp": np.array([2, 1, 1, 1, 7])}, "in order of time"),
        ({"weight": np.array([1, 1, 1, 1, np.nan], np.float32)}, "finite and not negative"),
        ({"weight": np.array([1, 1, 1, 1, -1], np.float32)}, "finite and not negative"),
    ],
)
def test_what_is_no_list_of_events_is_refused(changes, problem):
    with pytest.raises(InputError, match=problem):
        interactions(**changes)


def test_there_may_be_no_event():
    nothing = interactions().select(np.zeros(5, bool))
    assert len(nothing) == 0
    assert nothing.offsets.tolist() == [0, 0, 0, 0, 0]
