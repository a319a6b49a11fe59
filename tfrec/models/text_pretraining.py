"""TextPretrainer: the BERT learns the words of a catalog, and which texts belong together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.config import PretrainConfig
from tfrec.data.interactions import Interactions
from tfrec.data.sequences import Arrays
from tfrec.errors import ConfigError
from tfrec.models.batches import endless
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.objectives import info_nce
from tfrec.models.step import TaskModel
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import recompute

Tokens = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Token ids and padding mask, each int32 (texts, tokens)."""

Rows = NDArray[np.integer]

Pairs = Callable[[int, np.random.Generator], tuple[Rows, Rows]]
"""Draws so many pairs: rows of the first texts, and rows of the second ones."""

_MASKED, _REPLACED = 0.8, 0.1  # of the hidden tokens, as in BERT; the rest is shown as it is


class TextPretrainer(TaskModel):
    """A TextEncoder trained by the text objectives.

    - ``mlm``: hidden tokens from the others (BERT: Devlin et al. 2019, arXiv:1810.04805), on the
      texts of the catalog (domain adaptation: Gururangan et al. 2020, arXiv:2004.10964). The head
      is that of BERT, with the token embeddings as its last kernel, begins new and is not kept.
    - pairs of texts that belong together are nearer to each other than to the others of the batch
      (InfoNCE: van den Oord et al. 2018, arXiv:1807.03748).

    Args:
      encoder: What is trained; its trainable weights say how much of it.
      config: Weight of each objective, and the learning.
      pairs: Names of the objectives that pairs are drawn for.
      temperature: Divides the similarities of pairs.
    """

    row_key = "row"
    shared_keys = ("denominators",)

    def __init__(
        self,
        encoder: TextEncoder,
        config: PretrainConfig,
        pairs: tuple[str, ...],
        temperature: float = 0.05,
        **kwargs: Any,
    ) -> None:
        super().__init__(accumulate=config.accumulate, **kwargs)
        self.encoder, self.temperature, self.pairs = encoder, temperature, pairs
        if config.recompute:
            recompute(encoder)
        self.weights_of = {
            name: weight
            for name, weight in config.objectives.items()
            if weight and (name == "mlm" or name in pairs)
        }
        # At the start the head hands on the vectors of the tokens.
        self.transform = tf_keras.layers.Dense(
            encoder.model.hidden_dim,
            kernel_initializer="identity",
            name="transform",
            dtype="float32",
        )
        self.norm = tf_keras.layers.LayerNormalization(epsilon=1e-12, name="norm", dtype="float32")
        self.bias = self.add_weight(
            name="bias", shape=(encoder.model.vocabulary_size,), initializer="zeros"
        )
        self.part_means = {name: tf_keras.metrics.Mean(name=name) for name in self.weights_of}
        self.norm(self.transform(tf.zeros([1, 1, encoder.model.hidden_dim])))

    def compute_loss(self, inputs: Mapping[str, Any], training: bool = False) -> Any:
        """Weighted sum of the objectives, as a replica's share of the global batch's mean."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        total = tf.constant(0.0)
        for place, (name, weight) in enumerate(self.weights_of.items()):
            if name == "mlm":
                loss = self._masked(inputs, training)
            else:
                loss = self._paired(name, inputs, training)
            loss /= inputs["denominators"][place]
            self.part_means[name].update_state(loss * replicas * self.accumulate)
            total += weight * loss
        return total

    def _masked(self, inputs: Mapping[str, Any], training: bool) -> Any:
        hidden = self.encoder.hidden(inputs["mlm_token_ids"], inputs["mlm_padding_mask"], training)
        told = tf.gather(hidden, inputs["mlm_place"], batch_dims=1)
        told = self.norm(tf.nn.gelu(self.transform(told)))
        table = tf.cast(self.encoder.model.token_embedding.embeddings.value, told.dtype)
        logits = tf.matmul(told, table, transpose_b=True) + self.bias
        each = tf.nn.sparse_softmax_cross_entropy_with_logits(inputs["mlm_target"], logits)
        return tf.reduce_sum(each * inputs["mlm_weight"])

    def _paired(self, name: str, inputs: Mapping[str, Any], training: bool) -> Any:
        first, second = (
            tf.math.l2_normalize(
                self.encoder(
                    inputs[f"{name}_{side}_token_ids"],
                    inputs[f"{name}_{side}_padding_mask"],
                    training=training,
                ),
                axis=-1,
            )
            for side in ("first", "second")
        )
        return info_nce(first, second, inputs[f"{name}_weight"], self.temperature)


@dataclass(frozen=True, eq=False)
class TextBatches:
    """Batches of texts for a :class:`TextPretrainer`, the same for the same seed.

    An epoch has as many batches as show every text of the catalog once.

    Attributes:
      texts: Tokens of the catalog's texts.
      batch_size: Texts, and pairs of each objective, of a global batch.
      objectives: Those of the TextPretrainer, in its order.
      pairs: Objective -> what draws its pairs, tokens of the first texts and of the second ones.
      vocabulary: Size of the vocabulary.
      mask_token: What a hidden token is replaced by.
      special: Tokens that are never hidden.
      seed: Decides what is drawn.
      mask_rate: Share of the tokens that are hidden.
      replicas: Parts of a global batch.
    """

    texts: Tokens
    batch_size: int
    objectives: tuple[str, ...]
    pairs: Mapping[str, tuple[Pairs, Tokens, Tokens]]
    vocabulary: int
    mask_token: int
    special: tuple[int, ...]
    seed: int
    mask_rate: float = 0.15
    replicas: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.replicas:
            raise ConfigError(
                f"pretrain.text_batch_size = {self.batch_size} cannot be shared by "
                f"{self.replicas} replicas; take a multiple of {self.replicas}"
            )

    @cached_property
    def steps_per_epoch(self) -> int:
        """Batches that show every text of the catalog once."""
        return -(-len(self.texts[0]) // self.batch_size)

    def dataset(self, first_epoch: int = 0, worker: int = 0, workers: int = 1) -> tf.data.Dataset:
        """See :meth:`tfrec.models.batches.TrainingBatches.dataset`."""
        share = self.replicas // workers
        mine = range(worker * share, (worker + 1) * share)
        return endless(lambda epoch: self._parts(epoch, mine), first_epoch)

    def _parts(self, epoch: int, mine: range) -> Iterator[Arrays]:
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.texts[0]))
        size = self.batch_size // self.replicas
        for step in range(self.steps_per_epoch):
            generator = np.random.default_rng([self.seed, epoch, step])
            index = np.arange(step * self.batch_size, (step + 1) * self.batch_size) % len(order)
            whole: Arrays = {"row": np.arange(self.batch_size, dtype=np.int32)}
            for name in self.objectives:
                if name == "mlm":
                    whole |= self._masked(order[index], generator)
                else:
                    whole |= self._paired(name, generator)
            sums = [max(float(whole[f"{n}_weight"].sum()), 1e-6) for n in self.objectives]
            for replica in mine:
                part = {n: a[replica * size : (replica + 1) * size] for n, a in whole.items()}
                yield {**part, "denominators": np.array(sums, np.float32)}

    def _masked(self, rows: NDArray[np.integer], generator: np.random.Generator) -> Arrays:
        ids, mask = self.texts[0][rows], self.texts[1][rows]
        free = (mask > 0) & ~np.isin(ids, self.special)
        count = max(round(self.mask_rate * ids.shape[1]), 1)
        draw = np.where(free, generator.random(ids.shape), 2.0)
        place = np.argsort(draw, axis=1)[:, :count].astype(np.int32)
        there = free.sum(axis=1, keepdims=True)
        used = np.arange(count) < np.maximum(np.round(self.mask_rate * there), np.minimum(there, 1))
        target = np.take_along_axis(ids, place, axis=1)
        kind = generator.random(place.shape)
        other = generator.integers(0, self.vocabulary, place.shape, dtype=np.int32)
        shown = np.where(kind < _MASKED + _REPLACED, other, target)
        shown = np.where(kind < _MASKED, self.mask_token, shown)
        hidden = ids.copy()
        np.put_along_axis(hidden, place, np.where(used, shown, target), axis=1)
        return {
            "mlm_token_ids": hidden,
            "mlm_padding_mask": mask,
            "mlm_place": place,
            "mlm_target": target,
            "mlm_weight": used.astype(np.float32),
        }

    def _paired(self, name: str, generator: np.random.Generator) -> Arrays:
        draw, first, second = self.pairs[name]
        rows = draw(self.batch_size, generator)
        out: Arrays = {f"{name}_weight": _first_of_each(rows[1])}
        for side, tokens, chosen in (("first", first, rows[0]), ("second", second, rows[1])):
            out[f"{name}_{side}_token_ids"] = tokens[0][chosen]
            out[f"{name}_{side}_padding_mask"] = tokens[1][chosen]
        return out


def _first_of_each(targets: NDArray[np.integer]) -> NDArray[np.float32]:
    """1 for the first pair with a target: a second one would count it as a negative of its own."""
    weight = np.zeros(len(targets), np.float32)
    weight[np.unique(targets, return_index=True)[1]] = 1
    return weight


@dataclass(frozen=True, eq=False)
class KnownPairs:
    """Pairs (i, second[i]), drawn evenly."""

    second: Rows

    def __call__(self, count: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
        """Rows of the first and of the second texts."""
        first = generator.integers(0, len(self.second), count)
        return first, self.second[first]


@dataclass(frozen=True, eq=False)
class NeighbouringEvents:
    """Pairs of items that one user met with at most ``window`` events between.

    Attributes:
      interactions: The events; those of weight 0 are left out.
      told: Catalog rows that have a text.
      place: int (n + 1,), row of a catalog row's text among the texts.
      window: How far apart the two events may be.
    """

    interactions: Interactions
    told: Sequence[int]
    place: Rows
    window: int = 5

    def __call__(self, count: int, generator: np.random.Generator) -> tuple[Rows, Rows]:
        """Rows of the first and of the second texts; an event without a neighbour is its own."""
        item, user = self._events
        first = generator.integers(0, len(item), count)
        apart = generator.integers(1, self.window + 1, count) * generator.choice([-1, 1], count)
        second = np.clip(first + apart, 0, len(item) - 1)
        second = np.where(user[second] == user[first], second, first)
        return self.place[item[first]], self.place[item[second]]

    @cached_property
    def _events(self) -> tuple[Rows, Rows]:
        kept = np.isin(self.interactions.item, self.told) & (self.interactions.weight > 0)
        return self.interactions.item[kept], self.interactions.user[kept]
