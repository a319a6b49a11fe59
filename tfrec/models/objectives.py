"""Objectives of pretraining: what a behaviour encoder learns from sequences without labels.

Each has two methods. ``arrays`` makes, on the host, what it needs beside a batch of packed rows
(:class:`~tfrec.data.sequences.PackedSequences`), and ``loss`` is a replica's part of its loss. A
segment of a row is a window of one user's events.

Host arrays of an objective begin with its name. ``<name>_weight`` are the weights of its terms: the
loss that is minimised is their sum divided by that of the weights over the whole global batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from tfrec.data.sequences import MAX_SEGMENTS, Arrays
from tfrec.models.dropout import standard_normal
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.losses import across_replicas, full_softmax_loss


class Model(Protocol):
    """What an objective asks of the model in training."""

    temperature: float

    @property
    def shift(self) -> Any:
        """float32 (candidates,) added to the logits of a training batch."""

    def hidden(
        self,
        vectors: Any,
        batch: Mapping[str, Any],
        *,
        causal: bool,
        training: bool,
        hide: Any = None,
        users: bool = True,
    ) -> Any:
        """Encodes every place.

        Args:
          vectors: float (candidates, d).
          batch: int32 (rows, length) ``item`` (rows of ``vectors``), ``event``, ``rating``,
            ``gap``, ``next_gap``, ``position`` and ``segment``.
          causal: Whether a place sees only itself and what came before.
          training: Whether dropout is on.
          hide: float (rows, length), 1 where the event is not shown; None: all are shown.
          users: Whether the users' profile and attributes are read.

        Returns:
          float (rows, length, d).
        """

    def text_only(self, training: bool) -> Any:
        """float (candidates, d), candidate vectors made without ids."""


class Objective(Protocol):
    """One way to learn from sequences."""

    name: ClassVar[str]

    def arrays(self, rows: Arrays, generator: np.random.Generator) -> Arrays:
        """Arrays for the rows of a batch, each with the rows as its first axis."""

    def loss(self, model: Model, vectors: Any, batch: Mapping[str, Any], training: bool) -> Any:
        """float32 scalar, the weighted sum over this replica's rows."""


@dataclass(frozen=True)
class NextItem:
    """The next event from those before it (SASRec: Kang and McAuley 2018, arXiv:1808.09781)."""

    name: ClassVar[str] = "next_item"

    def arrays(self, rows: Arrays, generator: np.random.Generator) -> Arrays:
        """float32 (rows, length) weights."""
        return {"next_item_weight": rows["weight"]}

    def loss(self, model: Model, vectors: Any, batch: Mapping[str, Any], training: bool) -> Any:
        """See :class:`Objective`."""
        hidden = model.hidden(vectors, batch, causal=True, training=training)
        return _over_catalog(model, hidden, vectors, batch["target"], batch["next_item_weight"])


@dataclass(frozen=True)
class Masked:
    """Events that were hidden, from those on both sides (BERT4Rec: Sun et al. 2019,
    arXiv:1904.06690).

    As in next-item prediction, an event is told at the place before its own: so a place means the
    same to whoever starts from these weights.

    Attributes:
      rate: Share of a row's events that are hidden.
    """

    rate: float = 0.3
    name: ClassVar[str] = "masked"

    def arrays(self, rows: Arrays, generator: np.random.Generator) -> Arrays:
        """float32 (rows, length) ``hide``; (rows, K) ``place``, ``target`` and ``weight``."""
        item, segment = rows["item"], rows["segment"]
        # Told at the place before, an event needs one in its own segment.
        free = item > 0
        free[:, 1:] &= segment[:, 1:] == segment[:, :-1]
        free[:, 0] = False
        count = max(round(self.rate * item.shape[1]), 1)
        events = free.sum(axis=1, keepdims=True)
        draw = np.where(free, generator.random(item.shape), 2.0)
        place = np.argsort(draw, axis=1)[:, :count].astype(np.int32)
        used = np.arange(count) < np.maximum(np.round(self.rate * events), np.minimum(events, 1))
        hide = np.zeros(item.shape, np.float32)
        np.put_along_axis(hide, place, used.astype(np.float32), axis=1)
        before = np.maximum(place - 1, 0)
        return {
            "masked_hide": hide,
            "masked_place": np.where(used, before, 0).astype(np.int32),
            "masked_target": np.where(used, np.take_along_axis(item, place, axis=1), 0),
            "masked_weight": used * np.take_along_axis(rows["weight"], before, axis=1),
        }

    def loss(self, model: Model, vectors: Any, batch: Mapping[str, Any], training: bool) -> Any:
        """See :class:`Objective`."""
        hide = batch["masked_hide"]
        hidden = model.hidden(vectors, batch, causal=False, training=training, hide=hide)
        queries = tf.gather(hidden, batch["masked_place"], batch_dims=1)
        return _over_catalog(
            model, queries, vectors, batch["masked_target"], batch["masked_weight"]
        )


@dataclass(frozen=True)
class Denoising:
    """All events of a window from a damaged copy of it: some left out, some moved, some replaced
    (the noise of BART: Lewis et al. 2020, arXiv:1910.13461; the multinomial reconstruction of
    Mult-DAE: Liang et al. 2018, arXiv:1802.05814).

    Attributes:
      items: int32, rows of the catalog, of which the replacing ones are drawn.
      delete: Share of events left out.
      replace: Share of events replaced by another item.
      shuffle: Events move at most about so many places.
    """

    items: NDArray[np.int32]
    delete: float = 0.3
    replace: float = 0.1
    shuffle: float = 3.0
    name: ClassVar[str] = "denoising"

    def arrays(self, rows: Arrays, generator: np.random.Generator) -> Arrays:
        """int32 (rows, length) of the damaged copy; float32 (rows, length) weights."""
        copy = damaged(rows, generator, self.items, self.delete, self.replace, self.shuffle)
        return {f"denoising_{name}": values for name, values in copy.items()} | {
            "denoising_weight": _shared_among_events(rows)
        }

    def loss(self, model: Model, vectors: Any, batch: Mapping[str, Any], training: bool) -> Any:
        """See :class:`Objective`."""
        copy = {**batch, **_of(batch, "denoising_")}
        hidden = model.hidden(vectors, copy, causal=False, training=training)
        pooled = pooled_segments(hidden, copy["segment"])
        return _reconstruction(model, pooled, vectors, batch, batch["denoising_weight"])


@dataclass(frozen=True)
class Contrastive:
    """Two damaged copies of a window are nearer to each other than to those of other users
    (CL4SRec: Xie et al. 2022, arXiv:2010.14395; InfoNCE: van den Oord et al. 2018,
    arXiv:1807.03748).

    Attributes:
      items: int32, rows of the catalog.
      temperature: Divides the similarities.
      delete: Share of events left out of a copy.
      shuffle: Events move at most about so many places.
    """

    items: NDArray[np.int32]
    temperature: float = 0.1
    delete: float = 0.4
    shuffle: float = 3.0
    name: ClassVar[str] = "contrastive"

    def arrays(self, rows: Arrays, generator: np.random.Generator) -> Arrays:
        """int32 (rows, length) of both copies; float32 (rows, MAX_SEGMENTS) weights."""
        out: Arrays = {}
        for view in ("contrastive_a_", "contrastive_b_"):
            copy = damaged(rows, generator, self.items, self.delete, 0.0, self.shuffle)
            out |= {view + name: values for name, values in copy.items()}
        out["contrastive_weight"] = (events_of_segments(rows) > 1).astype(np.float32)
        return out

    def loss(self, model: Model, vectors: Any, batch: Mapping[str, Any], training: bool) -> Any:
        """See :class:`Objective`."""
        first, second = (
            self._view(model, vectors, batch, view, training)
            for view in ("contrastive_a_", "contrastive_b_")
        )
        weight = tf.reshape(batch["contrastive_weight"], [-1])
        return info_nce(first, second, weight, self.temperature)

    @staticmethod
    def _view(
        model: Model, vectors: Any, batch: Mapping[str, Any], view: str, training: bool
    ) -> Any:
        copy = {**batch, **_of(batch, view)}
        hidden = model.hidden(vectors, copy, causal=False, training=training, users=False)
        pooled = pooled_segments(tf.cast(hidden, tf.float32), copy["segment"])
        return tf.math.l2_normalize(tf.reshape(pooled, [-1, pooled.shape[-1]]), axis=-1)


@dataclass(frozen=True)
class CoOccurrence:
    """An item's text is nearer to what came next to it than to other items (InfoNCE, van den Oord
    et al. 2018, arXiv:1807.03748, over the pairs of item2vec, Barkan and Koenigstein 2016,
    arXiv:1603.04259): the second half of ``contrastive``.

    Attributes:
      window: How far apart the two events may be.
      pairs: Pairs drawn from each row.
    """

    window: int = 5
    pairs: int = 16
    name: ClassVar[str] = "co_occurrence"

    def arrays(self, rows: Arrays, generator: np.random.Generator) -> Arrays:
        """int32 (rows, pairs) ``item`` and ``target``, float32 ``weight``."""
        target, segment = rows["target"], rows["segment"]
        size = (len(target), self.pairs)
        place = generator.integers(0, target.shape[1], size)
        other = np.clip(
            place + generator.integers(1, self.window + 1, size), 0, target.shape[1] - 1
        )
        here, there = (np.take_along_axis(target, p, axis=1) for p in (place, other))
        same = np.equal(*(np.take_along_axis(segment, p, axis=1) for p in (place, other)))
        used = same & (here > 0) & (there > 0) & (here != there)
        weights = [np.take_along_axis(rows["weight"], p, axis=1) for p in (place, other)]
        swap = generator.random(size) < 0.5
        return {
            "co_occurrence_item": np.where(used, np.where(swap, here, there), 0),
            "co_occurrence_target": np.where(used, np.where(swap, there, here), 0),
            "co_occurrence_weight": np.where(used, np.minimum(*weights), 0).astype(np.float32),
        }

    def loss(self, model: Model, vectors: Any, batch: Mapping[str, Any], training: bool) -> Any:
        """See :class:`Objective`."""
        text = tf.gather(model.text_only(training), batch["co_occurrence_item"])
        return _over_catalog(
            model, text, vectors, batch["co_occurrence_target"], batch["co_occurrence_weight"]
        )


@dataclass(frozen=True, eq=False)
class TextHistory:
    """The next event from the history as a text, read by the BERT in place of the profile: the
    language-model view of a user (P5: Geng et al. 2022, arXiv:2203.13366), here as an encoder's.

    Attributes:
      vectors: float32 (texts, text width) of histories as texts.
      targets: int32 (texts,), the item that came next.
      weights: float32 (texts,), of that event.
      offsets: int64 (users + 1,): the texts of user u are ``offsets[u]:offsets[u + 1]``.
      pairs: Texts drawn for each row.
    """

    vectors: NDArray[np.float32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    offsets: NDArray[np.int64]
    pairs: int = 2
    name: ClassVar[str] = "text_history"

    def arrays(self, rows: Arrays, generator: np.random.Generator) -> Arrays:
        """float32 (rows, pairs, text width) ``profile``, int32 (rows, pairs) ``target``, and
        float32 (rows, pairs) ``weight``.
        """
        user = rows["user"]
        segments = np.maximum((user >= 0).sum(axis=1, keepdims=True), 1)
        chosen = generator.integers(0, segments, (len(user), self.pairs))
        owner = np.take_along_axis(user, chosen, axis=1)
        first, count = self.offsets[:-1][owner], np.diff(self.offsets)[owner]
        text = first + generator.integers(0, np.maximum(count, 1))
        used = (owner >= 0) & (count > 0)
        text = np.where(used, text, 0)
        target = np.where(used, self.targets[text], 0).astype(np.int32)
        return {
            "text_history_profile": self.vectors[text],
            "text_history_target": target,
            "text_history_weight": np.where(used & (target > 0), self.weights[text], 0),
        }

    def loss(self, model: Model, vectors: Any, batch: Mapping[str, Any], training: bool) -> Any:
        """See :class:`Objective`."""
        profile = batch["text_history_profile"]
        count = profile.shape[0] * profile.shape[1]
        nothing = tf.zeros([count, 1], tf.int32)
        start = dict.fromkeys(("item", "event", "rating", "gap", "next_gap", "position"), nothing)
        start |= {
            "segment": nothing + 1,
            "profile": tf.reshape(profile, [count, 1, profile.shape[2]]),
            "attributes": tf.zeros([count, 1, batch["attributes"].shape[-1]]),
        }
        hidden = model.hidden(vectors, start, causal=True, training=training)
        target, weight = batch["text_history_target"], batch["text_history_weight"]
        queries = tf.reshape(hidden, [*target.shape, hidden.shape[-1]])
        return _over_catalog(model, queries, vectors, target, weight)


class Variational(tf_keras.layers.Layer):
    """The bag of a window's events through a narrow Gaussian (Mult-VAE: Liang et al. 2018,
    arXiv:1802.05814), items being their vectors on both sides.

    Args:
      width: Width of the item vectors, d.
      latent: Width of the Gaussian.
      drop: Share of events left out of the bag that is read.
      most: Weight of the Kullback-Leibler divergence in the end.
      anneal: Updates until then, over which it grows evenly from 0.
    """

    objective_name = "vae"

    def __init__(
        self,
        width: int,
        latent: int = 64,
        drop: float = 0.5,
        most: float = 0.2,
        anneal: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.drop, self.most, self.anneal = drop, most, anneal
        self.wide = tf_keras.layers.Dense(2 * width, activation="tanh", name="wide")
        self.moments = tf_keras.layers.Dense(2 * latent, name="moments")
        self.narrow = tf_keras.layers.Dense(width, name="narrow")

    def arrays(self, rows: Arrays, generator: np.random.Generator) -> Arrays:
        """float32 (rows, length): ``kept`` events of the bag, and weights."""
        kept = (rows["target"] > 0) & (generator.random(rows["target"].shape) >= self.drop)
        return {"vae_kept": kept.astype(np.float32), "vae_weight": _shared_among_events(rows)}

    def call(self, bag: Any, training: bool | None = None) -> tuple[Any, Any]:
        """float (n, d) -> float (n, d) to score items with, and float32 (n,) divergence."""
        mean, log_variance = tf.split(self.moments(self.wide(bag)), 2, axis=-1)
        log_variance = tf.clip_by_value(log_variance, -10.0, 10.0)
        latent = mean
        if training:
            noise = tf.cast(standard_normal(tf.shape(mean)), mean.dtype)
            latent += tf.exp(0.5 * log_variance) * noise
        mean, log_variance = (tf.cast(v, tf.float32) for v in (mean, log_variance))
        divergence = tf.exp(log_variance) + tf.square(mean) - 1 - log_variance
        return self.narrow(latent), 0.5 * tf.reduce_sum(divergence, axis=-1)

    def loss_of(
        self, model: Model, vectors: Any, batch: Mapping[str, Any], training: bool, step: Any
    ) -> Any:
        """As :meth:`Objective.loss`; ``step``, the number of updates so far, anneals."""
        bag = tf.gather(vectors, batch["target"])
        kept = tf.cast(batch["vae_kept"], bag.dtype)
        total, count = _sum_segments(bag * kept[:, :, None], kept, batch["segment"])
        bag = total / tf.sqrt(tf.maximum(count, 1))
        queries, divergence = self(bag, training=training)
        weight = batch["vae_weight"]
        share, _ = _sum_segments(weight[:, :, None], weight, batch["segment"])
        grown = self.most * tf.minimum(tf.cast(step, tf.float32) / self.anneal, 1.0)
        penalty = tf.reduce_sum(tf.cast(share[:, :, 0] > 0, tf.float32) * divergence)
        events = tf.reduce_sum(tf.cast(weight > 0, tf.float32))
        scale = tf.reduce_sum(weight) / tf.maximum(events, 1.0)
        return _reconstruction(model, queries, vectors, batch, weight) + grown * scale * penalty


# --- shared by the objectives ---


def damaged(
    rows: Arrays,
    generator: np.random.Generator,
    items: NDArray[np.int32],
    delete: float,
    replace: float,
    shuffle: float,
) -> Arrays:
    """A copy of packed rows with noise.

    Args:
      rows: Of :meth:`PackedSequences.epoch <tfrec.data.sequences.PackedSequences.epoch>`.
      generator: Decides.
      items: int32, rows of the catalog, of which the replacing ones are drawn.
      delete: Share of events left out: their places get segment 0. Start tokens stay.
      replace: Share of events replaced by another item.
      shuffle: An event moves at most about so many places, within its segment.

    Returns:
      int32 (rows, length) ``item``, ``event``, ``rating``, ``gap`` and ``segment``.
    """
    event, shape = rows["item"] > 0, rows["item"].shape
    place = np.arange(shape[1], dtype=np.float64)
    # Segments are contiguous: a move ends at the border, as segments are sorted by first.
    segment = np.where(rows["segment"] > 0, rows["segment"], MAX_SEGMENTS + 1)
    moved = np.where(event, place + generator.uniform(0, shuffle + 1, shape), place - 0.5)
    order = np.argsort(segment * (4.0 * shape[1]) + moved, axis=1, kind="stable")
    out = {
        name: np.take_along_axis(rows[name], order, axis=1)
        for name in ("item", "event", "rating", "gap")
    }
    event = out["item"] > 0
    replaced = event & (generator.random(shape) < replace)
    drawn = items[generator.integers(0, len(items), shape, dtype=np.int32)]
    out["item"] = np.where(replaced, drawn, out["item"])
    gone = event & (generator.random(shape) < delete)
    out["segment"] = np.where(gone, 0, rows["segment"]).astype(np.int32)
    return out


def events_of_segments(rows: Arrays) -> NDArray[np.int64]:
    """int64 (rows, MAX_SEGMENTS): how many targets the segments 1, 2, … have."""
    counts = np.zeros((len(rows["segment"]), MAX_SEGMENTS + 1), np.int64)
    row = np.broadcast_to(np.arange(len(counts))[:, None], rows["segment"].shape)
    np.add.at(counts, (row, rows["segment"]), rows["target"] > 0)
    return counts[:, 1:]


def _shared_among_events(rows: Arrays) -> NDArray[np.float32]:
    """float32 (rows, length): a target's weight in a bag, the root of the bag's size in sum."""
    counts = np.concatenate([np.zeros((len(rows["item"]), 1)), events_of_segments(rows)], axis=1)
    size = np.take_along_axis(counts, rows["segment"], axis=1)
    weight: NDArray[np.float32] = (rows["weight"] / np.sqrt(np.maximum(size, 1))).astype(np.float32)
    return weight


def pooled_segments(hidden: Any, segment: Any) -> Any:
    """Mean over each segment's places: (rows, length, d) -> (rows, MAX_SEGMENTS, d)."""
    total, count = _sum_segments(hidden, tf.ones_like(hidden[:, :, 0]), segment)
    return total / tf.maximum(count, 1)


def _sum_segments(values: Any, counted: Any, segment: Any) -> tuple[Any, Any]:
    """Sums over each segment's places: (rows, MAX_SEGMENTS, d) and (rows, MAX_SEGMENTS, 1)."""
    numbers = tf.range(1, MAX_SEGMENTS + 1)
    member = tf.cast(segment[:, None] == numbers[None, :, None], values.dtype)
    return tf.matmul(member, values), tf.matmul(member, counted[:, :, None])


def _over_catalog(model: Model, queries: Any, vectors: Any, targets: Any, weights: Any) -> Any:
    """Cross-entropy of the targets against every candidate."""
    count = queries.shape[0] * queries.shape[1]
    return full_softmax_loss(
        tf.reshape(queries, [count, queries.shape[-1]]) / model.temperature,
        vectors,
        tf.reshape(targets, [count]),
        tf.reshape(weights, [count]),
        shift=model.shift,
    )


def _reconstruction(
    model: Model, queries: Any, vectors: Any, batch: Mapping[str, Any], weights: Any
) -> Any:
    """Multinomial likelihood of the targets of a segment under its one query."""
    queries = tf.cast(queries, tf.float32) / model.temperature
    vectors = tf.cast(vectors, tf.float32)
    logits = tf.matmul(queries, vectors, transpose_b=True) + model.shift
    normaliser = tf.reduce_logsumexp(logits, axis=-1)
    place = tf.maximum(batch["segment"] - 1, 0)
    own = tf.gather(queries, place, batch_dims=1)
    logit = tf.reduce_sum(own * tf.gather(vectors, batch["target"]), axis=-1)
    logit += tf.gather(model.shift, batch["target"])
    each = tf.gather(normaliser, place, batch_dims=1) - logit
    return tf.reduce_sum(tf.where(weights > 0, weights * each, 0.0))


def info_nce(first: Any, second: Any, weights: Any, temperature: float) -> Any:
    """Each row of the first (n, d) against all rows of the second, of every replica."""
    there = across_replicas(weights) > 0
    logits = tf.matmul(first, across_replicas(second), transpose_b=True) / temperature
    logits = tf.where(there[None], logits, -1e9)
    own = tf.range(tf.shape(first)[0])
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(own, logits)
    return tf.reduce_sum(tf.where(weights > 0, each * weights, 0.0))


def _of(batch: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The arrays of a batch whose names begin with a prefix, without it."""
    return {name[len(prefix) :]: v for name, v in batch.items() if name.startswith(prefix)}
