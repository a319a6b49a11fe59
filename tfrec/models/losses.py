"""Losses over candidates: exact softmax over a catalog, and its sampled form."""

from __future__ import annotations

from typing import Any

from tfrec.models.keras_bridge import tf


def full_softmax_loss(
    queries: Any,
    candidates: Any,
    targets: Any,
    weights: Any,
    chunk: int = 1024,
    shift: Any | None = None,
) -> Any:
    """Sum of weighted cross-entropies against every candidate, without holding all logits.

    Queries pass in chunks; each chunk's loss and gradients are computed while its logits are in
    the cache, and the logits are not kept. (The idea of "Cut Cross-Entropy", Wijmans et al. 2024,
    and of the fused linear cross-entropy of Liger Kernel.)

    Args:
      queries: float32 (n, d), n a multiple of ``chunk`` or not larger than it; static shape.
      candidates: float32 (m, d).
      targets: int32 (n,), rows of ``candidates``.
      weights: float32 (n,); 0 leaves a query out.
      chunk: Queries whose logits are held at once.
      shift: float32 (m,), added to every query's logits; a large negative number takes a candidate
        out. None: nothing is added.

    Returns:
      float32 scalar. Not differentiable with respect to targets, weights and shift, nor twice.
    """
    count = queries.shape[0]
    pieces = _pieces(count, chunk)

    @tf.custom_gradient
    def loss(queries: Any, candidates: Any) -> Any:
        split = tf.reshape(queries, [pieces, count // pieces, queries.shape[1]])
        wanted = tf.reshape(targets, [pieces, -1])
        weight = tf.reshape(weights, [pieces, -1])

        def step(i: Any, total: Any, to_queries: Any, to_candidates: Any) -> Any:
            value, grad_queries, grad_candidates = _softmax_chunk(
                split[i], candidates, wanted[i], weight[i], shift
            )
            to_queries = tf.tensor_scatter_nd_update(to_queries, [[i]], grad_queries[None])
            return i + 1, total + value, to_queries, to_candidates + grad_candidates

        start = (0, tf.constant(0.0), tf.zeros_like(split), tf.zeros_like(candidates))
        _, total, to_queries, to_candidates = tf.while_loop(
            lambda i, *_: i < pieces, step, start, maximum_iterations=pieces
        )

        def gradient(upstream: Any) -> Any:
            return upstream * tf.reshape(to_queries, tf.shape(queries)), upstream * to_candidates

        return total, gradient

    return loss(tf.cast(queries, tf.float32), tf.cast(candidates, tf.float32))


def _pieces(count: int, chunk: int) -> int:
    """The fewest equal pieces of at most ``chunk`` queries."""
    least = -(-count // chunk)
    return next(p for p in range(least, count + 1) if count % p == 0)


def _softmax_chunk(queries: Any, candidates: Any, targets: Any, weights: Any, shift: Any) -> Any:
    logits = tf.matmul(queries, candidates, transpose_b=True)
    if shift is not None:
        logits += shift
    logits -= tf.reduce_max(logits, axis=-1, keepdims=True)
    exponent = tf.exp(logits)
    total = tf.reduce_sum(exponent, axis=-1, keepdims=True)
    hit = tf.equal(tf.range(tf.shape(candidates)[0])[None], targets[:, None])
    of_target = tf.reduce_sum(tf.where(hit, logits, 0.0), axis=-1)
    value = tf.reduce_sum(weights * (tf.math.log(total[:, 0]) - of_target))
    slope = (exponent / total - tf.cast(hit, tf.float32)) * weights[:, None]
    grad_queries = tf.matmul(slope, candidates)
    grad_candidates = tf.matmul(slope, queries, transpose_a=True)
    return value, grad_queries, grad_candidates


def across_replicas(values: Any) -> Any:
    """Gathers every replica's values along axis 0, this replica's own first.

    So in-batch negatives are the whole global batch's, however many replicas share it. Gradients
    flow back to the replica that made a value.
    """
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    gathered = context.all_gather(values, axis=0)
    shift = context.replica_id_in_sync_group * tf.shape(values)[0]
    return tf.roll(gathered, -shift, axis=0)
