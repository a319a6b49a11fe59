"""The two towers: what a candidate is, and what a query asks for."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from tfrec.data.sequences import GAP_BUCKETS, RATING_BUCKETS
from tfrec.models.behaviour import BehaviourEncoder
from tfrec.models.dropout import Dropout, keep_mask
from tfrec.models.keras_bridge import tf, tf_keras


def _small_normal() -> Any:
    return tf_keras.initializers.RandomNormal(stddev=0.02)


class CandidateTower(tf_keras.layers.Layer):
    """Text vector, attributes and, where there is one, the item's id -> candidate vector.

    In training the id embedding of a random share of the items is left out, so that text and
    attributes alone must do (Volkovs et al. 2017, "DropoutNet"); an item never seen in training
    has row 0, whose id embedding is zero.

    Args:
      embedding_dim: Width of the vectors, d.
      num_rows: Rows of the catalog the tower is trained on, the unknown item included.
      item_ids: Whether there are id embeddings at all.
      id_dropout: Share of items whose id is left out in a training step.
      text_dropout: Share of each text vector's numbers that is left out in a training step, so
        that no item is learned by heart from its text.
      text_hidden: Width of a hidden layer between the text vector and what it adds beside its
        linear part; 0: none.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_rows: int,
        item_ids: bool = True,
        id_dropout: float = 0.1,
        text_dropout: float = 0.0,
        text_hidden: int = 0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings = {
            "embedding_dim": embedding_dim,
            "num_rows": num_rows,
            "item_ids": item_ids,
            "id_dropout": id_dropout,
            "text_dropout": text_dropout,
            "text_hidden": text_hidden,
        }
        self.num_rows, self.id_dropout, self.width = num_rows, id_dropout, embedding_dim
        self.text = tf_keras.layers.Dense(
            embedding_dim, use_bias=False, kernel_initializer=_small_normal(), name="text"
        )
        self.text_dropout = Dropout(text_dropout)
        self.text_hidden: Any = None
        self.text_out: Any = None
        if text_hidden:
            # Without a bias, so that no text still adds nothing.
            self.text_hidden = tf_keras.layers.Dense(
                text_hidden, activation="gelu", use_bias=False, name="text_hidden"
            )
            self.text_out = tf_keras.layers.Dense(
                embedding_dim,
                use_bias=False,
                kernel_initializer=_small_normal(),
                name="text_out",
            )
        self.attributes = tf_keras.layers.Dense(
            embedding_dim, use_bias=False, kernel_initializer=_small_normal(), name="attributes"
        )
        self.ids = (
            self.add_weight(
                name="ids", shape=(num_rows, embedding_dim), initializer=_small_normal()
            )
            if item_ids
            else None
        )

    def call(
        self, text: Any, attributes: Any, rows: Any | None = None, training: bool | None = None
    ) -> Any:
        """Encodes candidates.

        Args:
          text: float (n, text width); zero columns where the catalog has no text.
          attributes: float (n, attribute width).
          rows: int32 (n,), catalog rows, 0 for items without an id embedding. None: the whole
            catalog in its order, which saves the look-up.
          training: Whether ids and parts of texts are dropped at random.

        Returns:
          float (n, embedding_dim).
        """
        vector = self.without_ids(text, attributes, training)
        if self.ids is None:
            return vector
        count = tf.shape(text)[0]
        table = tf.cast(self.ids, self.compute_dtype)
        known = tf.range(count) if rows is None else rows
        ids = table if rows is None else tf.gather(table, rows)
        keep = known > 0
        if training and self.id_dropout:
            keep = tf.logical_and(keep, keep_mask([count], self.id_dropout))
        return vector + ids * tf.cast(keep, ids.dtype)[:, None]

    def without_ids(self, text: Any, attributes: Any, training: bool | None = None) -> Any:
        """What text and attributes alone tell, as :meth:`call` reads them."""
        vector = tf.zeros([tf.shape(text)[0], self.width], self.compute_dtype)
        if text.shape[-1]:
            text = self.text_dropout(text, training=training)
            vector += self.text(text)
            if self.text_hidden is not None:
                vector += self.text_out(self.text_hidden(text))
        if attributes.shape[-1]:
            vector += self.attributes(attributes)
        return vector

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), **self.settings}


class QueryTower(tf_keras.layers.Layer):
    """A history of candidate vectors, with profile and context -> a query vector a place.

    It reads vectors and not ids, so an item added after training works in a history.

    Args:
      embedding_dim: Width of candidate and query vectors, d.
      length: Places of a row.
      num_events: Codes of event types, see :class:`~tfrec.data.sequences.EventCoding`.
      layers: Transformer blocks.
      heads: Attention heads.
      dropout: Share of activations dropped in training.
      events: Whether event types and ratings are read.
      time_gaps: Whether the time between events is read.
      request_time: Whether the time until the request is read.
      feed_forward: Width of the blocks' feed-forward layers, in ``embedding_dim``.
    """

    def __init__(
        self,
        embedding_dim: int,
        length: int,
        num_events: int,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.3,
        events: bool = True,
        time_gaps: bool = True,
        request_time: bool = False,
        feed_forward: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings = {
            "embedding_dim": embedding_dim,
            "length": length,
            "num_events": num_events,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
            "events": events,
            "time_gaps": time_gaps,
            "request_time": request_time,
            "feed_forward": feed_forward,
        }
        self.width = embedding_dim
        # Without event types a start token and an event are still told apart, by codes 0 and 1.
        inputs = {"position": length, "event": num_events if events else 2}
        if events:
            inputs["rating"] = RATING_BUCKETS
        if time_gaps:
            inputs["gap"] = GAP_BUCKETS
        if request_time:
            inputs["next_gap"] = GAP_BUCKETS
        # No plain dict: Keras would track its variables apart, and train them though frozen.
        self.tables = MappingProxyType(
            {
                name: self.add_weight(
                    name=name, shape=(size, embedding_dim), initializer=_small_normal()
                )
                for name, size in inputs.items()
            }
        )
        self.profile = tf_keras.layers.Dense(
            embedding_dim, use_bias=False, kernel_initializer=_small_normal(), name="profile"
        )
        self.attributes = tf_keras.layers.Dense(
            embedding_dim, use_bias=False, kernel_initializer=_small_normal(), name="attributes"
        )
        self.dropout = Dropout(dropout)
        self.encoder = BehaviourEncoder(
            embedding_dim,
            length,
            layers=layers,
            heads=heads,
            dropout=dropout,
            feed_forward=feed_forward,
            name="encoder",
        )

    def call(
        self,
        vectors: Any,
        batch: Mapping[str, Any],
        profile: Any,
        attributes: Any,
        training: bool | None = None,
        causal: bool = True,
        last: Any | None = None,
    ) -> Any:
        """Encodes every place of every row.

        Args:
          vectors: float (batch, length, embedding_dim), candidate vectors of the history.
          batch: The int32 (batch, length) arrays of :func:`~tfrec.data.sequences.query_arrays`.
          profile: float (batch, s, text width), vector of the profile text of the users of
            segments 1, 2, … s.
          attributes: float (batch, s, attribute width) of the same users.
          training: Whether dropout is on.
          causal: Whether a place sees only itself and what came before.
          last: int32 (batch,), the only place of each row that is asked for; None: all.

        Returns:
          float (batch, length, embedding_dim), or (batch, 1, embedding_dim) of ``last``.
        """
        hidden = vectors * tf.cast(self.width**0.5, vectors.dtype)
        for name, table in self.tables.items():
            codes = tf.minimum(batch[name], table.shape[0] - 1)
            hidden += tf.cast(tf.gather(table, codes), hidden.dtype)
        for given, layer in ((profile, self.profile), (attributes, self.attributes)):
            if given.shape[-1]:
                hidden += _at_places(layer(given), batch["segment"])
        hidden = self.dropout(hidden, training=training)
        return self.encoder(hidden, batch["segment"], training=training, causal=causal, last=last)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), **self.settings}


def _at_places(users: Any, segment: Any) -> Any:
    """(batch, s, d) of a row's users -> (batch, length, d), each place its own user's."""
    if users.shape[1] == 1:
        return users
    return tf.gather(users, tf.maximum(segment - 1, 0), batch_dims=1)
