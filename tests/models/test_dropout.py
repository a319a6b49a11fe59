"""Dropout by hash: follows the seed under XLA, has the right share, and does not repeat itself."""

import numpy as np
import pytest

from tfrec.models.dropout import Dropout, drawing, keep_mask
from tfrec.models.keras_bridge import tf


def mask(shape, rate, *identity, skip=0):
    with drawing(*identity):
        for _ in range(skip):
            keep_mask([1], rate)
        return keep_mask(shape, rate).numpy()


def test_compiled_and_uncompiled_give_the_same_mask():
    def drawn(step):
        with drawing(7, step):
            return keep_mask([50, 3], 0.3), keep_mask([50], 0.5)

    plain = [m.numpy() for m in drawn(tf.constant(4, tf.int64))]
    compiled = [m.numpy() for m in tf.function(drawn, jit_compile=True)(tf.constant(4, tf.int64))]
    np.testing.assert_array_equal(plain[0], compiled[0])
    np.testing.assert_array_equal(plain[1], compiled[1])


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.9])
def test_the_share_of_kept_places_is_right(rate):
    kept = mask([400, 500], rate, 1, 2).mean()
    assert abs(kept - (1 - rate)) < 4 * np.sqrt(rate * (1 - rate) / 200_000)


@pytest.mark.parametrize(
    "other",
    [
        {"identity": (2, 3)},
        {"identity": (1, 4)},
        {"identity": (1, 2**31 - 1)},
        {"identity": (3, 1)},
        {"identity": (1, 3, 0)},
        {"skip": 1},
        {"skip": 2},
    ],
)
def test_masks_of_other_steps_and_other_places_are_independent(other):
    first = mask([100_000], 0.5, 1, 3)
    second = mask([100_000], 0.5, *other.get("identity", (1, 3)), skip=other.get("skip", 0))
    for shift in (0, 1, 64):
        equal = (first == np.roll(second, shift)).mean()
        assert abs(equal - 0.5) < 4 * 0.5 / np.sqrt(100_000)


@pytest.mark.parametrize("lag", [1, 2, 3, 64, 100, 1024])
def test_neighbours_within_a_mask_are_independent(lag):
    one = mask([100_000], 0.5, 9)
    equal = (one[lag:] == one[:-lag]).mean()
    assert abs(equal - 0.5) < 4 * 0.5 / np.sqrt(100_000 - lag)


def test_kept_values_are_scaled_so_that_the_mean_stays():
    layer = Dropout(0.25)
    with drawing(1):
        out = layer(tf.ones([200, 200]), training=True).numpy()
    assert set(np.unique(out)) == {np.float32(0), np.float32(1 / 0.75)}
    assert abs(out.mean() - 1) < 0.02


def test_nothing_is_dropped_outside_of_training():
    values = tf.ones([5])
    assert Dropout(0.5)(values, training=False) is values
    assert Dropout(0.5)(values).numpy().tolist() == [1] * 5


def test_gradients_flow_through_what_was_kept():
    values = tf.ones([100])
    with drawing(5), tf.GradientTape() as tape:
        tape.watch(values)
        out = Dropout(0.5)(values, training=True)
    np.testing.assert_array_equal(tape.gradient(out, values), out)


def test_half_precision_stays_half_precision():
    layer = Dropout(0.5, dtype="mixed_bfloat16")
    with drawing(1):
        assert layer(tf.ones([5]), training=True).dtype == tf.bfloat16


def test_outside_of_a_step_tensorflow_draws():
    tf.random.set_seed(1)
    assert 0 < Dropout(0.5)(tf.ones([1000]), training=True).numpy().mean() < 2


def test_config_round_trip():
    assert Dropout.from_config(Dropout(0.25, name="d").get_config()).rate == 0.25
