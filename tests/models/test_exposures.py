from dataclasses import replace

import numpy as np
import pytest

from tfrec.config import RankingConfig
from tfrec.data.interactions import Interactions
from tfrec.data.sequences import EventCoding, Histories
from tfrec.errors import ConfigError, InputError
from tfrec.index import Ragged
from tfrec.models.exposures import (
    NothingToLearnError,
    RankingBatches,
    Unseen,
    ranking_batches,
)

USERS, ITEMS, WIDTH = 9, 20, 4
CONFIG = RankingConfig(batch_size=8, negatives=6, history=3, examples_per_user=3)


def events(seed: int = 0, names: tuple[str, ...] = ("view", "purchase")) -> Interactions:
    """Users 0..7 have 1 to 15 events, user 8 has none; some ratings are missing."""
    generator = np.random.default_rng(seed)
    counts = np.array([1, 2, 3, 4, 5, 8, 12, 15, 0])
    n = int(counts.sum())
    rating = generator.integers(1, 6, n).astype(np.float32)
    rating[generator.random(n) < 0.3] = np.nan
    return Interactions(
        user=np.repeat(np.arange(USERS), counts).astype(np.int32),
        item=generator.integers(1, ITEMS + 1, n).astype(np.int32),
        timestamp=np.arange(n, dtype=np.int64),
        event=generator.integers(0, len(names), n).astype(np.int8),
        rating=rating,
        weight=np.ones(n, np.float32),
        split=np.zeros(n, np.int8),
        num_users=USERS,
        event_names=names,
    )


def newest(users: np.ndarray, histories: Histories, times: np.ndarray) -> np.ndarray:
    """A query vector that tells its user, his number of events and the newest of them."""
    counts = np.diff(histories.offsets)
    last = histories.item[histories.offsets[1:] - 1]
    return np.stack([users, counts, last, counts * 0], axis=1).astype(np.float32)


def row_and_user(users, queries, histories, rows) -> np.ndarray:
    who = np.broadcast_to(users[:, None], rows.shape)
    return np.stack([rows, who], axis=-1).astype(np.float32)


def batches(interactions: Interactions | None = None, **changes) -> RankingBatches:
    interactions = events() if interactions is None else interactions
    config = CONFIG.model_copy(update=changes.pop("config", {}))
    vectors = np.arange((ITEMS + 1) * WIDTH, dtype=np.float32).reshape(ITEMS + 1, WIDTH)
    arguments = {
        "histories": Histories.of(interactions, EventCoding.of(interactions)),
        "interactions": interactions,
        "vectors": vectors,
        "query_vectors_of": newest,
        "hard": None,
        "attributes": np.arange(ITEMS + 1, dtype=np.float32)[:, None],
        "user_attributes": np.arange(USERS, dtype=np.float32)[:, None],
        "text": np.arange(ITEMS + 1, dtype=np.float32)[:, None] * 2,
        "profile": np.arange(USERS, dtype=np.float32)[:, None] * 3,
        "scalars_of": row_and_user,
        "seed": 1,
        "tasks": ("click", "like", "rating", "conversion"),
    }
    return ranking_batches(config, **(arguments | changes))


def drawn(made: RankingBatches, count: int, **where) -> list[dict[str, np.ndarray]]:
    return list(made.dataset(**where).take(count).as_numpy_iterator())


def seen_by(interactions: Interactions) -> list[set[int]]:
    return [set(interactions.histories([u])[0].tolist()) for u in range(USERS)]


def test_no_exposure_but_the_first_is_an_item_the_user_has_interacted_with():
    interactions = events()
    seen = seen_by(interactions)
    made = batches(interactions, hard=Ragged.of([range(1, ITEMS + 1)] * USERS))
    for epoch in range(10):
        for step in range(made.steps_per_epoch):
            index, rows = made.exposures(epoch, step)
            for user, clicked, others in zip(
                made.examples.user[index], rows[:, 0], rows[:, 1:], strict=True
            ):
                assert clicked in seen[user]
                assert not seen[user] & set(others.tolist())
                assert others.min() >= 1
                assert others.max() <= ITEMS


def test_half_of_the_others_are_hard_where_the_user_has_such():
    made = batches(hard=Ragged.of([[0, 19, 20]] + [[19, 20]] * (USERS - 2) + [[]]))
    lengths = made.unseen._hard.lengths
    index, rows = made.exposures(0, 0)
    for user, others in zip(made.examples.user[index], rows[:, 1:], strict=True):
        if lengths[user]:
            assert set(others[:3].tolist()) <= {19, 20}
        assert len(others) == 6


def test_uniform_exposures_are_uniform_over_the_unseen():
    one = replace(events(), item=np.full(len(events()), 7, np.int32))
    rows = Unseen(one, ITEMS, None).draw(np.zeros(4000, np.int32), 5, np.random.default_rng(0))
    counts = np.bincount(rows.ravel(), minlength=ITEMS + 1)
    assert counts[[0, 7]].tolist() == [0, 0]
    expected = 20_000 / 19
    others = np.delete(counts, [0, 7])
    assert ((others - expected) ** 2 / expected).sum() < 43  # chi square, 18 degrees, p = 0.001


def test_a_user_with_one_unseen_item_is_shown_that_one():
    n = ITEMS - 1
    nearly = Interactions(
        user=np.zeros(n, np.int32),
        item=np.arange(1, ITEMS, dtype=np.int32),
        timestamp=np.zeros(n, np.int64),
        event=np.zeros(n, np.int8),
        rating=np.zeros(n, np.float32),
        weight=np.ones(n, np.float32),
        split=np.zeros(n, np.int8),
        num_users=1,
    )
    unseen = Unseen(nearly, ITEMS, None)
    assert unseen.counts.tolist() == [1]
    rows = unseen.draw(np.zeros(3, np.int32), 4, np.random.default_rng(0))
    assert (rows == ITEMS).all()


def test_users_who_have_seen_everything_give_no_example():
    interactions = replace(events(), item=(np.arange(len(events())) % 2 + 1).astype(np.int32))
    everything = interactions.histories([2])[0]
    assert set(everything.tolist()) == {1, 2}
    with pytest.raises(InputError, match="no event to learn from"):
        batches(
            interactions.select(interactions.user == 2),
            vectors=np.zeros((3, WIDTH), np.float32),
            attributes=np.zeros((3, 0), np.float32),
            text=np.zeros((3, 0), np.float32),
        )


@pytest.mark.parametrize("tasks", [("rating",), ("like", "rating")])
def test_without_clicks_rated_events_are_all_there_is(tasks):
    interactions = events()
    made = batches(interactions, tasks=tasks)
    assert np.isfinite(interactions.rating[made.examples.event]).all()
    (batch,) = drawn(made, 1)
    assert batch["candidates"].shape == (8, 1, WIDTH)
    assert {name for name in batch if name.startswith("label")} == {f"label_{t}" for t in tasks}
    assert (batch["mask_rating"] == 1).all()
    none = replace(interactions, rating=np.full(len(interactions), np.nan, np.float32))
    with pytest.raises(NothingToLearnError, match="the later rated"):
        batches(none, tasks=tasks)


def test_texts_stand_beside_their_items_and_users():
    made = batches()
    index, rows = made.exposures(0, 0)
    (batch,) = drawn(made, 1)
    np.testing.assert_array_equal(batch["text"][:, :, 0], 2.0 * rows)
    np.testing.assert_array_equal(batch["profile"][:, 0], 3.0 * made.examples.user[index])


def test_examples_are_events_with_a_past_and_only_so_many_of_a_user():
    interactions = events()
    examples = batches(interactions).examples
    assert np.bincount(examples.user, minlength=USERS).tolist() == [0, 1, 2, 3, 3, 3, 3, 3, 0]
    assert (examples.before >= 1).all()
    assert len(set(examples.event.tolist())) == len(examples)
    np.testing.assert_array_equal(interactions.user[examples.event], examples.user)
    past = interactions.offsets[examples.user] + examples.before
    np.testing.assert_array_equal(past, examples.event)


def test_events_without_weight_or_item_are_not_learned_from():
    interactions = events()
    item, weight = interactions.item.copy(), interactions.weight.copy()
    item[::3], weight[1::3] = 0, 0
    examples = batches(replace(interactions, item=item, weight=weight)).examples
    assert (examples.event % 3 == 2).all()


def test_an_example_knows_only_what_came_before_its_event():
    interactions = events()
    made = batches(interactions)
    [batch] = drawn(made, 1)
    index, _ = made.exposures(0, 0)
    for place, event in enumerate(made.examples.event[index]):
        user = interactions.user[event]
        past = interactions.item[interactions.offsets[user] : event]
        assert batch["query"][place].tolist() == [user, len(past), past[-1], 0]
        kept = past[-CONFIG.history :]
        assert batch["history_mask"][place].tolist() == [0] * (3 - len(kept)) + [1] * len(kept)
        expected = np.zeros((3, WIDTH), np.float32)
        expected[3 - len(kept) :] = made.vectors[kept]
        np.testing.assert_array_equal(batch["history"][place], expected)


def test_every_array_of_a_batch_is_about_the_same_users_and_items():
    made = batches()
    [batch] = drawn(made, 1)
    index, rows = made.exposures(0, 0)
    users = made.examples.user[index]
    np.testing.assert_array_equal(batch["candidates"], made.vectors[rows])
    np.testing.assert_array_equal(batch["attributes"][:, :, 0], rows)
    np.testing.assert_array_equal(batch["user_attributes"][:, 0], users)
    np.testing.assert_array_equal(batch["scalars"][:, :, 0], rows)
    np.testing.assert_array_equal(batch["scalars"][:, 3, 1], users)
    assert {name: a.dtype for name, a in batch.items()} == dict.fromkeys(batch, np.float32)


def test_labels_are_those_of_the_event_and_none_of_the_others():
    interactions = events()
    made = batches(interactions)
    [batch] = drawn(made, 1)
    event = made.examples.event[made.exposures(0, 0)[0]]
    rating = interactions.rating[event]
    expected = {
        "label_click": np.ones(8),
        "mask_like": np.isfinite(rating),
        "mask_rating": np.isfinite(rating),
        "label_like": np.where(rating >= 4, 1, 0),
        "label_rating": np.nan_to_num(rating),
        "label_conversion": interactions.event[event] == 1,
    }
    for name, values in expected.items():
        np.testing.assert_array_equal(batch[name][:, 0], values.astype(np.float32), err_msg=name)
        assert not batch[name][:, 1:].any()


def test_only_the_labels_of_the_tasks_are_there():
    [batch] = drawn(batches(tasks=("click",)), 1)
    assert [name for name in batch if name.startswith(("label", "mask"))] == ["label_click"]


def test_the_same_seed_gives_the_same_batches_and_another_seed_others():
    one, same, other = batches(), batches(), batches(seed=2)
    for first, second in zip(drawn(one, 5), drawn(same, 5), strict=True):
        assert first.keys() == second.keys()
        for name, values in first.items():
            np.testing.assert_array_equal(values, second[name], err_msg=name)
    first, second = drawn(one, 1)[0], drawn(other, 1)[0]
    assert (first["candidates"] != second["candidates"]).any()


def test_a_resumed_training_gets_the_batches_it_would_have_got():
    made = batches()
    steps = made.steps_per_epoch
    assert steps == 2
    through, resumed = drawn(made, 3 * steps), drawn(made, steps, first_epoch=2)
    for first, second in zip(through[2 * steps :], resumed, strict=True):
        np.testing.assert_array_equal(first["scalars"], second["scalars"])


def test_the_parts_of_replicas_make_up_the_whole_batch():
    [whole] = drawn(batches(), 1)
    parts = drawn(batches(replicas=4), 4)
    first, second = (drawn(batches(replicas=4), 2, worker=w, workers=2) for w in (0, 1))
    for made in (parts, first + second):
        for name, values in whole.items():
            if name == "denominator":
                assert all(part[name] == values for part in made)
            else:
                joined = np.concatenate([part[name] for part in made])
                np.testing.assert_array_equal(joined, values, err_msg=name)


def test_too_few_examples_fill_a_batch_without_counting_twice():
    made = batches(config={"batch_size": 50})
    assert made.steps_per_epoch == 1
    [batch] = drawn(made, 1)
    assert batch["weight"].sum() == len(made.examples) == batch["denominator"][0]
    assert len(batch["query"]) == 50


def test_sampled_scalars_are_those_of_the_batches():
    made = batches()
    assert made.num_scalars == 2
    expected = np.concatenate([batch["scalars"].reshape(-1, 2) for batch in drawn(made, 2)])
    np.testing.assert_array_equal(made.sample_scalars(), expected)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"replicas": 3}, ConfigError, "take a multiple of 3"),
        ({"vectors": np.zeros((3, WIDTH), np.float32)}, InputError, "rows 0 to 2"),
        (
            {"attributes": np.zeros((3, 1), np.float32)},
            InputError,
            "'attributes' has 3 rows, and 21",
        ),
        ({"user_attributes": np.zeros((3, 1), np.float32)}, InputError, "'user_attributes' has 3"),
        ({"hard": Ragged.of([[1]])}, InputError, "'hard' has 1 rows, and 9 are needed"),
    ],
)
def test_what_does_not_fit_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        batches(**changes)


def test_histories_of_other_events_are_refused():
    fewer = events().select(np.arange(len(events())) > 3)
    with pytest.raises(InputError, match="got 46 and 50 events"):
        batches(histories=Histories.of(fewer, EventCoding.of(fewer)))
