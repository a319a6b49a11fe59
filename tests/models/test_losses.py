"""The exact softmax beside TensorFlow's, the sampled one beside hand computation."""

import numpy as np
import pytest

from tfrec.models.keras_bridge import tf
from tfrec.models.losses import across_replicas, full_softmax_loss

TOLERANCE = 1e-5


def problem(queries=24, candidates=17, width=5, seed=0):
    rng = np.random.default_rng(seed)
    return (
        tf.constant(rng.normal(size=(queries, width)) * 2, tf.float32),
        tf.constant(rng.normal(size=(candidates, width)), tf.float32),
        tf.constant(rng.integers(0, candidates, queries), tf.int32),
        tf.constant(rng.choice([0.0, 0.5, 1.0, 2.0], queries), tf.float32),
    )


def reference(queries, candidates, targets, weights):
    logits = tf.matmul(queries, candidates, transpose_b=True)
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    return tf.reduce_sum(weights * each)


def value_and_gradients(loss, queries, candidates, *others):
    with tf.GradientTape() as tape:
        tape.watch([queries, candidates])
        value = 3.0 * loss(queries, candidates, *others)
    return [value.numpy(), *(g.numpy() for g in tape.gradient(value, [queries, candidates]))]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chunk", [1, 5, 8, 24, 1000])
def test_full_softmax_equals_tensorflows_cross_entropy(chunk, compiled):
    given = problem()

    def loss(*arguments):
        return full_softmax_loss(*arguments, chunk=chunk)

    found = value_and_gradients(tf.function(loss, jit_compile=compiled), *given)
    for ours, theirs in zip(found, value_and_gradients(reference, *given), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_full_softmax_holds_with_a_prime_number_of_queries():
    given = problem(queries=13)
    found = value_and_gradients(lambda *a: full_softmax_loss(*a, chunk=4), *given)
    for ours, theirs in zip(found, value_and_gradients(reference, *given), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_full_softmax_bears_large_logits():
    queries, candidates, targets, weights = problem()
    given = (queries * 200, candidates, targets, weights)
    found = value_and_gradients(full_softmax_loss, *given)
    assert all(np.isfinite(part).all() for part in found)
    np.testing.assert_allclose(found[0], value_and_gradients(reference, *given)[0], rtol=TOLERANCE)


@pytest.mark.parametrize("out", [[3], [0, 5, 16]])
def test_candidates_that_are_taken_out_are_as_if_they_were_not_there(out):
    queries, candidates, targets, weights = problem()
    kept = np.setdiff1d(np.arange(17), out)
    targets = np.random.default_rng(1).integers(0, len(kept), 24)
    shift = np.zeros(17, np.float32)
    shift[out] = -1e9
    found = value_and_gradients(
        lambda *a: full_softmax_loss(*a, chunk=8, shift=tf.constant(shift)),
        queries, candidates, tf.constant(kept[targets], tf.int32), weights,
    )  # fmt: skip
    fewer = tf.gather(candidates, kept)
    alone = value_and_gradients(reference, queries, fewer, tf.constant(targets), weights)
    np.testing.assert_allclose(found[0], alone[0], rtol=TOLERANCE)
    np.testing.assert_allclose(found[1], alone[1], atol=TOLERANCE)
    np.testing.assert_allclose(found[2][kept], alone[2], atol=TOLERANCE)
    assert not found[2][out].any()


def test_a_query_of_weight_zero_counts_for_nothing():
    queries, candidates, targets, weights = problem()
    weights = tf.tensor_scatter_nd_update(weights, [[3]], [0.0])
    changed = tf.tensor_scatter_nd_update(queries, [[3]], [tf.fill([5], 9.0)])
    first = value_and_gradients(full_softmax_loss, queries, candidates, targets, weights)
    second = value_and_gradients(full_softmax_loss, changed, candidates, targets, weights)
    np.testing.assert_allclose(first[0], second[0], rtol=TOLERANCE)
    np.testing.assert_allclose(first[2], second[2], atol=TOLERANCE)
    assert not second[1][3].any()


def test_half_precision_inputs_give_a_float32_loss_and_gradients_of_their_own_type():
    queries, candidates, targets, weights = problem()
    half = [tf.cast(queries, tf.bfloat16), tf.cast(candidates, tf.bfloat16)]
    with tf.GradientTape() as tape:
        tape.watch(half)
        loss = full_softmax_loss(*half, targets, weights)
    assert loss.dtype == tf.float32
    assert [g.dtype for g in tape.gradient(loss, half)] == [tf.bfloat16] * 2


def test_one_replica_gathers_nothing():
    values = tf.constant([[1.0], [2.0]])
    assert across_replicas(values) is values


# What two replicas gather is tested in test_distribution.py.
