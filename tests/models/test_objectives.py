"""Objectives of pretraining: what their host arrays say, and that each can be learned."""

from dataclasses import replace

import numpy as np
import pytest
from toys import LENGTHS, make_batches, make_interactions, make_packed, small_config

from tfrec.config import PretrainConfig
from tfrec.data.history_text import history_texts
from tfrec.data.sequences import MAX_SEGMENTS
from tfrec.distribution import place
from tfrec.models.batches import SampledItems
from tfrec.models.keras_bridge import set_precision, set_seed, tf
from tfrec.models.named import named_variables
from tfrec.models.objectives import (
    Contrastive,
    CoOccurrence,
    Denoising,
    Masked,
    NextItem,
    TextHistory,
    Variational,
    damaged,
    events_of_segments,
    pooled_segments,
)
from tfrec.models.pretraining import Pretrainer
from tfrec.models.retrieval import TwoTower
from tfrec.training import Trainer

ITEMS = 12
EVERY_ITEM = np.arange(1, ITEMS + 1, dtype=np.int32)
ALL = {"masked": 1.0, "denoising": 0.5, "vae": 0.2, "next_item": 1.0, "contrastive": 0.1}


@pytest.fixture
def rows():
    return make_packed(LENGTHS).epoch(0)


@pytest.fixture
def generator():
    return np.random.default_rng(3)


def config(objectives, **settings) -> PretrainConfig:
    base = {
        "jit_compile": False,
        "batch_size": 8,
        "warmup_steps": 1,
        "ema": 0.0,
        "learning_rate": 0.01,
        "epochs": 2,
    }
    return PretrainConfig(**{**base, "objectives": objectives, **settings})


def two_tower(text_width=6, seed=1, **settings) -> TwoTower:
    set_seed(seed)
    rng = np.random.default_rng(0)
    text = rng.normal(size=(ITEMS + 1, text_width)).astype(np.float32)
    attributes = np.zeros((ITEMS + 1, 2), np.float32)
    coding = make_packed_coding()
    return TwoTower(small_config(**settings), text, attributes, coding, user_attributes_width=2)


def make_packed_coding():
    from tfrec.data.sequences import EventCoding

    return EventCoding.of(make_interactions(LENGTHS))


def trained(objectives, tmp_path, replicas=1, sampled=None, **settings):
    model = two_tower(loss="sampled" if sampled else "auto")
    pretrainer = Pretrainer(model, config(objectives, **settings))
    batches = make_batches(
        replicas=replicas, sampled=sampled, objectives=pretrainer.objectives, user_dropout=0.0
    )
    trainer = Trainer(pretrainer, pretrainer.config, place("one_device"))
    return trainer.fit(batches, work_dir=tmp_path, title="pretraining"), model


class TestMasked:
    def test_hidden_events_are_told_at_the_place_before_their_own(self, rows, generator):
        found = Masked(0.4).arrays(rows, generator)
        hidden = 0
        for row in range(len(rows["item"])):
            for place_, target, weight in zip(
                found["masked_place"][row],
                found["masked_target"][row],
                found["masked_weight"][row],
                strict=True,
            ):
                if weight:
                    hidden += 1
                    assert found["masked_hide"][row, place_ + 1] == 1
                    assert rows["item"][row, place_ + 1] == target
                    assert rows["target"][row, place_] == target
                    assert rows["weight"][row, place_] == weight
        assert hidden == int(found["masked_hide"].sum())

    def test_the_share_is_as_asked_and_start_tokens_are_never_hidden(self, rows, generator):
        found = Masked(0.4).arrays(rows, generator)
        events = rows["item"] > 0
        assert not (found["masked_hide"][~events] > 0).any()
        assert found["masked_hide"].sum() == pytest.approx(0.4 * events.sum(), rel=0.2)
        some = events[:, 1:].sum(axis=1) > MAX_SEGMENTS
        assert (found["masked_hide"].sum(axis=1)[some] >= 1).all()

    def test_nothing_of_a_hidden_event_is_read(self, rows, generator):
        """Its item, type and rating may be anything."""
        model = two_tower()
        pretrainer = Pretrainer(model, config({"masked": 1.0}))
        arrays = {**rows, **Masked(0.4).arrays(rows, generator)}
        arrays["profile"] = np.zeros((len(rows["item"]), MAX_SEGMENTS, 0), np.float32)
        arrays["attributes"] = np.zeros((len(rows["item"]), MAX_SEGMENTS, 2), np.float32)
        vectors = tf.random.stateless_normal([ITEMS + 1, 8], [1, 2])

        def hidden():
            return pretrainer.hidden(
                vectors, arrays, causal=False, training=False, hide=arrays["masked_hide"]
            ).numpy()

        before = hidden()
        away = arrays["masked_hide"] > 0
        arrays["item"] = np.where(away, 1 + (rows["item"] % ITEMS), rows["item"])
        arrays["rating"] = np.where(away, 3, rows["rating"])
        arrays["event"] = np.where(away, 3, rows["event"])
        np.testing.assert_array_equal(hidden(), before)


class TestDamaged:
    def test_events_keep_their_segment_and_what_belongs_to_them(self, rows, generator):
        copy = damaged(rows, generator, EVERY_ITEM, 0.0, 0.0, 3.0)
        np.testing.assert_array_equal(copy["segment"], rows["segment"])
        assert (copy["item"] != rows["item"]).any()
        for row in range(len(rows["item"])):
            for segment in range(1, rows["segment"][row].max() + 1):
                inside = rows["segment"][row] == segment
                before, after = (
                    [a[name][row][inside].tolist() for name in ("item", "event", "rating")]
                    for a in (rows, copy)
                )
                assert sorted(zip(*before, strict=True)) == sorted(zip(*after, strict=True))
                assert (before[0][0] == 0) == (after[0][0] == 0)  # a start token stays first

    def test_an_event_moves_no_further_than_asked(self, generator):
        rows = make_packed([8] * 4, items=200).epoch(0)
        copy = damaged(rows, generator, np.arange(1, 201, dtype=np.int32), 0.0, 0.0, 2.0)
        for before, after in zip(rows["item"], copy["item"], strict=True):
            for place_, item in enumerate(before):
                if item and (before == item).sum() == 1:
                    assert abs(int(np.flatnonzero(after == item)[0]) - place_) <= 2

    def test_shares_of_deleted_and_replaced(self, generator):
        rows = make_packed([40] * 60, items=2000, length=32).epoch(0)
        events = rows["item"] > 0
        copy = damaged(rows, generator, np.arange(1, 2001, dtype=np.int32), 0.3, 0.2, 0.0)
        gone = (copy["segment"] == 0) & (rows["segment"] > 0)
        assert gone.sum() / events.sum() == pytest.approx(0.3, abs=0.04)
        assert not gone[~events].any()
        other = (copy["item"] != rows["item"]) & events
        assert other.sum() / events.sum() == pytest.approx(0.2, abs=0.04)


def test_targets_of_segments_are_counted(rows):
    counts = events_of_segments(rows)
    assert counts.sum() == (rows["target"] > 0).sum()
    row = 0
    for segment in range(1, MAX_SEGMENTS + 1):
        inside = (rows["segment"][row] == segment) & (rows["target"][row] > 0)
        assert counts[row, segment - 1] == inside.sum()


def test_segments_are_pooled_apart(rows):
    hidden = np.random.default_rng(0).normal(size=(*rows["item"].shape, 4)).astype(np.float32)
    pooled = pooled_segments(tf.constant(hidden), tf.constant(rows["segment"])).numpy()
    for segment in (1, 2):
        inside = rows["segment"][0] == segment
        if inside.any():
            np.testing.assert_allclose(
                pooled[0, segment - 1], hidden[0][inside].mean(axis=0), rtol=1e-5
            )


def test_pairs_that_co_occur_are_near_each_other_in_one_segment(rows, generator):
    found = CoOccurrence(window=2, pairs=8).arrays(rows, generator)
    used = found["co_occurrence_weight"] > 0
    assert used.any()
    for row, pair in np.argwhere(used):
        a, b = found["co_occurrence_item"][row, pair], found["co_occurrence_target"][row, pair]
        assert any(
            abs(int(p) - int(q)) <= 2 and rows["segment"][row, p] == rows["segment"][row, q]
            for p in np.flatnonzero(rows["target"][row] == a)
            for q in np.flatnonzero(rows["target"][row] == b)
        )


def test_texts_of_a_history_belong_to_users_of_the_row(rows, generator):
    offsets = np.arange(len(LENGTHS) + 1) * 2
    offsets[-1] = offsets[-2]  # the last user has none
    texts = int(offsets[-1])
    vectors = np.arange(texts, dtype=np.float32)[:, None]
    targets = np.arange(1, texts + 1, dtype=np.int32)
    weights = np.where(targets == 2, 0.0, 0.5).astype(np.float32)
    objective = TextHistory(vectors, targets, weights, offsets, pairs=4)
    found = objective.arrays(rows, generator)
    assert set(np.unique(found["text_history_weight"])) == {0.0, 0.5}
    for row, pair in np.argwhere(found["text_history_weight"] > 0):
        text = int(found["text_history_profile"][row, pair, 0])
        assert found["text_history_target"][row, pair] == text + 1 != 2
        assert text // 2 in rows["user"][row]


@pytest.mark.parametrize("name", [*ALL])
def test_each_objective_is_learned(name, tmp_path):
    state, _ = trained({name: 1.0}, tmp_path, epochs=8)
    first, last = state.history[0], state.history[-1]
    assert last[name] < first[name] - 0.01
    assert last["loss"] == pytest.approx(last[name] + last.get("co_occurrence", 0.0), rel=1e-4)


def test_the_loss_is_the_weighted_sum_of_its_parts(tmp_path):
    state, _ = trained(ALL, tmp_path)
    last = state.history[-1]
    weights = {**ALL, "co_occurrence": ALL["contrastive"]}
    assert last["loss"] == pytest.approx(sum(w * last[n] for n, w in weights.items()), rel=1e-4)


def test_the_same_seed_gives_the_same_weights(tmp_path):
    made = [trained(ALL, tmp_path / str(run))[1] for run in range(2)]
    for a, b in zip(*(named_variables(m).values() for m in made), strict=True):
        np.testing.assert_array_equal(a.numpy(), b.numpy())


def test_pieces_of_a_batch_make_the_same_update(tmp_path):
    objectives = {"masked": 1.0, "next_item": 1.0, "denoising": 0.5}
    whole, one = trained(objectives, tmp_path / "whole")
    parts, two = trained(objectives, tmp_path / "parts", accumulate=2)
    for a, b in zip(whole.history, parts.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
        assert b["masked"] == pytest.approx(a["masked"], rel=1e-4)
    for a, b in zip(*(named_variables(m).values() for m in (one, two)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


@pytest.mark.parametrize("precision", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_learns_nearly_as_float32_does(tmp_path, precision):
    exact, _ = trained(ALL, tmp_path / "exact")
    set_precision(precision)
    try:
        half, model = trained(ALL, tmp_path / "half", precision=precision)
    finally:
        set_precision("float32")
    assert {v.dtype for v in model.trainable_variables} == {tf.float32}
    for name in ALL:
        assert half.history[-1][name] == pytest.approx(exact.history[-1][name], rel=0.1)


def test_sampled_candidates_stand_for_the_catalog(tmp_path):
    """With every item drawn as a negative, the loss is that of the whole catalog."""
    objectives = {"next_item": 1.0, "vae": 0.2, "masked": 1.0}
    full, _ = trained(objectives, tmp_path / "full", epochs=1)
    sampled = SampledItems(4, 400, ITEMS)
    some, _ = trained(objectives, tmp_path / "sampled", epochs=1, sampled=sampled)
    for name in objectives:
        assert some.history[0][name] == pytest.approx(full.history[0][name], rel=0.05)


@pytest.mark.parametrize("precision", ["float32", "mixed_bfloat16"])
def test_divergence_of_a_standard_normal_is_nothing(precision):
    layer = Variational(4, latent=3)
    layer.moments.build([None, 8])
    layer.wide.build([None, 4])
    for weight in layer.moments.weights:
        weight.assign(tf.zeros_like(weight))
    _, divergence = layer(tf.ones([2, 4]))
    np.testing.assert_allclose(divergence, [0, 0], atol=1e-6)


def test_the_divergence_counts_more_and_more():
    """From nothing, evenly, and no more after ``anneal`` updates."""
    pretrainer = Pretrainer(two_tower(), config({"vae": 1.0}, divergence=0.5), anneal=100)
    batch = next(iter(make_batches(objectives=pretrainer.objectives).dataset(0)))
    vectors = pretrainer.two_tower.candidates(batch, False)
    pretrainer._inputs = batch

    def loss(step):
        return float(pretrainer.vae.loss_of(pretrainer, vectors, batch, False, tf.constant(step)))

    most = loss(100) - loss(0)
    assert most > 0.01
    assert loss(25) - loss(0) == pytest.approx(most / 4, rel=1e-3)
    assert loss(1000) == loss(100)


def test_what_follows_a_history_as_a_text_is_learned(tmp_path):
    """Each text tells the item after it, and nothing else does."""
    count = len(LENGTHS)
    targets = (np.arange(count) % ITEMS + 1).astype(np.int32)
    told = TextHistory(
        np.eye(ITEMS + 1, dtype=np.float32)[targets],
        targets,
        np.ones(count, np.float32),
        np.arange(count + 1),
    )
    set_seed(1)
    rng = np.random.default_rng(0)
    text = rng.normal(size=(ITEMS + 1, 6)).astype(np.float32)
    attributes = np.zeros((ITEMS + 1, 2), np.float32)
    tower = TwoTower(small_config(), text, attributes, make_packed_coding(), ITEMS + 1, 2)
    learns = config({"text_history": 1.0}, epochs=60, learning_rate=0.03)
    pretrainer = Pretrainer(tower, learns, text_history=told)
    batches = make_batches(objectives=pretrainer.objectives, profile_width=ITEMS + 1)
    state = Trainer(pretrainer, learns, place("one_device")).fit(
        batches, work_dir=tmp_path, title="pretraining"
    )
    losses = [record["text_history"] for record in state.history]
    assert losses[0] == pytest.approx(np.log(ITEMS), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]


def test_contrast_is_lost_without_a_second_event(generator):
    rows = make_packed([1, 1, 1]).epoch(0)
    assert Contrastive(EVERY_ITEM).arrays(rows, generator)["contrastive_weight"].sum() == 0


def test_next_item_is_the_loss_of_the_two_tower(tmp_path):
    """Pretraining by next_item alone is what adaptation does."""
    model = two_tower()
    pretrainer = Pretrainer(model, config({"next_item": 1.0}))
    batch = next(iter(make_batches(objectives={"next_item": NextItem()}).dataset(0)))
    own = next(iter(make_batches().dataset(0)))
    assert float(pretrainer.compute_loss(batch)) == pytest.approx(
        float(model.compute_loss(own)), rel=1e-5
    )


def test_denoising_reads_the_damaged_copy_and_tells_the_whole(rows, generator):
    found = Denoising(EVERY_ITEM, delete=0.5).arrays(rows, generator)
    assert (found["denoising_segment"] == 0).sum() > (rows["segment"] == 0).sum()
    per_segment = found["denoising_weight"].sum()
    assert 0 < per_segment < rows["weight"].sum()


def test_histories_as_texts():
    events = make_interactions([4, 0, 2], items=3, names=("view", "purchase"))
    titles = ["", "Heat", "Fargo", "Clue"]
    texts = history_texts(events, titles, np.array([0, 1, 2, 0]), np.array([4, 0, 1, 0]))
    assert texts[1] == texts[3] == ""
    newest = titles[events.item[3]]
    assert newest in texts[0].partition(".")[0]


def test_histories_as_texts_say_what_was_thought_of_it():
    events = make_interactions([5], items=3, names=("view", "purchase"))
    events = replace(
        events,
        item=np.array([1, 2, 3, 1, 2], np.int32),
        event=np.array([1, 0, 0, 0, 0], np.int8),
        rating=np.array([np.nan, 1, 5, 3, 5], np.float32),
    )
    titles = ["", "Heat", "Fargo", "Clue"]

    def told(stop, most):
        return history_texts(events, titles, np.array([0]), np.array([stop]), most)

    assert told(5, 20) == ["liked: Fargo; Clue. viewed: Heat. disliked: Fargo. bought: Heat"]
    assert told(5, 2) == ["liked: Fargo. viewed: Heat"]
    assert told(2, 20) == ["disliked: Fargo. bought: Heat"]
