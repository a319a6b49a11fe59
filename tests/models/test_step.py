"""The training step: it compiles as a whole, cuts batches into pieces, and follows the seed."""

import numpy as np
import pytest
from tiny_bert import write_tiny_bert
from toys import make_batches, make_two_tower, small_config

from tfrec.errors import ConfigError
from tfrec.models.batches import SampledItems
from tfrec.models.keras_bridge import set_precision, tf, tf_keras
from tfrec.models.text import TextEncoder

ITEMS = 12
TEXTS = ["", *(f"the film of war {number}" for number in range(1, ITEMS + 1))]


def sampled(**settings):
    return SampledItems(**{"positions": 3, "negatives": 8, "num_items": ITEMS, **settings})


def weights(model):
    return np.concatenate([v.numpy().ravel() for v in model.trainable_variables])


def updated(model, batches, steps=2, jit=False, optimizer=None):
    """The model after some updates, their losses, and how often the step was traced."""
    made = optimizer or tf_keras.optimizers.SGD(0.5)
    model.compile(optimizer=made)
    getattr(made, "inner_optimizer", made).build(model.trainable_variables)
    step = tf.function(model.train_step, jit_compile=jit)
    losses = []
    for batch in batches.dataset().take(steps):
        model.reset_metrics()
        losses.append(float(step(batch)["loss"]))
    return model, losses, step.experimental_get_tracing_count()


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "tiny")


def with_bert(bert, **settings):
    encoder = TextEncoder.load(bert, length=16)
    config = small_config(loss="sampled", **settings)
    model = make_two_tower(config, text_width=encoder.width, encoder=encoder)
    tokens, mask = encoder.tokenize(TEXTS)
    return model, make_batches(sampled=sampled(tokens=tokens, token_mask=mask))


# --- XLA ---


@pytest.mark.parametrize("loss", ["full_softmax", "sampled"])
def test_the_whole_step_compiles_once_and_gives_what_it_gives_uncompiled(loss):
    batches = make_batches(sampled=None if loss == "full_softmax" else sampled())
    config = small_config(loss=loss, dropout=0.2, id_dropout=0.2)
    plain, losses, _ = updated(make_two_tower(config), batches)
    compiled, found, traces = updated(make_two_tower(config), batches, steps=5, jit=True)
    assert traces == 1
    np.testing.assert_allclose(found[:2], losses, rtol=1e-4)
    again, _, _ = updated(make_two_tower(config), batches, jit=True)
    np.testing.assert_allclose(weights(again), weights(plain), atol=1e-4)
    assert not np.array_equal(weights(compiled), weights(again))


def test_the_step_that_trains_the_bert_compiles_once_and_changes_the_bert(bert):
    model, batches = with_bert(bert)
    before = {v.path: v.numpy() for v in model.encoder.model.trainable_variables}
    _, losses, traces = updated(model, batches, steps=3, jit=True)
    assert traces == 1
    assert np.isfinite(losses).all()
    moved = [
        path
        for path, value in before.items()
        if np.abs(next(v for v in model.encoder.model.variables if v.path == path) - value).max()
    ]
    # A key's bias adds the same to all scores of a softmax: its gradient is zero.
    assert [path for path in before if path not in moved and "key/bias" not in path] == []


def test_a_frozen_bert_stays_as_it_is(bert):
    model, batches = with_bert(bert)
    model.encoder.trainable = False
    before = [v.numpy() for v in model.encoder.model.variables]
    updated(model, batches)
    for value, variable in zip(before, model.encoder.model.variables, strict=True):
        np.testing.assert_array_equal(value, variable.numpy())


# --- pieces ---


@pytest.mark.parametrize("pieces", [2, 8])
def test_gradients_of_pieces_add_up_to_those_of_the_batch(pieces):
    batches = make_batches()
    whole, losses, _ = updated(make_two_tower(small_config()), batches, jit=False)
    parts, found, _ = updated(make_two_tower(small_config(accumulate=pieces)), batches)
    np.testing.assert_allclose(found, losses, rtol=1e-5)
    np.testing.assert_allclose(weights(parts), weights(whole), atol=1e-5)


def test_pieces_of_a_sampled_batch_all_see_the_uniform_negatives():
    # 8 negatives and 8 rows: what belongs to all pieces is told by its name, not by its length.
    model = make_two_tower(small_config(loss="sampled", accumulate=2))
    (batch,) = make_batches(sampled=sampled()).dataset().take(1)
    piece = model._piece(batch, 1)
    assert piece["negatives"].shape == (8,)
    assert piece["items"].shape == batch["items"].shape
    assert piece["target"].shape == (4, 3)
    np.testing.assert_array_equal(piece["segment"], batch["segment"][4:])
    _, losses, _ = updated(model, make_batches(sampled=sampled()))
    assert np.isfinite(losses).all()


def test_pieces_of_unequal_size_are_refused():
    model = make_two_tower(small_config(accumulate=3))
    (batch,) = make_batches().dataset().take(1)
    with pytest.raises(ConfigError, match="accumulate = 3 does not divide a replica's 8 rows"):
        model.train_step(batch)


def test_pieces_draw_different_dropout():
    (batch,) = make_batches().dataset().take(1)
    twice = {n: v if n == "denominator" else tf.concat([v[:4], v[:4]], 0) for n, v in batch.items()}
    model = make_two_tower(small_config(accumulate=2, dropout=0.5))
    model.compile(optimizer="sgd")
    losses = [
        float(model._piece_gradients(model._piece(twice, piece), piece)[0]) for piece in (0, 1)
    ]
    assert losses[0] != losses[1]


# --- the seed ---


def test_the_same_seed_gives_the_same_losses_and_weights_and_another_gives_others():
    config = small_config(dropout=0.3, id_dropout=0.3)
    runs = [
        updated(make_two_tower(config, seed=seed), make_batches(), steps=3, jit=True)
        for seed in (3, 3, 4)
    ]
    assert runs[0][1] == runs[1][1] != runs[2][1]
    np.testing.assert_array_equal(weights(runs[0][0]), weights(runs[1][0]))
    assert not np.array_equal(weights(runs[0][0]), weights(runs[2][0]))


# --- precision ---


@pytest.mark.parametrize(
    ("precision", "loss", "steps"),
    [
        ("mixed_bfloat16", "full_softmax", 4),
        ("mixed_float16", "full_softmax", 4),
        ("mixed_bfloat16", "sampled", 3),
    ],
)
def test_half_precision_trains_nearly_as_float32_does(precision, loss, steps):
    batches = make_batches(sampled=None if loss == "full_softmax" else sampled())
    config = small_config(loss=loss)
    _, exact, _ = updated(make_two_tower(config), batches, steps, jit=True)
    set_precision(precision)
    try:
        optimizer = tf_keras.optimizers.SGD(0.5)
        if precision == "mixed_float16":
            optimizer = tf_keras.mixed_precision.LossScaleOptimizer(optimizer, initial_scale=256.0)
        model, losses, _ = updated(
            make_two_tower(config), batches, steps, jit=True, optimizer=optimizer
        )
    finally:
        set_precision("float32")
    assert {v.dtype for v in model.trainable_variables} == {tf.float32}
    np.testing.assert_allclose(losses, exact, rtol=0.05)


# --- what is reported ---


def test_the_reported_loss_is_the_mean_over_the_batches():
    model = make_two_tower()
    model.compile(optimizer=tf_keras.optimizers.SGD(0.0))
    batches = make_batches()
    each = [float(model.compute_loss(batch)) for batch in batches.dataset().take(3)]
    model.reset_metrics()
    for batch in batches.dataset().take(3):
        found = model.train_step(batch)["loss"]
    assert float(found) == pytest.approx(np.mean(each), rel=1e-5)
    model.reset_metrics()
    for batch in batches.dataset().take(3):
        found = model.test_step(batch)["loss"]
    assert float(found) == pytest.approx(np.mean(each), rel=1e-5)
