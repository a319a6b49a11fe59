"""What cleaning drops, in which order, and what it counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfrec.config import DataConfig
from tfrec.data.cleaning import clean, robots, sort_events, weigh
from tfrec.data.raw import read_events
from tfrec.data.tables import Columns
from tfrec.errors import InputError

DAY = 86_400


def events(*rows, **columns):
    """Rows of (user, item, seconds)."""
    users, items, times = (list(column) for column in zip(*rows, strict=True))
    given = {"user_id": users, "item_id": items, "timestamp": times, **columns}
    return sort_events(read_events(Columns("the interactions", given), {}, "s"))


def pairs(read):
    return [(read.user_ids[u], read.item_ids[i]) for u, i in zip(read.user, read.item, strict=True)]


def cleaned(read, known=None, **settings):
    known_item = np.array([known is None or i in known for i in read.item_ids])
    kept, dropped = clean(read, known_item, DataConfig(**settings))
    return pairs(kept), {why: count for why, count in dropped.items() if count}


def test_events_are_sorted_by_user_then_time_then_place_in_the_file():
    read = events(("b", "1", 5), ("a", "2", 9), ("b", "3", 1), ("b", "4", 5), ("a", "5", 9))
    assert pairs(read) == [("b", "3"), ("b", "1"), ("b", "4"), ("a", "2"), ("a", "5")]


def test_fractions_of_a_second_decide_the_order():
    read = events(("a", "late", 1.75), ("a", "early", 1.25))
    assert pairs(read) == [("a", "early"), ("a", "late")]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_sort_is_stable(keys):
    rows = [(f"u{user}", str(place), time) for place, (user, time) in enumerate(keys)]
    read = events(*rows)
    first = list(dict.fromkeys(user for user, _, _ in rows))
    assert pairs(read) == [
        (user, item) for user, item, _ in sorted(rows, key=lambda r: (first.index(r[0]), r[2]))
    ]


def test_by_default_nothing_is_dropped():
    rows = [("a", "1", 1), ("a", "1", 1), ("b", "2", 2)]
    assert cleaned(events(*rows)) == ([("a", "1"), ("a", "1"), ("b", "2")], {})


def test_events_without_an_id_are_dropped_and_counted():
    read = events(("a", "1", 1), ("", "1", 1), (None, "2", 1), ("b", None, 2))
    assert cleaned(read) == ([("a", "1")], {"no_user_id": 2, "no_item_id": 1})


def test_unknown_items_are_kept_dropped_or_refused():
    read = events(("a", "1", 1), ("a", "x", 2), ("b", "x", 3))
    assert cleaned(read, {"1"})[1] == {}
    assert cleaned(read, {"1"}, unknown_items="drop") == ([("a", "1")], {"unknown_item": 2})
    with pytest.raises(InputError, match=r"2 interactions .* such as 'x'.*data\.unknown_items"):
        cleaned(read, {"1"}, unknown_items="error")


def test_a_user_above_the_daily_limit_is_a_robot_and_loses_all_events():
    rows = [("robot", str(i), DAY + i) for i in range(4)] + [("robot", "9", 9 * DAY)]
    people = [("man", str(i), i * DAY // 2) for i in range(6)]
    read = events(*rows, *people)
    assert robots(read, 3).tolist() == [True, False]
    assert robots(read, 4).tolist() == [False, False]
    kept, dropped = cleaned(read, max_events_per_day=3)
    assert {user for user, _ in kept} == {"man"}
    assert dropped == {"robot": 5}


def test_events_rated_low_are_dropped_and_unrated_ones_stay():
    read = events(("a", "1", 1), ("a", "2", 2), ("a", "3", 3), rating=[3.5, 4, None])
    kept, dropped = cleaned(read, positive_rating=4)
    assert kept == [("a", "2"), ("a", "3")]
    assert dropped == {"low_rating": 1}


@pytest.mark.parametrize(
    ("which", "ratings"), [("all", [1, 2, 3, 4]), ("first", [1, 2]), ("last", [2, 4])]
)
def test_of_several_events_with_one_item_the_first_or_last_stays(which, ratings):
    rows = [("a", "x", 1), ("a", "y", 2), ("a", "x", 3), ("a", "x", 3)]
    read = events(*rows, rating=[1, 2, 3, 4])
    kept, _ = clean(read, np.ones(2, bool), DataConfig(duplicates=which))
    assert kept.rating.tolist() == ratings


def test_rare_items_go_before_rare_users():
    # Without item y, user b has one event left.
    read = events(("a", "x", 1), ("a", "x", 2), ("b", "x", 1), ("b", "y", 2))
    kept, dropped = cleaned(read, min_item_events=2, min_user_events=2)
    assert kept == [("a", "x"), ("a", "x")]
    assert dropped == {"rare_item": 1, "rare_user": 1}


def test_the_k_core_is_found_by_dropping_until_nothing_changes():
    # A chain that unravels: z needs c, c needs z; a, b, x, y hold each other.
    read = events(
        ("a", "x", 1), ("a", "y", 2), ("b", "x", 1), ("b", "y", 2), ("b", "w", 3), ("c", "w", 1),
        ("c", "z", 2),
    )  # fmt: skip
    kept, dropped = cleaned(read, k_core=2)
    assert kept == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    assert dropped == {"k_core": 3}


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=40),
    st.integers(2, 4),
)
def test_the_k_core_equals_that_of_the_definition(edges, k):
    read = events(*[(f"u{u}", f"i{i}", t) for t, (u, i) in enumerate(edges)])
    left = pairs(read)
    while True:
        users, items = [u for u, _ in left], [i for _, i in left]
        rest = [(u, i) for u, i in left if users.count(u) >= k and items.count(i) >= k]
        if rest == left:
            break
        left = rest
    if left:
        assert cleaned(read, k_core=k)[0] == left
    else:
        with pytest.raises(InputError, match="left no interaction"):
            cleaned(read, k_core=k)


def test_when_nothing_is_left_the_causes_are_counted():
    read = events(("a", "x", 1), ("", "x", 2))
    with pytest.raises(InputError, match=r"1 without a user id, 1 of users with fewer than"):
        cleaned(read, min_user_events=2)


def test_the_weight_of_an_event_is_its_own_times_that_of_its_type():
    read = events(("a", "x", 1), ("a", "y", 2), event=["view", "buy"], weight=[2, 3])
    assert weigh(read, {"buy": 0.5}).weight.tolist() == [2, 1.5]


def test_a_weight_for_an_event_that_never_happens_is_refused():
    read = events(("a", "x", 1), event=["view"])
    with pytest.raises(InputError, match="names the event 'purchase', and the events are view"):
        weigh(read, {"purchase": 2})
