"""The two-tower: its losses beside hand computation, training and serving agree, checkerboard."""

from dataclasses import replace

import numpy as np
import pytest
from tiny_bert import write_tiny_bert
from toys import LENGTHS, make_batches, make_histories, make_two_tower, small_config

from tfrec.config import RetrievalConfig
from tfrec.data.sequences import EventCoding, Histories, PackedSequences, query_arrays
from tfrec.distribution import place
from tfrec.errors import ConfigError
from tfrec.models.batches import SampledItems, TrainingBatches
from tfrec.models.keras_bridge import set_precision, set_seed, tf
from tfrec.models.retrieval import TwoTower, uses_full_softmax
from tfrec.models.text import TextEncoder
from tfrec.training import fit

ITEMS = 12
TOLERANCE = 1e-4


def sampled(**settings):
    return SampledItems(**{"positions": 3, "negatives": 6, "num_items": ITEMS, **settings})


def batch_of(batches):
    return next(iter(batches.dataset()))


def encoded(model, batch):
    """Candidate vectors and the query vectors of every place of a batch."""
    vectors = model.candidates(batch, training=False)
    hidden = model.query_tower(
        tf.gather(vectors, batch["item"]), batch, batch["profile"], batch["attributes"]
    )
    return vectors.numpy().astype(np.float64), hidden.numpy().astype(np.float64)


def test_an_item_without_text_is_the_same_in_training_and_in_serving(tmp_path):
    write_tiny_bert(tmp_path)
    encoder = TextEncoder.load(tmp_path, length=8)
    ids, mask = encoder.tokenize(["", "a war film", "", "a love story"])
    text = encoder.encode(["", "a war film", "", "a love story"])
    text[[0, 2]] = 0
    model = TwoTower(
        small_config(loss="sampled"), text, np.zeros((4, 0), np.float32), encoder=encoder
    )
    rows = np.array([2, 3, 0], np.int32)
    batch = {"items": rows, "token_ids": ids[rows], "padding_mask": mask[rows]}
    trained = model.candidates({n: tf.constant(v) for n, v in batch.items()}, training=False)
    served = model.encode_candidate(text[rows], np.zeros((3, 0), np.float32), rows)
    np.testing.assert_allclose(trained.numpy(), served, atol=1e-5)


# --- losses ---


@pytest.mark.parametrize("temperature", [1.0, 0.25])
def test_the_full_loss_is_the_weighted_mean_cross_entropy_over_the_catalog(temperature):
    model = make_two_tower(small_config(temperature=temperature))
    batch = batch_of(make_batches())
    vectors, hidden = encoded(model, batch)
    logits = hidden.reshape(-1, 8) @ vectors.T / temperature
    target, weight = (batch[name].numpy().ravel() for name in ("target", "weight"))
    log_normaliser = np.log(np.exp(logits[:, 1:]).sum(axis=1))  # row 0 is no item
    each = log_normaliser - logits[np.arange(len(target)), target]
    expected = (weight * each).sum() / weight.sum()
    assert float(model.compute_loss(batch)) == pytest.approx(expected, rel=TOLERANCE)


def by_hand(model, batch, popularity, temperature, hard):
    """The sampled loss of one replica, in loops."""
    vectors, hidden = encoded(model, batch)
    part = {name: value.numpy() for name, value in batch.items()}
    queries = np.take_along_axis(hidden, part["place"][:, :, None], axis=1).reshape(-1, 8)
    weights = part["weight"].ravel()
    places = np.concatenate([part["target"].ravel(), part["negatives"]])
    ids = part["items"][places]
    chance = np.full(len(ids), 1 / ITEMS)
    chance[: len(weights)][weights > 0] = popularity[ids[: len(weights)]][weights > 0]
    total = 0.0
    for query in np.flatnonzero(weights):
        logits = vectors[places] @ queries[query] / temperature - np.log(chance)
        others = np.flatnonzero((ids != ids[query]) & (np.arange(len(ids)) != query))
        if hard:
            others = others[np.argsort(-logits[others])[:hard]]
        rest = np.exp(logits[others] - logits[query]).sum()
        total += weights[query] * np.log1p(rest)
    return total / weights.sum()


@pytest.mark.parametrize(("temperature", "hard", "negatives"), [(1, 0, 6), (0.5, 4, 6), (1, 0, 0)])
def test_the_sampled_loss_corrects_for_popularity_and_leaves_out_accidental_hits(
    temperature, hard, negatives
):
    popularity = np.random.default_rng(0).dirichlet(np.ones(ITEMS + 1)).astype(np.float32)
    config = small_config(temperature=temperature, hard_negatives=hard, loss="sampled")
    model = make_two_tower(config, popularity=popularity)
    batches = make_batches(sampled=sampled(positions=8, negatives=negatives), lengths=[9, 3, 2, 6])
    batch = batch_of(batches)
    assert (batch["weight"].numpy() == 0).any()
    expected = by_hand(model, batch, popularity, temperature, hard)
    assert float(model.compute_loss(batch)) == pytest.approx(expected, rel=TOLERANCE)


@pytest.mark.parametrize(
    ("loss", "items", "trained", "full"),
    [
        ("auto", 50_000, False, True),
        ("auto", 50_001, False, False),
        ("auto", 10, True, False),
        ("sampled", 10, False, False),
        ("full_softmax", 10**6, False, True),
    ],
)
def test_which_loss_is_taken(loss, items, trained, full):
    assert uses_full_softmax(RetrievalConfig(loss=loss), items, trained) is full


def test_the_exact_softmax_is_refused_where_texts_are_read_anew():
    with pytest.raises(ConfigError, match=r"set adapt\.retrieval\.loss=sampled"):
        uses_full_softmax(RetrievalConfig(loss="full_softmax"), 10, True)


# --- vectors ---


def test_candidates_of_unknown_rows_have_no_id():
    model = make_two_tower()
    text, attributes = model._text.numpy(), model._attributes.numpy()
    found = model.encode_candidate(text[[3, 3, 3]], attributes[[3, 3, 3]], np.array([3, 0, 99]))
    np.testing.assert_array_equal(found[1], found[2])
    np.testing.assert_allclose(found[0] - found[1], model.candidate_tower.ids[3], atol=1e-6)
    assert found.dtype == np.float32


@pytest.mark.parametrize("loss", ["full_softmax", "sampled"])
def test_an_item_without_training_events_is_not_pushed_away(loss):
    cold = ITEMS + 1
    model = make_two_tower(small_config(loss=loss), items=cold)
    rows = np.arange(cold + 1)
    model.learn_from((rows > 0) & (rows < cold))
    some = sampled(num_items=cold, known=rows[1:cold].astype(np.int32))
    batch = batch_of(make_batches(sampled=some if loss == "sampled" else None))
    with tf.GradientTape() as tape:
        value = model.compute_loss(batch, training=True)
    ids = tf.convert_to_tensor(tape.gradient(value, model.candidate_tower.ids)).numpy()
    assert not ids[cold].any()
    assert np.abs(ids[1:cold]).max() > 0


def test_no_candidate_gives_no_vector():
    model = make_two_tower()
    nothing = model.encode_candidate(np.zeros((0, 5)), np.zeros((0, 2)), np.zeros(0, np.int32))
    assert nothing.shape == (0, 8)


def asked(model, histories, **more):
    vectors = model.encode_candidate(
        model._text.numpy(), model._attributes.numpy(), np.arange(ITEMS + 1, dtype=np.int32)
    )
    rng = np.random.default_rng(4)
    users = rng.normal(size=(len(histories), 2)).astype(np.float32)
    profile = np.zeros((len(histories), 0), np.float32)
    return model.encode_query(histories, vectors, profile, users, **more)


def test_a_query_of_a_batch_is_the_query_alone():
    model, histories = make_two_tower(), make_histories([3, 0, 20, 8, 7, 1])
    together = asked(model, histories)
    assert together.shape == (6, 8)
    for size in (1, 4):
        np.testing.assert_allclose(asked(model, histories, batch_size=size), together, atol=1e-5)


def test_no_query_gives_no_vector():
    model = make_two_tower()
    assert asked(model, make_histories([1]).take([])).shape == (0, 8)


def test_the_temperature_divides_the_query():
    histories = make_histories([3, 5])
    warm = asked(make_two_tower(small_config(temperature=1.0)), histories)
    cold = asked(make_two_tower(small_config(temperature=0.5)), histories)
    np.testing.assert_allclose(cold, 2 * warm, rtol=1e-5)


def test_the_time_of_the_request_matters_to_a_model_that_reads_it():
    histories = make_histories([4])
    now = histories.timestamp[-1:] + 3600
    for reads in (True, False):
        model = make_two_tower(small_config(request_time=reads))
        if reads:
            table = model.query_tower.tables["next_gap"]
            table.assign(np.random.default_rng(0).normal(size=table.shape))
        soon = asked(model, histories, request_time=now)
        late = asked(model, histories, request_time=now + 10**7)
        assert np.allclose(soon, late, atol=1e-6) == (not reads)


def test_serving_computes_what_training_computed_at_that_place():
    """Every place of a packed row: same vector as a request with the events before it."""
    model = make_two_tower(small_config(layers=2))
    rng = np.random.default_rng(0)
    for weight in model.trainable_variables:
        weight.assign_add(rng.normal(size=weight.shape, scale=0.1))
    batches = make_batches(user_dropout=0.0)
    histories = batches.sequences.histories
    rows = batches.sequences.epoch(0)
    batch = batch_of(batches)
    _, hidden = encoded(model, batch)
    vectors = model.encode_candidate(
        model._text.numpy(), model._attributes.numpy(), np.arange(ITEMS + 1, dtype=np.int32)
    )
    users, ends, places = [], [], []
    for row in range(8):
        segments = rows["segment"][row]
        for segment in range(1, segments.max() + 1):
            at = np.flatnonzero(segments == segment)
            user = rows["user"][row, segment - 1]
            if rows["item"][row, at[0]] != 0 and len(at) < 8:
                continue  # the rest of a long history, of which a request would see more
            start = int(histories.offsets[user])
            own = histories.item[start : int(histories.offsets[user + 1])]
            if rows["item"][row, at[0]] == 0:
                ends += range(len(at))
                places += [(row, place) for place in at]
                users += [user] * len(at)
            else:
                inputs = rows["item"][row, at]
                end = next(
                    e for e in range(8, len(own) + 1) if np.array_equal(own[e - 8 : e], inputs)
                )
                ends.append(end)
                places.append((row, at[-1]))
                users.append(user)
    assert len(places) > 30
    first = histories.offsets[users]
    counts = np.array(ends)
    index = np.concatenate(
        [np.arange(f, f + c) for f, c in zip(first, counts, strict=True)] or [[]]
    ).astype(int)
    prefix = Histories(
        np.concatenate([[0], np.cumsum(counts)]),
        *(getattr(histories, name)[index] for name in ("item", "event", "rating", "timestamp")),
    )
    found = model.encode_query(
        prefix, vectors, np.zeros((len(users), 0), np.float32), batches.attributes[users]
    )
    expected = np.stack([hidden[row, place] for row, place in places])
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_an_item_added_after_training_works_in_a_history_and_as_a_candidate():
    model, histories = make_two_tower(), make_histories([5, 3])
    item = histories.item.copy()
    item[4] = ITEMS + 1  # row 13, the first user's newest event
    rng = np.random.default_rng(0)
    text = np.vstack([model._text.numpy(), rng.normal(size=(1, 5)).astype(np.float32)])
    attributes = np.vstack([model._attributes.numpy(), np.ones((1, 2), np.float32)])
    rows = np.arange(ITEMS + 2, dtype=np.int32)
    vectors = model.encode_candidate(text, attributes, rows)
    assert np.abs(vectors[ITEMS + 1]).max() > 0
    users, profile = np.zeros((2, 2), np.float32), np.zeros((2, 0), np.float32)
    with_new = model.encode_query(replace(histories, item=item), vectors, profile, users)
    with_old = model.encode_query(histories, vectors, profile, users)
    assert np.isfinite(with_new).all()
    assert np.abs(with_new[0] - with_old[0]).max() > 1e-4
    np.testing.assert_allclose(with_new[1], with_old[1], atol=1e-6)


def test_half_precision_vectors_are_float32_and_near():
    histories = make_histories([3, 9])
    exact = asked(make_two_tower(), histories)
    set_precision("mixed_bfloat16")
    try:
        found = asked(make_two_tower(), histories)
    finally:
        set_precision("float32")
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, exact, atol=0.15)


# --- as a Keras model ---


@pytest.mark.parametrize("loss", ["full_softmax", "sampled"])
def test_it_compiles_fits_evaluates_and_saves_as_keras_models_do(loss, tmp_path):
    model = make_two_tower(small_config(loss=loss))
    batches = make_batches(sampled=None if loss == "full_softmax" else sampled())
    model.compile(optimizer="adam")
    steps = batches.steps_per_epoch
    history = model.fit(batches.dataset(), steps_per_epoch=steps, epochs=4, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    evaluated = model.evaluate(batches.dataset().take(steps), verbose=0, return_dict=True)
    assert evaluated["loss"] < history["loss"][0]
    model.save_weights(tmp_path / "weights")
    other = make_two_tower(small_config(loss=loss), seed=9)
    other.load_weights(tmp_path / "weights")
    histories = make_histories([4, 9])
    np.testing.assert_array_equal(asked(other, histories), asked(model, histories))


def test_every_weight_gets_a_gradient():
    model = make_two_tower(small_config(request_time=True))
    with tf.GradientTape() as tape:
        loss = model.compute_loss(batch_of(make_batches()))
    gradients = tape.gradient(loss, model.trainable_variables)
    for weight, slope in zip(model.trainable_variables, gradients, strict=True):
        assert np.abs(tf.convert_to_tensor(slope)).max() > 0, weight.name


# --- the checkerboard ---


def checkerboard(users=60, items=20, events=12):
    """Users of even number meet even items and users of odd number odd ones, in random order."""
    rng = np.random.default_rng(0)
    item = np.stack(
        [rng.permutation(np.arange(1 + user % 2, items + 1, 2))[:events] for user in range(users)]
    )
    count = item.shape[1]
    flat = np.zeros(item.size, np.int32)
    return Histories(
        np.arange(users + 1, dtype=np.int64) * count,
        item.ravel().astype(np.int32),
        flat + 2,
        flat,
        np.tile(np.arange(count), users).astype(np.int64) * 86_400,
    )


@pytest.mark.parametrize("loss", ["full_softmax", "sampled"])
def test_it_recovers_the_checkerboard(loss, tmp_path):
    histories = checkerboard()
    users, items = len(histories), 20
    config = small_config(
        loss=loss,
        epochs=25,
        batch_size=16,
        embedding_dim=16,
        learning_rate=0.02,
        dropout=0.1,
        jit_compile=False,
    )
    set_seed(1)
    nothing = np.zeros((items + 1, 0), np.float32)
    model = TwoTower(config, nothing, nothing, EventCoding())
    some = SampledItems(4, 8, items) if loss == "sampled" else None
    none = np.zeros((users, 0), np.float32)
    batches = TrainingBatches(
        PackedSequences(histories, np.ones(len(histories.item), np.float32), 8, 1),
        config.batch_size,
        none,
        none,
        some,
    )
    work = {"placement": place("one_device"), "work_dir": tmp_path, "title": "checkerboard"}
    fit(model, batches, config, **work)
    vectors = model.encode_candidate(nothing, nothing, np.arange(items + 1, dtype=np.int32))
    half = histories.last(5)
    scores = model.encode_query(half, vectors, none, none) @ vectors[1:].T
    top = np.argsort(-scores, axis=1)[:, : items // 2] + 1
    right = top % 2 == 1 - np.arange(users)[:, None] % 2
    assert right.mean() > 0.98


def test_the_toy_histories_hold_a_row_longer_than_the_model_reads():
    assert max(LENGTHS) > 8
    assert query_arrays(make_histories([30]), 8)["segment"].all()
