"""Batches of text pretraining: what is hidden, and which texts are paired."""

import numpy as np
import pytest
from toys import make_interactions

from tfrec.models.text_pretraining import KnownPairs, NeighbouringEvents, TextBatches

CLS, SEP, MASK, VOCABULARY = 1, 2, 3, 50


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)
    ids = rng.integers(4, VOCABULARY, (30, 16)).astype(np.int32)
    ids[:, 0] = CLS
    lengths = rng.integers(3, 17, 30)
    mask = (np.arange(16) < lengths[:, None]).astype(np.int32)
    ids[np.arange(30), lengths - 1] = SEP
    return ids * mask, mask


def batches(texts, objectives=("mlm",), pairs=None, **settings):
    special = (0, CLS, SEP, MASK)
    return TextBatches(
        texts, 10, objectives, pairs or {}, VOCABULARY, MASK, special, seed=4, **settings
    )


def test_an_epoch_shows_every_text_once_and_hides_some_of_its_tokens(texts):
    made = batches(texts, mask_rate=0.3)
    assert made.steps_per_epoch == 3
    seen, kinds, hidden = [], {"mask": 0, "same": 0, "other": 0}, 0
    for _, batch in zip(range(3), made.dataset(0).as_numpy_iterator(), strict=False):
        restored = batch["mlm_token_ids"].copy()
        for row, place in np.argwhere(batch["mlm_weight"] > 0):
            at, target = batch["mlm_place"][row, place], batch["mlm_target"][row, place]
            shown = restored[row, at]
            assert target > MASK
            hidden += 1
            kinds["mask" if shown == MASK else "same" if shown == target else "other"] += 1
            restored[row, at] = target
        seen += restored.tolist()
    assert sorted(seen) == sorted(texts[0].tolist())
    assert hidden == pytest.approx(0.3 * (texts[0] > MASK).sum(), rel=0.2)
    assert kinds["mask"] > kinds["other"] > 0


def test_the_same_seed_and_epoch_give_the_same_batches(texts):
    first, second = (next(batches(texts).dataset(2).as_numpy_iterator()) for _ in range(2))
    other = next(batches(texts).dataset(3).as_numpy_iterator())
    for name, values in first.items():
        np.testing.assert_array_equal(values, second[name])
    assert (first["mlm_token_ids"] != other["mlm_token_ids"]).any()


def test_replicas_share_the_batch_of_one(texts):
    whole = next(batches(texts).dataset(0).as_numpy_iterator())
    parts = batches(texts, replicas=2).dataset(0).as_numpy_iterator()
    two = [next(parts) for _ in range(2)]
    for name in ("mlm_token_ids", "mlm_weight"):
        np.testing.assert_array_equal(np.concatenate([p[name] for p in two]), whole[name])
    assert all(p["denominators"] == whole["denominators"] for p in two)


def test_pairs_are_neighbours_of_one_user():
    events = make_interactions([6, 1, 9], items=40)
    told = np.arange(1, 41)
    drawn = NeighbouringEvents(events, told, np.arange(41), window=2)
    first, second = drawn(200, np.random.default_rng(0))
    near = set()
    for user in range(3):
        items = events.item[events.user == user]
        for a in range(len(items)):
            near |= {(items[a], items[b]) for b in range(max(a - 2, 0), min(a + 3, len(items)))}
    assert set(zip(first, second, strict=True)) <= near
    assert (first != second).any()


def test_a_target_counts_once_among_the_negatives(texts):
    pairs = {"text_history": (KnownPairs(np.array([5, 5, 5, 7])), texts, texts)}
    batch = next(batches(texts, ("text_history",), pairs).dataset(0).as_numpy_iterator())
    assert batch["text_history_weight"].sum() == 2
