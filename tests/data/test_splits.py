"""Which events train, validate and test."""

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tfrec.config import Config, DataConfig
from tfrec.data.building import build
from tfrec.data.interactions import TEST, TRAIN, VALID
from tfrec.data.sources import read
from tfrec.data.splits import assign
from tfrec.errors import InputError


def split(kind, user, item=None, time=None, seed=1, **settings):
    n = len(user)
    return assign(
        np.array(user, np.int32),
        np.array(item if item is not None else range(n), np.int32),
        np.array(time if time is not None else range(n), np.int64),
        DataConfig(split=kind, **settings),
        seed,
    ).tolist()


def test_leave_one_out_takes_the_last_two_events_of_each_user():
    expected = [TRAIN, VALID, TEST, TRAIN, TRAIN, VALID, TEST]
    assert split("leave_one_out", [0, 0, 0, 3, 3, 3, 3]) == expected


def test_leave_one_out_leaves_short_histories_in_training():
    assert split("leave_one_out", [0, 1, 1, 2, 2, 2]) == [TRAIN] * 4 + [VALID, TEST]


def test_leave_one_out_says_what_it_lacks():
    with pytest.raises(
        InputError, match="at least 1 user with 3 events, and of 2 users the longest"
    ):
        split("leave_one_out", [0, 0, 1])


def test_the_time_split_holds_out_the_latest_events_of_all():
    user, time = [0] * 5 + [1] * 5, [1, 2, 3, 9, 10, 4, 5, 6, 7, 8]
    parts = split("time", user, time=time, valid_fraction=0.2, test_fraction=0.1)
    assert parts == [TRAIN, TRAIN, TRAIN, VALID, TEST, *[TRAIN] * 4, VALID]


def test_the_time_split_never_parts_equal_times():
    parts = split("time", [0] * 10, time=[1, 2, 3, 4, 5, 6, 7, 8, 8, 8])
    assert parts == [TRAIN] * 6 + [VALID] + [TEST] * 3


@pytest.mark.parametrize("time", [[5, 5, 5, 5], [1, 2, 2, 2]])
def test_the_time_split_says_what_it_lacks(time):
    with pytest.raises(InputError, match=r"4 events at \d distinct times"):
        split("time", [0] * 4, time=time)


@pytest.mark.parametrize("kind", ["item_cold", "user_cold"])
def test_a_cold_split_holds_out_every_event_of_the_drawn(kind):
    rng = np.random.default_rng(0)
    user, item = np.sort(rng.integers(0, 20, 300)), rng.integers(0, 20, 300)
    parts = np.array(split(kind, user, item, valid_fraction=0.2, test_fraction=0.1))
    of_each = [set(parts[(item if kind == "item_cold" else user) == code]) for code in range(20)]
    assert all(len(found) == 1 for found in of_each)
    assert [of_each.count({part}) for part in (TRAIN, VALID, TEST)] == [14, 4, 2]


def test_a_cold_split_is_drawn_by_its_seed():
    item = list(range(50))
    first, again = split("item_cold", [0] * 50, item), split("item_cold", [0] * 50, item)
    assert first == again
    assert first != split("item_cold", [0] * 50, item, seed=2)


@pytest.mark.parametrize(("kind", "what"), [("item_cold", "items"), ("user_cold", "users")])
def test_a_cold_split_says_what_it_lacks(kind, what):
    with pytest.raises(InputError, match=f"at least 3 {what} with events, and there are 2"):
        split(kind, [0, 0, 1], [4, 4, 5])


def test_without_a_split_everything_trains():
    assert split("none", [0, 1]) == [TRAIN, TRAIN]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=10).filter(lambda n: max(n) >= 3))
def test_leave_one_out_tests_each_long_user_once_and_after_validation(lengths):
    user = np.repeat(np.arange(len(lengths)), lengths)
    parts = np.array(split("leave_one_out", user))
    for code, length in enumerate(lengths):
        expected = [TRAIN] * (length - 2) + [VALID, TEST] if length >= 3 else [TRAIN] * length
        assert parts[user == code].tolist() == expected


# MD5 of train.csv as an independent splitter writes it: user_id,item_id,rating,timestamp.
PUBLISHED = [
    ("movielens-100k", "ml-100k", "ff345a798c4d1fd72dea1a02aeaaafc7"),
    ("movielens-1m", "ml-1m", "137d614445874fa786db520f1d016774"),
]


@pytest.mark.parametrize(("name", "folder", "md5"), PUBLISHED)
def test_the_split_of_movielens_is_the_one_of_the_published_protocol(
    shared_data, name, folder, md5
):
    config = Config.load(name, [f"data.data_dir={shared_data / folder}"])
    built = build(read(config.data), config.data)
    train, users, items = built.interactions.part(TRAIN), built.users.ids, built.catalog.ids
    assert users == tuple(map(str, range(1, len(users) + 1)))  # the order that the MD5 is of
    lines = [
        f"{users[u]},{items[i]},{int(r)},{t}\n"
        for u, i, r, t in zip(
            train.user.tolist(),
            train.item.tolist(),
            train.rating.tolist(),
            train.timestamp.tolist(),
            strict=True,
        )
    ]
    written = "user_id,item_id,rating,timestamp\n" + "".join(lines)
    assert hashlib.md5(written.encode(), usedforsecurity=False).hexdigest() == md5
