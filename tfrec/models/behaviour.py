"""BehaviourEncoder: a user's event sequence -> one vector for each place."""

from __future__ import annotations

from typing import Any

from tfrec.errors import ConfigError
from tfrec.models.dropout import Dropout
from tfrec.models.keras_bridge import tf, tf_keras


class BehaviourEncoder(tf_keras.layers.Layer):
    """Pre-norm transformer over packed sequences.

    Self-attention as in SASRec (Kang & McAuley 2018, "Self-Attentive Sequential Recommendation")
    with a learned bias for each distance and head (Raffel et al. 2020, "T5") and GELU feed-forward
    layers. Places of different segments of a row do not see each other, and segment 0 is padding.

    Args:
      width: Width of the sequence, d.
      length: Places of the longest row.
      layers: Transformer blocks.
      heads: Attention heads; must divide ``width``.
      dropout: Share of activations dropped in training.
      feed_forward: Width of the feed-forward layers, in widths of the sequence.
    """

    def __init__(
        self,
        width: int,
        length: int,
        layers: int = 2,
        heads: int = 2,
        dropout: float = 0.3,
        feed_forward: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if width % heads:
            raise ConfigError(f"heads = {heads} must divide the width {width} (embedding_dim)")
        self.settings = {
            "width": width,
            "length": length,
            "layers": layers,
            "heads": heads,
            "dropout": dropout,
            "feed_forward": feed_forward,
        }
        self.blocks = [
            TransformerBlock(width, length, heads, dropout, feed_forward, name=f"block_{i}")
            for i in range(layers)
        ]
        self.norm = tf_keras.layers.LayerNormalization(epsilon=1e-6, name="norm")

    def call(
        self,
        inputs: Any,
        segment: Any,
        training: bool | None = None,
        causal: bool = True,
        last: Any | None = None,
    ) -> Any:
        """Encodes rows of places.

        Args:
          inputs: float (batch, length, width).
          segment: int32 (batch, length); places with equal segment above 0 see each other.
          training: Whether dropout is on.
          causal: Whether a place sees only itself and what came before; the weights are the same
            either way.
          last: int32 (batch,), the only place of each row that is asked for. The last block
            then computes no other, which saves about a third of two blocks.

        Returns:
          float (batch, length, width), normalised; padding places hold nothing of use. With
          ``last`` (batch, 1, width).
        """
        mask = attention_mask(segment, causal)
        # Places of all rows one below another: products of matrices are what every runtime,
        # LiteRT above all, is fastest at.
        hidden = tf.reshape(inputs, [-1, self.settings["width"]])
        for block in self.blocks[:-1]:
            hidden = block(hidden, mask=mask, training=training)
        hidden = self.norm(self.blocks[-1](hidden, mask=mask, training=training, last=last))
        rows, length = tf.shape(segment)[0], tf.shape(segment)[1] if last is None else 1
        return tf.reshape(hidden, [rows, length, self.settings["width"]])

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), **self.settings}


def attention_mask(segment: Any, causal: bool) -> Any:
    """bool (batch, length, length): whether the place of axis 1 sees the place of axis 2."""
    same = tf.equal(tf.expand_dims(segment, 2), tf.expand_dims(segment, 1))
    if not causal:
        return same
    places = tf.range(tf.shape(segment)[1])
    return tf.logical_and(same, places[None, :, None] >= places[None, None, :])


class TransformerBlock(tf_keras.layers.Layer):
    """Pre-norm self-attention and feed-forward, each with a residual connection.

    Attributes:
      attention_adapter: A layer that what attention gives goes through, or None; these three are
        for :mod:`tfrec.models.tuning`.
      feed_adapter: The same after the feed-forward layers.
      prefix: A layer that maps the queries, float (batch, heads, length, width / heads), to what
        is added to the heads' outputs, or None.
    """

    def __init__(
        self,
        width: int,
        length: int,
        heads: int,
        dropout: float,
        feed_forward: int = 4,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.width, self.heads, self.rate = width, heads, dropout
        self.attention_norm = tf_keras.layers.LayerNormalization(epsilon=1e-6)
        self.qkv = tf_keras.layers.Dense(3 * width, name="qkv")
        self.project = tf_keras.layers.Dense(width, name="project")
        self.feed_norm = tf_keras.layers.LayerNormalization(epsilon=1e-6)
        self.expand = tf_keras.layers.Dense(feed_forward * width, name="expand")
        self.contract = tf_keras.layers.Dense(width, name="contract")
        self.dropout = Dropout(dropout)
        self.bias = self.add_weight(name="bias", shape=(heads, length), initializer="zeros")
        self.attention_adapter: Any = None
        self.feed_adapter: Any = None
        self.prefix: Any = None

    def call(
        self, inputs: Any, mask: Any, training: bool | None = None, last: Any | None = None
    ) -> Any:
        """float (batch * length, width) and bool (batch, length, length) -> (batch * length,
        width), or (batch, width) of the places ``last``, int32 (batch,)."""
        attended = self._attend(self.attention_norm(inputs), mask, training, last)
        if last is not None:
            rows, length = tf.shape(mask)[0], tf.shape(mask)[1]
            inputs = tf.gather(inputs, tf.range(rows) * length + last)
        hidden = inputs + self._branch(attended, self.attention_adapter, training)
        # The tanh form of GELU: the erf form costs twice the time on a CPU.
        fed = tf.nn.gelu(self.expand(self.feed_norm(hidden)), approximate=True)
        return hidden + self._branch(self.contract(fed), self.feed_adapter, training)

    def _branch(self, values: Any, adapter: Any, training: bool | None) -> Any:
        values = self.dropout(values, training=training)
        return values if adapter is None else adapter(values)

    def _attend(self, inputs: Any, mask: Any, training: bool | None, last: Any | None) -> Any:
        length = tf.shape(mask)[1]
        size = self.width // self.heads
        split = tf.reshape(self.qkv(inputs), [-1, length, 3, self.heads, size])
        query, key, value = tf.unstack(tf.transpose(split, [2, 0, 3, 1, 4]))
        places = tf.range(length)
        if last is None:
            distance = tf.abs(places[:, None] - places[None, :])
            bias = tf.gather(self.bias, distance, axis=1)
        else:
            of_heads = tf.tile(tf.expand_dims(last, 1), [1, self.heads])
            query = tf.expand_dims(tf.gather(query, of_heads, batch_dims=2), 2)
            mask = tf.expand_dims(tf.gather(mask, last, batch_dims=1), 1)
            distance = tf.abs(tf.expand_dims(last, 1) - tf.expand_dims(places, 0))
            bias = tf.transpose(tf.gather(self.bias, distance, axis=1), [1, 0, 2])
            bias = tf.expand_dims(bias, 2)
        scores = tf.matmul(query, key, transpose_b=True) * float(size) ** -0.5
        scores += tf.cast(bias, scores.dtype)
        low = tf.constant(-1e4 if scores.dtype == tf.float16 else -1e9, scores.dtype)
        weights = tf.nn.softmax(tf.where(tf.expand_dims(mask, 1), scores, low))
        weights = self.dropout(weights, training=training)
        mixed = tf.matmul(weights, value)
        if self.prefix is not None:
            mixed += self.prefix(query)
        mixed = tf.transpose(mixed, [0, 2, 1, 3])
        return self.project(tf.reshape(mixed, [-1, self.width]))
