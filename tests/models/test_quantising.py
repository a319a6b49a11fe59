"""Quantisation-aware training: what layers compute with, what learns, and what is left in them."""

import numpy as np
import pytest

from tfrec.models.int8 import holds
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.litert import convert
from tfrec.models.quantising import dense_layers, learning, quantised, rounded, settle


class Small(tf_keras.Model):
    """Two layers that int8 is for, and a small one."""

    def __init__(self):
        super().__init__()
        set_of = tf_keras.initializers.RandomNormal(seed=1)
        self.first = tf_keras.layers.Dense(48, "tanh", kernel_initializer=set_of)
        self.second = tf_keras.layers.Dense(32, kernel_initializer=set_of)
        self.last = tf_keras.layers.Dense(2, kernel_initializer=set_of)
        self(tf.zeros([1, 32]))

    def call(self, inputs):
        return self.last(self.second(self.first(inputs)))


@pytest.fixture
def model():
    return Small()


def test_layers_of_some_size_are_found(model):
    assert dense_layers(model) == [model.first, model.second]


def test_rounding_is_that_of_litert(model):
    kernel = model.second.kernel
    found = rounded(kernel).numpy()
    steps = np.abs(kernel.numpy()).max(axis=0) / 127
    np.testing.assert_allclose(found, np.round(kernel.numpy() / steps) * steps, atol=1e-6)
    assert holds(found)
    assert not holds(kernel.numpy())


def test_a_column_of_zeros_stays(model):
    kernel = model.second.kernel
    kernel.assign(kernel.numpy() * np.where(np.arange(32) == 3, 0, 1))
    assert (rounded(kernel).numpy()[:, 3] == 0).all()
    assert np.isfinite(rounded(kernel).numpy()).all()


def test_layers_compute_with_int8_and_have_their_variables_back(model):
    values, before = tf.random.stateless_normal([4, 32], [1, 2]), list(model.trainable_variables)
    plain = model(values)
    with quantised([model.first, model.second]):
        found = model(values)
    assert not np.allclose(found, plain, atol=1e-6)
    assert [id(v) for v in model.trainable_variables] == [id(v) for v in before]
    settle(dense_layers(model))
    np.testing.assert_allclose(model(values), found, atol=1e-6)


def test_a_failure_within_leaves_the_variables(model):
    kernel = model.first.kernel
    with pytest.raises(ZeroDivisionError), quantised([model.first]):
        raise ZeroDivisionError
    assert model.first.kernel is kernel


def test_gradients_pass_to_the_float_weights(model):
    values, kernel = tf.random.stateless_normal([4, 32], [1, 2]), model.second.kernel
    with tf.GradientTape() as tape, quantised(dense_layers(model)):
        loss = tf.reduce_sum(model(values))
    through = tape.gradient(loss, kernel)
    settle(dense_layers(model))
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(values))
    np.testing.assert_allclose(through, tape.gradient(loss, kernel), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("jit", [False, True])
def test_learning_comes_nearer_than_rounding(model, jit):
    layers = dense_layers(model)
    # A few large weights take the steps away from the others, which there is much to win by.
    for layer in layers:
        layer.kernel.assign(layer.kernel.numpy() + np.where(np.eye(*layer.kernel.shape), 3, 0))
    values = tf.random.stateless_normal([256, 32], [1, 2])
    told = model(values)

    def off(inputs, training):
        return {"values": tf.reduce_mean(tf.square(model(inputs) - told))}

    learned = learning(layers, off)
    before = float(learned(values, False)["values"])
    slower = tf_keras.optimizers.schedules.PolynomialDecay(5e-4, 300, 0.0)
    optimizer = tf_keras.optimizers.Adam(slower)
    optimizer.build(model.trainable_variables)

    @tf.function(jit_compile=jit)
    def step():
        with tf.GradientTape() as tape:
            loss = learned(values, True)["values"]
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))

    for _ in range(300):
        step()
    settle(layers)
    assert float(off(values, False)["values"]) < 0.6 * before
    assert all(holds(layer.kernel.numpy()) for layer in layers)


def test_litert_holds_just_these_weights(model, tmp_path):
    from tfrec.engines.litert import LiteRTModel

    def error(int8):
        blob = convert(lambda x: {"y": model(x)}, {"x": tf.TensorSpec([None, 32])}, int8)
        (tmp_path / "m.tflite").write_bytes(blob)
        # One row of ones and minus ones: activations that int8 holds as they are.
        values = np.where(np.random.default_rng(1).random((8, 32)) < 0.5, -1, 1)
        found = LiteRTModel(tmp_path / "m.tflite", 1)({"x": values.astype(np.float32)})
        return np.abs(found - model(values.astype(np.float32))).max()

    model.first.activation = tf_keras.activations.linear
    before = error(True)
    settle(dense_layers(model))
    assert error(False) < 1e-5
    assert error(True) < before
