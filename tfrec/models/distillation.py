"""Distillation: a model that is made smaller learns to answer as it did before.

The teacher is the model as it was trained, and what it is asked are real inputs; no labels are
needed (Hinton et al. 2015, arXiv:1503.02531). Vectors are taught by their direction and by which
others of the batch they are near to (Park et al. 2019, "Relational Knowledge Distillation",
arXiv:1904.05068), and token by token (Sun et al. 2020, "MobileBERT", arXiv:2004.02984).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.data.sequences import Arrays
from tfrec.data.tokens import padded
from tfrec.errors import InputError
from tfrec.models.batches import endless
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.pruning import Pruner
from tfrec.models.step import TaskModel
from tfrec.models.text import TextEncoder

Loss = Callable[[Mapping[str, Any], bool], Mapping[str, Any]]

_TEMPERATURE = 0.05  # of the softmax over the others of a batch
_BUCKETS = (16, 32, 64, 128, 256, 512)  # tokens that the texts of a batch are padded to
_PIECE = 64  # tokens of a piece of a text, at most


class Distiller(TaskModel):
    """A model in training, its loss being how far its answers are from another's.

    Args:
      student: The model; all of its trainable weights move.
      losses: (inputs of a batch, whether dropout is on) -> the mean of each part of the loss over
        the rows of this replica.
      parts: Names of the parts.
      pruner: Masks that are kept up to date, or None.
    """

    def __init__(
        self, student: Any, losses: Loss, parts: Sequence[str], pruner: Pruner | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.student, self.pruner, self._losses = student, pruner, losses
        self.part_means = {name: tf_keras.metrics.Mean(name=name) for name in parts}

    def compute_loss(self, inputs: Mapping[str, Any], training: bool = False) -> Any:
        """Sum of the parts, as a replica's share of the global batch's mean."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        found = self._losses(inputs, training)
        for name, value in found.items():
            self.part_means[name].update_state(value)
        return tf.add_n(list(found.values())) / replicas

    def train_step(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One update of the weights, and of the masks where that is due."""
        found = super().train_step(inputs)
        if self.pruner is not None:
            found["loss"] = self.pruner(found["loss"])
        return found


def of_texts(student: TextEncoder, teacher: TextEncoder) -> tuple[Loss, tuple[str, ...]]:
    """The losses of a text encoder, for batches of :class:`Texts`, and their names.

    Args:
      student: What learns.
      teacher: What answers; its weights do not move. Its vectors are as wide.
    """

    def losses(inputs: Mapping[str, Any], training: bool) -> Mapping[str, Any]:
        ids, mask = inputs["token_ids"], inputs["padding_mask"]
        own, own_mask = (inputs.get(f"own_{n}", inputs[n]) for n in ("token_ids", "padding_mask"))
        asked = tf.stop_gradient(teacher.hidden(ids, mask))
        # Without dropout: a student that is near already would learn to do without parts of itself.
        answered = student.hidden(own, own_mask, False)
        near, order = directions(student.pooled(answered, own_mask), teacher.pooled(asked, mask))
        told, found = teacher.projected(asked), student.projected(answered)
        there = tf.cast(mask, found.dtype)[:, :, None]
        if "alike" in inputs:  # where one word is cut otherwise, the places after it are others
            there *= inputs["alike"][:, None, None]
        size = tf.reduce_sum(tf.square(told) * there)
        off = tf.reduce_sum(tf.square(found - told) * there)
        return {
            "direction": near,
            "neighbours": order,
            "tokens": tf.math.divide_no_nan(off, size),
        }

    return losses, ("direction", "neighbours", "tokens")


def of_vectors(answer: Callable[[Mapping[str, Any], bool], Any]) -> tuple[Loss, tuple[str, ...]]:
    """The losses of a model whose answers are vectors, to which the batch's ``told`` are given."""

    def losses(inputs: Mapping[str, Any], training: bool) -> Mapping[str, Any]:
        found, told = answer(inputs, training), inputs["told"]
        near, order = directions(found, told)
        size = tf.reduce_sum(tf.square(told))
        return {
            "direction": near,
            "neighbours": order,
            "length": tf.reduce_sum(tf.square(found - told)) / size,
        }

    return losses, ("direction", "neighbours", "length")


def of_values(answer: Callable[[Mapping[str, Any], bool], Any]) -> tuple[Loss, tuple[str, ...]]:
    """The loss of a model whose answers are numbers: their squared error, in units of ``scale``,
    how much what is ``told`` varies."""

    def losses(inputs: Mapping[str, Any], training: bool) -> Mapping[str, Any]:
        off = (answer(inputs, training) - inputs["told"]) / inputs["scale"]
        return {"values": tf.reduce_mean(tf.square(off))}

    return losses, ("values",)


def directions(found: Any, told: Any) -> tuple[Any, Any]:
    """How far vectors, float32 (b, d), point from others, and how far the order of the others of
    the batch around each is from theirs: the mean of 1 - cosine, and of the divergence."""
    found, told = tf.math.l2_normalize(found, -1), tf.math.l2_normalize(told, -1)
    near = tf.reduce_mean(1 - tf.reduce_sum(found * told, -1))
    out = tf.linalg.diag(tf.fill(tf.shape(found)[:1], -1e9))

    def others(vectors: Any) -> Any:
        return tf.matmul(vectors, vectors, transpose_b=True) / _TEMPERATURE + out

    wanted = tf.nn.softmax(others(told))
    apart = tf.nn.log_softmax(others(told)) - tf.nn.log_softmax(others(found))
    return near, tf.reduce_mean(tf.reduce_sum(wanted * apart, -1))


@dataclass(frozen=True, eq=False)
class Texts:
    """Batches of texts and of pieces of them, the same for the same seed.

    An epoch shows each text twice: whole, and a random piece of it. So a small catalog has more to
    tell, and there are many short texts in a batch to be told apart. The texts of a batch are of
    about one length, padded to a bucket: shapes are few.

    Attributes:
      rows: Token ids of each text, special ones included.
      tokens: Of a global batch, padding included.
      seed: Decides what is drawn.
      replicas: Parts of a global batch.
      length: Tokens of the longest text that the model reads; nothing is padded beyond.
      own: For each token the ids that the student reads in its place; empty: the same.

    Raises:
      InputError: there is no text.
    """

    rows: Sequence[Sequence[int]]
    tokens: int
    seed: int
    replicas: int = 1
    length: int = _BUCKETS[-1]
    own: Sequence[Sequence[int]] = ()

    def __post_init__(self) -> None:
        if not self.rows:
            raise InputError("there is no text to learn from")

    @cached_property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return sum(-(-len(rows) // self._size(length)) for length, rows in self._shown.items())

    def dataset(self, first_epoch: int = 0, worker: int = 0, workers: int = 1) -> Any:
        """See :meth:`tfrec.models.batches.TrainingBatches.dataset`."""
        share = self.replicas // workers
        mine = range(worker * share, (worker + 1) * share)
        return endless(lambda epoch: self._parts(epoch, mine), first_epoch, free=True)

    @cached_property
    def _shown(self) -> dict[int, NDArray[np.int64]]:
        """Bucket -> rows whose texts are shown whole in it, and below zero those of pieces."""
        rows = np.arange(1, len(self.rows) + 1)
        lengths = np.array([len(row) for row in self.rows])
        whole, piece = (
            np.minimum(_bucket(np.minimum(lengths, most)), self.length)
            for most in (_BUCKETS[-1], _PIECE)
        )
        return {
            size: np.concatenate([rows[whole == size], -rows[piece == size]])
            for size in sorted({*whole.tolist(), *piece.tolist()})
        }

    def _size(self, length: int) -> int:
        """Texts of a global batch."""
        return max(self.tokens // (length * self.replicas), 2) * self.replicas

    def _parts(self, epoch: int, mine: range) -> Iterator[Arrays]:
        random = np.random.default_rng([self.seed, epoch])
        batches: list[tuple[int, NDArray[np.int64]]] = []
        for length, shown in self._shown.items():
            size = self._size(length)
            filled = np.resize(random.permutation(shown), -(-len(shown) // size) * size)
            batches += [(length, part) for part in filled.reshape(-1, size)]
        for place in random.permutation(len(batches)):
            length, chosen = batches[place]
            whole = self._padded(chosen, length, random)
            size = len(chosen) // self.replicas
            for replica in mine:
                yield {n: a[replica * size : (replica + 1) * size] for n, a in whole.items()}

    def _padded(
        self, chosen: NDArray[np.int64], length: int, random: np.random.Generator
    ) -> Arrays:
        shown = [
            list(self.rows[abs(row) - 1])[:length] if row > 0 else self._piece(row, random)
            for row in chosen.tolist()
        ]
        ids, mask = padded(shown, length)
        arrays = {"token_ids": ids, "padding_mask": mask}
        if self.own:
            own = [self._own(text, length) for text in shown]
            alike = [all(len(self.own[token]) == 1 for token in text) for text in shown]
            ids, mask = padded(own, length)
            arrays |= {"own_token_ids": ids, "own_padding_mask": mask}
            arrays["alike"] = np.array(alike, np.float32)
        return arrays

    def _own(self, text: Sequence[int], length: int) -> list[int]:
        """A text as the student reads it, its closing token included."""
        *read, last = (piece for token in text for piece in self.own[token])
        return [*read[: length - 1], last]

    def _piece(self, row: int, random: np.random.Generator) -> list[int]:
        first, *inner, last = self.rows[-row - 1]
        if not inner:
            return [first, last]
        start = int(random.integers(len(inner)))
        long = int(random.integers(1, min(_PIECE, self.length) - 1))
        return [first, *inner[start : start + long], last]


def _bucket(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.array(_BUCKETS)[np.searchsorted(_BUCKETS, lengths)]


@dataclass(frozen=True, eq=False)
class Examples:
    """Batches of rows of arrays, the same for the same seed.

    Attributes:
      arrays: Name -> array whose first axis are the n rows.
      batch_size: Rows of a global batch.
      seed: Decides the order.
      replicas: Parts of a global batch.

    Raises:
      InputError: there is no row.
    """

    arrays: Mapping[str, NDArray[Any]]
    batch_size: int
    seed: int
    replicas: int = 1

    def __post_init__(self) -> None:
        if not self._count:
            raise InputError("there is no example to learn from")

    @property
    def _count(self) -> int:
        return len(next(iter(self.arrays.values())))

    @property
    def _size(self) -> int:
        return max(min(self.batch_size, self._count) // self.replicas, 1) * self.replicas

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch."""
        return -(-self._count // self._size)

    def dataset(self, first_epoch: int = 0, worker: int = 0, workers: int = 1) -> Any:
        """See :meth:`tfrec.models.batches.TrainingBatches.dataset`."""
        share = self.replicas // workers
        mine = range(worker * share, (worker + 1) * share)
        return endless(lambda epoch: self._parts(epoch, mine), first_epoch)

    def _parts(self, epoch: int, mine: range) -> Iterator[Arrays]:
        order = np.random.default_rng([self.seed, epoch]).permutation(self._count)
        size = self._size // self.replicas
        for chosen in np.resize(order, (self.steps_per_epoch, self._size)):
            for replica in mine:
                rows = chosen[replica * size : (replica + 1) * size]
                yield {name: array[rows] for name, array in self.arrays.items()}
