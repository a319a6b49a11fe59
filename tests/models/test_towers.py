"""What a candidate's vector and a query's vector are made of."""

import numpy as np
import pytest
from toys import make_histories

from tfrec.data.sequences import query_arrays
from tfrec.models.dropout import drawing
from tfrec.models.keras_bridge import set_precision, set_seed, tf, tf_keras
from tfrec.models.towers import CandidateTower, QueryTower

WIDTH, ROWS, TEXT, ATTRIBUTES, LENGTH = 8, 6, 5, 3, 6


def candidate(seed=0, **settings):
    set_seed(seed)
    tower = CandidateTower(WIDTH, ROWS, **settings)
    tower(tf.zeros([1, TEXT]), tf.zeros([1, ATTRIBUTES]), tf.zeros([1], tf.int32))
    return tower


def features(rows=ROWS, text=TEXT, attributes=ATTRIBUTES):
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(rows, text)).astype(np.float32),
        rng.normal(size=(rows, attributes)).astype(np.float32),
    )


# --- candidates ---


def test_a_candidate_is_the_sum_of_text_attributes_and_id():
    tower, (text, attributes) = candidate(), features()
    expected = text @ tower.text.kernel.numpy() + attributes @ tower.attributes.kernel.numpy()
    expected[1:] += tower.ids.numpy()[1:]
    np.testing.assert_allclose(tower(text, attributes), expected, atol=1e-6)


def test_row_zero_has_no_id_so_that_text_alone_gives_a_vector():
    tower, (text, attributes) = candidate(), features()
    unknown = tower(text, attributes, np.zeros(ROWS, np.int32)).numpy()
    expected = text @ tower.text.kernel.numpy() + attributes @ tower.attributes.kernel.numpy()
    np.testing.assert_allclose(unknown, expected, atol=1e-6)


def test_rows_in_any_order_give_the_vectors_of_the_whole_catalog():
    tower, (text, attributes) = candidate(), features()
    whole = tower(text, attributes).numpy()
    rows = np.array([4, 0, 2, 2], np.int32)
    some = tower(text[rows], attributes[rows], rows).numpy()
    np.testing.assert_allclose(some, whole[rows], atol=1e-6)


def test_a_hidden_layer_adds_to_the_linear_part_and_nothing_where_there_is_no_text():
    tower, (text, attributes) = candidate(item_ids=False, text_hidden=7), features()
    text[2] = 0
    found = tower(text, attributes).numpy()
    hidden = tf_keras.activations.gelu(text @ tower.text_hidden.kernel.numpy()).numpy()
    linear = text @ tower.text.kernel.numpy() + attributes @ tower.attributes.kernel.numpy()
    np.testing.assert_allclose(found, linear + hidden @ tower.text_out.kernel.numpy(), atol=1e-6)
    assert np.abs(found - linear).max(axis=1)[[1, 3]].min() > 1e-4
    np.testing.assert_allclose(found[2], linear[2], atol=1e-7)


def test_parts_of_texts_are_left_out_in_training_alone():
    tower, (text, attributes) = candidate(item_ids=False, text_dropout=0.5), features()
    whole = text @ tower.text.kernel.numpy() + attributes @ tower.attributes.kernel.numpy()
    np.testing.assert_allclose(tower(text, attributes, training=False), whole, atol=1e-6)
    many = 2000
    with drawing(1):
        seen = tower(np.repeat(text[1:2], many, 0), np.zeros((many, ATTRIBUTES)), training=True)
    expected = text[1] @ tower.text.kernel.numpy()
    error = np.abs(seen.numpy().mean(axis=0) - expected)
    assert (error < 5 * seen.numpy().std(axis=0) / many**0.5).all()
    assert seen.numpy().std(axis=0).min() > 0


@pytest.mark.parametrize(("text", "attributes"), [(0, 3), (5, 0), (0, 0)])
def test_what_a_catalog_lacks_has_no_weights(text, attributes):
    set_seed(0)
    tower = CandidateTower(WIDTH, ROWS)
    out = tower(*features(text=text, attributes=attributes))
    assert out.shape == (ROWS, WIDTH)
    assert len(tower.trainable_weights) == 1 + bool(text) + bool(attributes)
    if not text + attributes:
        np.testing.assert_array_equal(out[1:], tower.ids[1:])
        assert not out[0].numpy().any()


def test_without_ids_two_items_of_the_same_features_are_the_same():
    set_seed(0)
    tower = CandidateTower(WIDTH, ROWS, item_ids=False)
    out = tower(np.ones((2, TEXT), np.float32), np.ones((2, ATTRIBUTES), np.float32)).numpy()
    np.testing.assert_array_equal(out[0], out[1])
    assert len(tower.trainable_weights) == 2


def test_a_share_of_the_ids_is_left_out_in_training_only():
    set_seed(0)
    tower = CandidateTower(WIDTH, 4001, id_dropout=0.25)
    nothing = tf.zeros([4001, 0])
    with drawing(1):
        trained = tower(nothing, nothing, training=True).numpy()
    out = ~trained.any(axis=1)
    assert out[0]
    assert abs(out[1:].mean() - 0.25) < 0.03
    np.testing.assert_array_equal(trained[~out], tower.ids.numpy()[~out])
    assert tower(nothing, nothing).numpy()[1:].any(axis=1).all()


def test_half_precision_candidates_are_near():
    text, attributes = features()
    exact = candidate()(text, attributes).numpy()
    set_precision("mixed_bfloat16")
    try:
        found = candidate()(text, attributes)
    finally:
        set_precision("float32")
    assert found.dtype == tf.bfloat16
    np.testing.assert_allclose(tf.cast(found, tf.float32), exact, atol=0.02)


# --- queries ---


def query(seed=0, **settings):
    set_seed(seed)
    tower = QueryTower(WIDTH, LENGTH, 4, layers=1, request_time=True, **settings)
    tower(*asked(tower))
    rng = np.random.default_rng(seed)
    for weight in tower.trainable_weights:
        weight.assign_add(rng.normal(size=weight.shape, scale=0.2).astype(np.float32))
    return tower


def asked(tower, profile=2, attributes=2):
    """Two rows of a request, with the vectors that go with them."""
    histories = make_histories([4, 9])
    batch = query_arrays(histories, LENGTH, np.array([1_900_000_000] * 2))
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(2, LENGTH, WIDTH)).astype(np.float32)
    users = [rng.normal(size=(2, 1, w)).astype(np.float32) for w in (profile, attributes)]
    return tf.constant(vectors), {k: tf.constant(v) for k, v in batch.items()}, *users


READS = {"event": "events", "rating": "events", "gap": "time_gaps", "next_gap": "request_time"}


@pytest.mark.parametrize("name", READS)
def test_what_is_switched_on_is_read_and_what_is_switched_off_is_not(name):
    for on in (True, False):
        set_seed(0)
        settings = {"events": True, "time_gaps": True, "request_time": True, READS[name]: on}
        tower = QueryTower(WIDTH, LENGTH, 4, layers=1, **settings)
        vectors, batch, *users = asked(tower)
        before = tower(vectors, batch, *users).numpy()
        other = tf.where(batch[name] > 1, 5 - batch[name], batch[name]) if name == "event" else 9
        batch = {**batch, name: tf.zeros_like(batch[name]) + other}
        changed = np.abs(tower(vectors, batch, *users).numpy() - before).max() > 1e-6
        assert changed == on


def test_the_order_of_events_matters():
    tower = query()
    vectors, batch, *users = asked(tower)
    swapped = tf.gather(vectors, [0, 2, 1, 3, 4, 5], axis=1)
    batch = {name: tf.ones_like(v) if name != "position" else v for name, v in batch.items()}
    before, after = (tower(v, batch, *users).numpy()[:, 5] for v in (vectors, swapped))
    assert np.abs(before - after).max() > 1e-3


@pytest.mark.parametrize("kind", [0, 1])
def test_profile_and_attributes_reach_the_places_of_their_own_user_only(kind):
    tower = query()
    vectors, batch, *_ = asked(tower)
    batch = {**batch, "segment": tf.constant([[1, 1, 2, 2, 2, 0], [1, 1, 1, 2, 3, 3]])}
    rng = np.random.default_rng(2)
    users = [rng.normal(size=(2, 3, 2)).astype(np.float32) for _ in range(2)]
    before = tower(vectors, batch, *users).numpy()
    users[kind][:, 1] += 1  # the user of segment 2
    changed = np.abs(tower(vectors, batch, *users).numpy() - before).max(axis=-1) > 1e-5
    assert changed.tolist() == (batch["segment"] == 2).numpy().tolist()


def test_one_user_for_a_row_is_the_same_as_that_user_for_each_segment():
    tower = query()
    vectors, batch, profile, attributes = asked(tower)
    single = tower(vectors, batch, profile, attributes)
    repeated = tower(vectors, batch, np.repeat(profile, 3, 1), np.repeat(attributes, 3, 1))
    used = batch["segment"].numpy() > 0
    np.testing.assert_allclose(single.numpy()[used], repeated.numpy()[used], atol=1e-6)


def test_without_profile_and_attributes_there_are_no_weights_for_them():
    set_seed(0)
    tower = QueryTower(WIDTH, LENGTH, 4, layers=1)
    tower(*asked(tower, 0, 0))
    assert not any("profile" in w.name or "attributes" in w.name for w in tower.weights)


@pytest.mark.parametrize(
    "layer",
    [
        CandidateTower(4, 7, item_ids=False, id_dropout=0.2, name="c"),
        QueryTower(
            8, 5, 3, layers=1, heads=4, dropout=0.2, events=False, time_gaps=False,
            request_time=True, name="q",
        ),
    ],
    ids=["candidate", "query"],
)  # fmt: skip
def test_config_round_trip(layer):
    config = layer.get_config()
    again = type(layer).from_config(config)
    assert again.get_config() == config
    assert [w.shape for w in again.weights] == [w.shape for w in layer.weights]
