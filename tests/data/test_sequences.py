"""Histories as arrays: coding, rows of a request, packed rows of training."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import make_histories, make_interactions

from tfrec.data.sequences import (
    GAP_BUCKETS,
    MAX_SEGMENTS,
    EventCoding,
    Histories,
    PackedSequences,
    gap_bucket,
    pack,
    query_arrays,
)

TOKENS = ("item", "event", "rating", "gap", "position")


def numbered(lengths: list[int], seed: int = 0) -> Histories:
    """Histories in which no item comes twice, so that an item tells its event."""
    histories = make_histories(lengths, seed=seed)
    item = np.arange(1, len(histories.item) + 1, dtype=np.int32)
    return Histories(
        histories.offsets, item, histories.event, histories.rating, histories.timestamp
    )


def before(histories: Histories, user: int, count: int) -> Histories:
    """The first ``count`` events of one user."""
    start = int(histories.offsets[user])
    part = slice(start, start + count)
    return Histories(
        np.array([0, count]),
        histories.item[part],
        histories.event[part],
        histories.rating[part],
        histories.timestamp[part],
    )


def packed(histories: Histories, length: int, seed: int = 0) -> PackedSequences:
    return PackedSequences(histories, np.ones(len(histories.item), np.float32), length, seed)


# --- coding ---


def test_ratings_become_ten_buckets_between_the_lowest_and_the_highest():
    coding = EventCoding(("rating",), 1.0, 5.0)
    ratings = np.array([1, 2, 3, 4, 5, np.nan, -3, 9], np.float32)
    # 1 + floor((r - 1) / 4 * 9), kept within 1..10; 0 for none.
    assert coding.ratings(ratings).tolist() == [1, 3, 5, 7, 10, 0, 1, 10]


def test_without_ratings_every_rating_is_none():
    events = make_interactions([3, 2])
    unrated = EventCoding.of(replace(events, rating=np.full(5, np.nan, np.float32)))
    assert (unrated.rating_min, unrated.rating_max) == (0.0, 0.0)
    assert unrated.ratings(np.full(2, np.nan, np.float32)).tolist() == [0, 0]


def test_event_types_are_counted_from_two_and_unknown_ones_are_one():
    coding = EventCoding(("view", "buy"))
    assert coding.events(["buy", "view", "steal"]).tolist() == [3, 2, 1]
    assert coding.num_events == 4


def test_histories_translate_event_types_by_their_names():
    events = make_interactions([4, 2], names=("buy", "view", "new"))
    histories = Histories.of(events, EventCoding(("view", "buy"), 1, 5))
    expected = np.array([3, 2, 1])[events.event]
    assert histories.event.tolist() == expected.tolist()


def test_a_gap_has_a_bucket_for_each_doubling():
    seconds = np.array([-5, 0, 1, 2, 3, 4, 1023, 1024, 2**28, 2**29, 2**60])
    expected = [1, 1, 2, 3, 3, 4, 11, 12, 30, GAP_BUCKETS - 1, GAP_BUCKETS - 1]
    assert gap_bucket(seconds).tolist() == expected


def test_the_first_gap_of_every_user_is_zero():
    histories = make_histories([3, 0, 2, 1])
    assert histories.gap[[0, 3, 5]].tolist() == [0, 0, 0]
    seconds = histories.timestamp[1] - histories.timestamp[0]
    assert histories.gap[1] == gap_bucket(np.array([seconds]))[0]


def test_no_event_at_all_has_no_gap():
    assert make_histories([0, 0]).gap.tolist() == []


def test_taking_rows_keeps_their_order_and_may_repeat_them():
    histories = numbered([3, 0, 2])
    taken = histories.take([2, 0, 2, 1])
    assert taken.offsets.tolist() == [0, 2, 5, 7, 7]
    assert taken.item.tolist() == [4, 5, 1, 2, 3, 4, 5]


def test_last_keeps_the_newest_events():
    cut = numbered([3, 0, 2, 1]).last(2)
    assert cut.offsets.tolist() == [0, 2, 2, 4, 5]
    assert cut.item.tolist() == [2, 3, 4, 5, 6]


# --- a request ---


def test_a_short_history_follows_a_start_token_and_padding_follows_it():
    arrays = query_arrays(numbered([2]), length=5)
    assert arrays["item"].tolist() == [[0, 1, 2, 0, 0]]
    assert arrays["position"].tolist() == [[0, 1, 2, 0, 0]]
    assert arrays["segment"].tolist() == [[1, 1, 1, 0, 0]]
    assert arrays["last"].tolist() == [2]


def test_an_empty_history_is_the_start_token_alone():
    arrays = query_arrays(make_histories([0]), length=3, request_time=np.array([10**9]))
    assert arrays["segment"].tolist() == [[1, 0, 0]]
    assert arrays["last"].tolist() == [0]
    for name in (*TOKENS, "next_gap"):
        assert not arrays[name].any(), name


@pytest.mark.parametrize("events", [4, 5, 9])
def test_a_long_history_fills_the_row_with_its_newest_events(events):
    arrays = query_arrays(numbered([events]), length=4)
    assert arrays["item"].tolist() == [list(range(events - 3, events + 1))]
    assert arrays["segment"].all()
    assert arrays["last"].tolist() == [3]


def test_the_oldest_event_that_is_read_keeps_its_gap():
    histories = numbered([6])
    arrays = query_arrays(histories, length=3)
    assert arrays["gap"][0].tolist() == histories.gap[3:].tolist()
    assert arrays["gap"][0, 0] > 0


def test_next_gap_is_the_gap_of_the_next_event_and_at_last_of_the_request():
    histories = numbered([2])
    asked = histories.timestamp[-1:] + 1024
    arrays = query_arrays(histories, length=5, request_time=asked)
    assert arrays["next_gap"].tolist() == [[0, histories.gap[1], 12, 0, 0]]
    # Without a request time it is that of the newest event.
    at_once = query_arrays(histories, length=5, request_time=histories.timestamp[-1:])
    unsaid = query_arrays(histories, length=5)
    np.testing.assert_array_equal(unsaid["next_gap"], at_once["next_gap"])
    assert unsaid["next_gap"][0, 2] == 1


def test_each_row_of_many_is_the_row_alone():
    histories = numbered([2, 0, 9, 4, 1])
    asked = 1_700_000_000 + np.arange(5) * 999
    together = query_arrays(histories, 4, asked)
    for row in range(5):
        alone = query_arrays(histories.take([row]), 4, asked[row : row + 1])
        for name, values in alone.items():
            np.testing.assert_array_equal(together[name][row], values[0], err_msg=name)


# --- training rows ---


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_pack_puts_every_piece_in_a_row_without_overlap(data):
    length = data.draw(st.integers(1, 12))
    most = data.draw(st.integers(1, 5))
    sizes = data.draw(st.lists(st.integers(1, length), max_size=40))
    row, column, rows = pack(np.array(sizes, np.int64), length, most)
    used = np.zeros((rows, length), int)
    for r, c, size in zip(row, column, sizes, strict=True):
        assert c + size <= length
        used[r, c : c + size] += 1
    assert used.max(initial=0) <= 1
    assert used.sum() == sum(sizes)
    pieces = np.bincount(row, minlength=rows)
    assert rows == 0 or (pieces.min() >= 1 and pieces.max() <= most)
    # Rows that are not closed by their number of pieces are more than half full, all but one.
    filled = np.sort(used.sum(axis=1)[pieces < most])
    assert len(filled) < 2 or filled[0] + filled[1] > length


def test_pack_fills_rows_as_far_as_is_possible_here():
    row, column, rows = pack(np.array([3, 5, 2, 1, 4, 5]), length=5, most=3)
    assert rows == 4
    used = {r: sorted(column[row == r]) for r in range(4)}
    assert sorted(used.values()) == [[0], [0], [0, 3], [0, 4]]


def test_pack_of_nothing_has_no_row():
    assert pack(np.zeros(0, np.int64), 5, 3)[2] == 0


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 23), min_size=1, max_size=25),
    st.integers(1, 7),
    st.integers(0, 3),
)
def test_every_event_is_a_target_exactly_once_in_an_epoch(lengths, length, epoch):
    histories = numbered(lengths)
    rows = packed(histories, length).epoch(epoch)
    targets = rows["target"][rows["segment"] > 0]
    assert sorted(targets) == histories.item.tolist()
    assert not rows["target"][rows["segment"] == 0].any()
    assert ((rows["weight"] > 0) == (rows["target"] > 0)).all()


@pytest.mark.parametrize("epoch", range(3))
def test_training_sees_what_a_request_at_that_time_would_see(epoch):
    length, lengths = 5, [1, 4, 5, 6, 0, 17, 2, 11, 3, 3]
    histories = numbered(lengths)
    rows = packed(histories, length).epoch(epoch)
    user_of = np.repeat(np.arange(len(lengths)), lengths)
    started = 0
    for row, column in np.argwhere(rows["segment"] > 0):
        event = rows["target"][row, column] - 1
        user = user_of[event]
        segment = rows["segment"][row, column]
        assert rows["user"][row, segment - 1] == user
        own = rows["segment"][row, : column + 1] == segment
        places = int(own.sum())
        with_start = rows["item"][row, : column + 1][own][0] == 0
        started += with_start
        asked = query_arrays(
            before(histories, user, event - histories.offsets[user]),
            length if with_start or places == length else places,
            histories.timestamp[event : event + 1],
        )
        assert asked["last"][0] == places - 1
        for name in (*TOKENS, "next_gap"):
            seen = rows[name][row, : column + 1][own]
            np.testing.assert_array_equal(seen, asked[name][0, :places], err_msg=name)
    assert 0 < started < sum(lengths)


def test_segments_of_a_row_are_numbered_in_order_and_name_their_users():
    histories = numbered([2, 1, 3, 1, 1, 2])
    rows = packed(histories, 10).epoch(0)
    assert len(rows["item"]) == 1
    segment = rows["segment"][0]
    assert segment.tolist() == sorted(segment)
    assert sorted(rows["user"][0][:6]) == [0, 1, 2, 3, 4, 5]
    assert (rows["user"][0][6:] == -1).all()
    assert rows["user"].shape == (1, MAX_SEGMENTS)


def test_windows_of_a_long_history_are_cut_elsewhere_in_each_epoch():
    sequences = packed(numbered([40]), 10)
    firsts = {
        tuple(sorted(rows["target"][rows["position"] == 0]))
        for rows in (sequences.epoch(epoch) for epoch in range(8))
    }
    assert len(firsts) > 3


def test_the_same_seed_and_epoch_give_the_same_rows_and_another_gives_others():
    histories = numbered([7, 3, 22, 1, 9])
    first, again = packed(histories, 6).epoch(2), packed(histories, 6).epoch(2)
    for name, values in first.items():
        np.testing.assert_array_equal(values, again[name])
    other = packed(histories, 6, seed=1).epoch(2)
    assert not np.array_equal(first["target"], other["target"])


def test_weights_are_those_of_the_target_and_unknown_items_have_none():
    histories = numbered([3, 2])
    item = histories.item.copy()
    item[1] = 0
    known = Histories(
        histories.offsets, item, histories.event, histories.rating, histories.timestamp
    )
    weight = np.array([0.5, 2, 3, 4, 5], np.float32)
    rows = PackedSequences(known, weight, 8, 0).epoch(0)
    found = dict(zip(rows["target"].ravel(), rows["weight"].ravel(), strict=True))
    assert found == {0: 0.0, 1: 0.5, 3: 3.0, 4: 4.0, 5: 5.0}


def test_a_row_is_of_fixed_shapes_and_types():
    rows = packed(numbered([7, 3]), 6).epoch(0)
    for name, values in rows.items():
        assert values.dtype == (np.float32 if name == "weight" else np.int32), name
        assert values.shape[1] == (MAX_SEGMENTS if name == "user" else 6), name
