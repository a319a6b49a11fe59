"""TwoTower: a query tower and a candidate tower trained to meet, as a tfrs.Model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.config import RetrievalConfig
from tfrec.data.sequences import EventCoding, Histories, query_arrays, query_inputs
from tfrec.errors import ConfigError
from tfrec.models.keras_bridge import full_precision, tf, tfrs
from tfrec.models.losses import across_replicas, full_softmax_loss
from tfrec.models.step import TaskModel
from tfrec.models.towers import CandidateTower, QueryTower
from tfrec.rows import Vectors

FULL_SOFTMAX_LIMIT = 50_000

_OUT = -1e9  # added to a logit; not -inf, as the weightless places have row 0 for their target


class TwoTower(TaskModel):
    """Retrieval model of a catalog.

    ``compile``, ``fit`` and ``save_weights`` are Keras'; batches come from
    :class:`~tfrec.models.batches.TrainingBatches`.

    Args:
      config: Sizes and the loss.
      text: float32 (n + 1, text width), vectors of the catalog's texts, row 0 the unknown item;
        width 0 where there is no text.
      attributes: float32 (n + 1, attribute width) of the catalog.
      coding: How events become integers.
      profile_width: Width of the users' profile vectors; 0: none.
      user_attributes_width: Width of the users' attributes; 0: none.
      popularity: float32 (n + 1,), share of the training events, for the logQ correction.
      encoder: A TextEncoder that is trained with the towers, or None: the text is frozen.
    """

    def __init__(
        self,
        config: RetrievalConfig,
        text: NDArray[np.float32],
        attributes: NDArray[np.float32],
        coding: EventCoding | None = None,
        profile_width: int = 0,
        user_attributes_width: int = 0,
        popularity: NDArray[np.float32] | None = None,
        encoder: Any | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(accumulate=config.accumulate, **kwargs)
        self.config = config
        self.coding = coding or EventCoding()
        rows = len(text)
        self.full_softmax = uses_full_softmax(config, rows - 1, encoder is not None)
        self.query_tower = QueryTower(
            config.embedding_dim,
            config.history,
            self.coding.num_events,
            layers=config.layers,
            heads=config.heads,
            feed_forward=config.feed_forward,
            dropout=config.dropout,
            events=config.events,
            time_gaps=config.time_gaps,
            request_time=config.request_time,
            name="query_tower",
        )
        self.candidate_tower = CandidateTower(
            config.embedding_dim,
            rows,
            config.item_ids,
            config.id_dropout,
            config.text_dropout,
            config.text_hidden,
            name="candidate_tower",
        )
        self.encoder = encoder
        self.widths = (profile_width, user_attributes_width)
        self._text, self._attributes = tf.constant(text), tf.constant(attributes)
        self.has_text = bool(np.any(text)) or encoder is not None
        self._has_text = tf.constant(np.any(text, axis=1, keepdims=True).astype(np.float32))
        even = np.full(rows, 1 / max(rows - 1, 1), np.float32)
        self._popularity = tf.constant(even if popularity is None else popularity)
        self._shift = tf.Variable(tf.zeros([rows]), trainable=False, name="shift")
        self.learn_from(np.arange(rows) > 0)
        with full_precision():
            self.task = tfrs.tasks.Retrieval(
                temperature=config.temperature,
                remove_accidental_hits=True,
                num_hard_negatives=config.hard_negatives or None,
            )
        self._touch()

    shared_keys = ("denominator", "items", "negatives", "token_ids", "padding_mask")

    def learn_from(self, known: NDArray[np.bool_]) -> None:
        """Says which items the training events are of; the others are not negatives.

        An item that no training event is of would be pushed away by every query, and with it
        whatever reads or looks like it: the items that have to do without events.

        Args:
          known: bool (n + 1,), True for catalog rows with a training event.
        """
        self._shift.assign(np.where(known, 0, _OUT).astype(np.float32))

    @property
    def shift(self) -> Any:
        """float32 (n + 1,), added to the logits in training: see :meth:`learn_from`."""
        return self._shift

    def compute_loss(self, inputs: Mapping[str, Any], training: bool = False) -> Any:
        """Loss of one replica's part, so scaled that the sum over replicas is the batch's mean."""
        vectors = self.candidates(inputs, training)
        hidden = self.query_tower(
            tf.gather(vectors, inputs["item"]),
            inputs,
            inputs["profile"],
            inputs["attributes"],
            training=training,
        )
        total = (self._full if self.full_softmax else self._sampled)(hidden, vectors, inputs)
        return total / inputs["denominator"][0]

    def candidates(self, inputs: Mapping[str, Any], training: bool, ids: bool = True) -> Any:
        """Candidate vectors of a training batch.

        Args:
          inputs: ``items``, int32 (n,), distinct rows of the catalog, if it is not the whole one;
            ``token_ids`` and ``padding_mask`` of their texts where the BERT is trained.
          training: Whether dropout is on.
          ids: Whether the id embeddings are used.

        Returns:
          float (n, d).
        """
        if "items" not in inputs:
            rows = None if ids else tf.zeros([self._text.shape[0]], tf.int32)
            return self.candidate_tower(self._text, self._attributes, rows, training=training)
        rows = inputs["items"]
        attributes = tf.gather(self._attributes, rows)
        if self.encoder is None:
            text = tf.gather(self._text, rows)
        else:
            text = self.encoder(inputs["token_ids"], inputs["padding_mask"], training=training)
            text *= tf.cast(tf.gather(self._has_text, rows), text.dtype)
        rows = rows if ids else tf.zeros_like(rows)
        return self.candidate_tower(text, attributes, rows, training=training)

    def _full(self, hidden: Any, vectors: Any, inputs: Mapping[str, Any]) -> Any:
        width = hidden.shape[-1]
        queries = tf.reshape(hidden, [hidden.shape[0] * hidden.shape[1], width])
        return full_softmax_loss(
            queries / self.config.temperature,
            vectors,
            tf.reshape(inputs["target"], [-1]),
            tf.reshape(inputs["weight"], [-1]),
            shift=self._shift,
        )

    def _sampled(self, hidden: Any, vectors: Any, inputs: Mapping[str, Any]) -> Any:
        queries = tf.gather(hidden, inputs["place"], batch_dims=1)
        queries = tf.reshape(queries, [-1, queries.shape[-1]])
        targets = tf.reshape(inputs["target"], [-1])
        ids = tf.reshape(inputs["target_id"], [-1])
        weights = tf.reshape(inputs["weight"], [-1])
        uniform = 1.0 / tf.reduce_sum(tf.cast(tf.equal(self._shift, 0.0), tf.float32))
        negative_ids = tf.gather(inputs["items"], inputs["negatives"])
        candidates = _joined(tf.gather(vectors, targets), tf.gather(vectors, inputs["negatives"]))
        candidate_ids = _joined(ids, negative_ids)
        probability = _joined(
            tf.where(weights > 0, tf.gather(self._popularity, ids), uniform),
            tf.fill(tf.shape(negative_ids), uniform),
        )
        # The task makes layers of its own when it is called. What replicas wait for each other in
        # is done before: the precision is one for all of them, and each would set it back.
        with full_precision():
            return self.task(
                query_embeddings=tf.cast(queries, tf.float32),
                candidate_embeddings=candidates,
                candidate_ids=candidate_ids,
                candidate_sampling_probability=probability,
                sample_weight=weights,
                compute_metrics=False,
                compute_batch_metrics=False,
            )

    def _touch(self) -> None:
        """Builds every weight, so that checkpoints and optimizers know them all."""
        arrays = query_arrays(no_history(), self.config.history)
        batch = {name: tf.constant(values) for name, values in arrays.items()}
        if self.encoder is not None:
            self.encoder(tf.zeros([1, 4], tf.int32), tf.ones([1, 4], tf.int32))
        vectors = self.candidate_tower(
            self._text[:1], self._attributes[:1], tf.zeros([1], tf.int32)
        )
        profile, attributes = (tf.zeros([1, 1, width]) for width in self.widths)
        self.query_tower(tf.gather(vectors, batch["item"]), batch, profile, attributes)

    def call(self, inputs: Mapping[str, Any], training: bool = False) -> Any:
        """Query vectors of a batch of :func:`~tfrec.data.sequences.query_arrays`.

        Args:
          inputs: Those arrays and float32 ``vectors`` (batch, length, d), ``profile`` (batch, 1,
            text width), ``attributes`` (batch, 1, attribute width).
          training: Whether dropout is on.

        Returns:
          float32 (batch, d).
        """
        hidden = self.query_tower(
            inputs["vectors"],
            inputs,
            inputs["profile"],
            inputs["attributes"],
            training=training,
            last=inputs["last"],
        )
        return tf.cast(hidden[:, 0], tf.float32) / self.config.temperature

    def encode_candidate(
        self,
        text: NDArray[np.float32],
        attributes: NDArray[np.float32],
        rows: NDArray[np.int32],
    ) -> NDArray[np.float32]:
        """Candidate vectors; row 0 for an item that has no id embedding.

        Args:
          text: float32 (n, text width).
          attributes: float32 (n, attribute width).
          rows: int32 (n,).

        Returns:
          float32 (n, d).
        """
        known = np.where(rows < self.candidate_tower.num_rows, rows, 0).astype(np.int32)
        blocks = [
            self._encode_candidates(
                tf.constant(text[i : i + 8192]),
                tf.constant(attributes[i : i + 8192]),
                tf.constant(known[i : i + 8192]),
            ).numpy()
            for i in range(0, len(rows), 8192)
        ]
        width = self.config.embedding_dim
        return np.concatenate([*blocks, np.zeros((0, width), np.float32)])

    @tf.function(reduce_retracing=True)
    def _encode_candidates(self, text: Any, attributes: Any, rows: Any) -> Any:
        return tf.cast(self.candidate_tower(text, attributes, rows), tf.float32)

    def encode_query(
        self,
        histories: Histories,
        vectors: Vectors,
        profile: NDArray[np.float32],
        attributes: NDArray[np.float32],
        request_time: NDArray[np.int64] | None = None,
        batch_size: int = 256,
    ) -> NDArray[np.float32]:
        """Query vectors of users.

        Args:
          histories: Their events; ``item`` are rows of ``vectors``.
          vectors: float32 (catalog rows, d), candidate vectors.
          profile: float32 (users, text width).
          attributes: float32 (users, attribute width).
          request_time: int64 (users,), seconds, for a model that reads it.
          batch_size: Users at once; a shorter batch is padded to a power of two.

        Returns:
          float32 (users, d).
        """
        out = np.zeros((len(histories), self.config.embedding_dim), np.float32)
        for start in range(0, len(histories), batch_size):
            index = np.arange(start, min(start + batch_size, len(histories)))
            size = min(batch_size, 1 << (len(index) - 1).bit_length())
            padded = np.concatenate([index, np.repeat(index[-1:], size - len(index))])
            times = None if request_time is None else request_time[padded]
            arrays = query_inputs(
                histories.take(padded),
                self.config.history,
                vectors,
                profile[padded],
                attributes[padded],
                times,
            )
            batch = {name: tf.constant(values) for name, values in arrays.items()}
            out[index] = self._encode_queries(batch).numpy()[: len(index)]
        return out

    @tf.function
    def _encode_queries(self, batch: Mapping[str, Any]) -> Any:
        return self(batch, training=False)


def uses_full_softmax(config: RetrievalConfig, num_items: int, text_is_trained: bool) -> bool:
    """Whether the loss is the exact softmax over the whole catalog.

    Raises:
      ConfigError: that is asked for while the texts are read anew in every step.
    """
    if text_is_trained and config.loss == "full_softmax":
        raise ConfigError(
            "adapt.retrieval.loss = 'full_softmax' reads the vectors of all texts as they were, so "
            "adapt.tuning.text must be 'head'; or set adapt.retrieval.loss=sampled"
        )
    if config.loss != "auto":
        return config.loss == "full_softmax"
    return not text_is_trained and num_items <= FULL_SOFTMAX_LIMIT


def _joined(positives: Any, negatives: Any) -> Any:
    """This replica's positives first, then its own and the other replicas' further candidates."""
    own = tf.concat([positives, negatives], axis=0)
    return across_replicas(tf.cast(own, tf.float32) if own.dtype.is_floating else own)


def no_history() -> Histories:
    """The history of one user who has none."""
    empty = np.zeros(0, np.int32)
    return Histories(np.zeros(2, np.int64), empty, empty, empty, np.zeros(0, np.int64))
