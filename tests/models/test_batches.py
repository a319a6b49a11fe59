"""Batches of training rows: complete, of fixed shape, and the same in parts as in one."""

import numpy as np
import pytest
from toys import make_batches

from tfrec.errors import ConfigError, InputError
from tfrec.models.batches import SampledItems
from tfrec.models.objectives import Masked

ITEMS = 12


def first(batches, count, **which):
    return [
        {name: value.numpy() for name, value in part.items()}
        for part in batches.dataset(**which).take(count)
    ]


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)


def sampled(**settings):
    return SampledItems(**{"positions": 3, "negatives": 6, "num_items": ITEMS, **settings})


# --- epochs ---


def test_an_epoch_is_its_rows_in_batches_and_the_next_epoch_follows():
    batches = make_batches()
    steps = batches.steps_per_epoch
    assert steps == len(batches.sequences.epoch(0)["item"]) // 8 > 2
    parts = first(batches, steps + 1)
    rows = batches.sequences.epoch(0)
    for step, part in enumerate(parts[:-1]):
        expected = rows["item"][step * 8 : (step + 1) * 8]
        np.testing.assert_array_equal(part["item"], expected)
    np.testing.assert_array_equal(parts[-1]["item"], batches.sequences.epoch(1)["item"][:8])


def test_a_dataset_that_starts_later_gives_what_the_whole_one_gives_then():
    batches = make_batches(sampled=sampled())
    steps = batches.steps_per_epoch
    whole = first(batches, 3 * steps)
    for one, other in zip(whole[2 * steps :], first(batches, steps, first_epoch=2), strict=True):
        assert_same(one, other)


def test_every_batch_has_the_shapes_and_types_that_the_dataset_declares():
    batches = make_batches(sampled=sampled())
    spec = batches.dataset().element_spec
    for part in first(batches, 2 * batches.steps_per_epoch):
        assert {n: (v.shape, v.dtype) for n, v in part.items()} == {
            n: (tuple(s.shape), s.dtype.as_numpy_dtype) for n, s in spec.items()
        }


def test_where_rows_are_fewer_than_a_batch_the_repeated_ones_weigh_nothing():
    batches = make_batches(batch_size=64)
    rows = batches.sequences.epoch(0)
    count = len(rows["item"])
    assert count < 64
    assert batches.steps_per_epoch == 1
    (part,) = first(batches, 1)
    np.testing.assert_array_equal(part["weight"][:count], rows["weight"])
    assert not part["weight"][count:].any()
    assert part["denominator"] == np.float32(rows["weight"].sum())


def test_weights_are_divided_by_their_sum_over_the_whole_batch():
    for part in first(make_batches(), 3):
        assert part["denominator"].tolist() == [part["weight"].sum()]


def test_a_batch_that_replicas_cannot_share_is_refused():
    with pytest.raises(ConfigError, match=r"batch_size = 8 cannot be shared by 3 replicas"):
        make_batches(replicas=3)


def test_no_event_at_all_is_refused():
    with pytest.raises(InputError, match="no event to train on"):
        make_batches(lengths=[0, 0])


# --- users ---


def test_every_segment_gets_the_attributes_of_its_own_user():
    batches = make_batches(user_dropout=0.0)
    rows = batches.sequences.epoch(0)["user"][:8]
    (part,) = first(batches, 1)
    expected = np.where(rows[:, :, None] >= 0, batches.attributes[rows], 0)
    np.testing.assert_array_equal(part["attributes"], expected)
    assert part["profile"].shape == (*rows.shape, 0)
    assert "user" not in part


def test_a_share_of_the_users_is_left_out():
    batches = make_batches(user_dropout=0.4)
    parts = first(batches, 10 * batches.steps_per_epoch)
    rows = [batches.sequences.epoch(epoch)["user"] for epoch in range(10)]
    known = np.concatenate([r[: 8 * batches.steps_per_epoch] for r in rows]) >= 0
    given = np.concatenate([part["attributes"] for part in parts]).any(axis=-1)
    assert not given[~known].any()
    assert abs(given[known].mean() - 0.6) < 0.05


# --- parts for replicas and workers ---


@pytest.mark.parametrize("loss", ["full", "sampled"])
def test_parts_are_the_batch_of_one_device_cut_along_its_rows(loss):
    kind = sampled() if loss == "sampled" else None
    whole = first(make_batches(sampled=kind), 5)
    parts = first(make_batches(sampled=kind, replicas=2), 10)
    for step, one in enumerate(whole):
        pair = parts[2 * step : 2 * step + 2]
        for name in ("segment", "weight", "attributes", "position", "next_gap"):
            joined = np.concatenate([part[name] for part in pair])
            np.testing.assert_array_equal(joined, one[name], err_msg=name)
        for name in ("item", "target"):
            joined = np.concatenate([rows_of(part, name) for part in pair])
            np.testing.assert_array_equal(joined, rows_of(one, name), err_msg=name)
        assert pair[0]["denominator"] == pair[1]["denominator"] == one["denominator"]
        if loss == "sampled":
            joined = np.concatenate([rows_of(part, "negatives") for part in pair])
            np.testing.assert_array_equal(joined, rows_of(one, "negatives"))


def rows_of(part, name):
    """Catalog rows, whether the part names them directly or as places in ``items``."""
    return part["items"][part[name]] if "items" in part else part[name]


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize(
    "settings",
    [{}, {"sampled": sampled(negatives=8)},
     {"sampled": sampled(negatives=8), "objectives": {"masked": Masked()}}],
    ids=["full", "sampled", "objectives"],
)  # fmt: skip
def test_workers_share_the_parts(workers, settings):
    batches = make_batches(replicas=4, **settings)
    everything = first(batches, 12)
    share = 4 // workers
    for worker in range(workers):
        mine = first(batches, 3 * share, worker=worker, workers=workers)
        for step in range(3):
            for place in range(share):
                expected = everything[step * 4 + worker * share + place]
                assert_same(mine[step * share + place], expected)


# --- the sampled loss ---


def test_sampled_places_are_distinct_targets_of_their_row():
    batches = make_batches(sampled=sampled())
    rows = batches.sequences.epoch(0)
    for step, part in enumerate(first(batches, batches.steps_per_epoch)):
        mine = {n: v[step * 8 : step * 8 + 8] for n, v in rows.items()}
        assert part["place"].shape == (8, 3)
        assert (np.diff(part["place"], axis=1) > 0).all()
        trained = part["weight"] > 0
        possible = (mine["weight"] > 0).sum(axis=1)
        np.testing.assert_array_equal(trained.sum(axis=1), np.minimum(possible, 3))
        for name in ("weight", "target"):
            at = np.take_along_axis(mine[name], part["place"], axis=1)
            found = part["target_id"] if name == "target" else part[name]
            np.testing.assert_array_equal(found[trained], at[trained])
        assert part["denominator"] == part["weight"].sum()


def test_a_place_without_a_target_lends_a_random_item_as_a_negative():
    batches = make_batches(sampled=sampled(positions=8))
    parts = first(batches, 20 * batches.steps_per_epoch)
    lent = np.concatenate([part["target_id"][part["weight"] == 0] for part in parts])
    assert set(lent) == set(range(1, ITEMS + 1))


def test_other_places_are_sampled_in_another_epoch():
    batches = make_batches(sampled=sampled(positions=2), lengths=[8] * 8)
    one, two = first(batches, 2)
    assert not np.array_equal(one["place"], two["place"])


def test_items_are_the_distinct_ones_of_the_part_and_each_is_encoded_once():
    for part in first(make_batches(sampled=sampled()), 4):
        items = part["items"]
        used = np.trim_zeros(items, "b")
        assert items[0] == 0
        assert len(set(used)) == len(used)
        assert set(used) == set(rows_of(part, "item").ravel()) | set(
            part["target_id"].ravel()
        ) | set(rows_of(part, "negatives"))
        np.testing.assert_array_equal(rows_of(part, "target"), part["target_id"])


def test_uniform_negatives_cover_the_catalog_and_not_the_unknown_item():
    parts = first(make_batches(sampled=sampled()), 60)
    drawn = np.concatenate([rows_of(part, "negatives") for part in parts])
    counts = np.bincount(drawn, minlength=ITEMS + 1)
    assert counts[0] == 0
    assert counts[1:].min() > 0.5 * len(drawn) / ITEMS


def test_without_uniform_negatives_there_are_none():
    (part,) = first(make_batches(sampled=sampled(negatives=0)), 1)
    assert part["negatives"].shape == (0,)


def test_tokens_are_those_of_the_items():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 99, (ITEMS + 1, 4)).astype(np.int32)
    mask = (rng.random(tokens.shape) < 0.7).astype(np.int32)
    for part in first(make_batches(sampled=sampled(tokens=tokens, token_mask=mask)), 2):
        np.testing.assert_array_equal(part["token_ids"], tokens[part["items"]])
        np.testing.assert_array_equal(part["padding_mask"], mask[part["items"]])


def test_negatives_are_drawn_among_the_known_items_alone():
    known = np.array([2, 5, 11], np.int32)
    batches = make_batches(sampled=sampled(known=known, negatives=40))
    for part in first(batches, 3):
        drawn = part["items"][part["negatives"]]
        assert set(drawn.tolist()) == set(known.tolist())
        unused = part["target_id"][part["weight"] == 0]
        assert set(unused.tolist()) <= set(known.tolist())
