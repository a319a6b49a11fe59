"""Training rows -> tf.data, in batches of fixed shape.

A global batch is cut into one part for each replica, and each part is complete in itself: its own
distinct items, its own share of the negatives. So nothing has to be cut apart afterwards, and one
device with the whole batch sees the same queries and negatives as many devices with its parts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from tfrec.data.sequences import Arrays, PackedSequences
from tfrec.errors import ConfigError, InputError
from tfrec.models.keras_bridge import tf

if TYPE_CHECKING:
    from tfrec.models.objectives import Objective


@dataclass(frozen=True, eq=False)
class SampledItems:
    """What the sampled loss and the end-to-end trained BERT need in a batch.

    Attributes:
      positions: Places of each row that are trained in a step.
      negatives: Uniform negatives of a global batch.
      num_items: Items of the catalog, the unknown one not counted.
      known: int32 (k,), catalog rows that negatives are drawn from: those with training events.
        None: all.
      tokens: int32 (num_items + 1, tokens) of every item's text, or None where text is frozen.
      token_mask: int32, same shape, 1 where there is a token.
    """

    positions: int
    negatives: int
    num_items: int
    tokens: NDArray[np.int32] | None = None
    token_mask: NDArray[np.int32] | None = None
    known: NDArray[np.int32] | None = None


@dataclass(frozen=True, eq=False)
class TrainingBatches:
    """Batches over packed sequences, epoch after epoch, the same for the same seed.

    Attributes:
      sequences: The rows.
      batch_size: Rows of a global batch.
      profile: float32 (users, text width), vectors of the users' profile texts; width 0: none.
      attributes: float32 (users, attribute width); width 0: none.
      sampled: Given for the sampled loss, None for the full softmax.
      replicas: Parts of a global batch.
      objectives: Of pretraining, by name; empty: the batches are those of a TwoTower.
      user_dropout: Share of users whose profile and attributes are left out in a step.
    """

    sequences: PackedSequences
    batch_size: int
    profile: NDArray[np.float32]
    attributes: NDArray[np.float32]
    sampled: SampledItems | None = None
    replicas: int = 1
    objectives: Mapping[str, Objective] = field(default_factory=dict)
    user_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.batch_size % self.replicas:
            raise ConfigError(
                f"batch_size = {self.batch_size} cannot be shared by {self.replicas} replicas; "
                f"take a multiple of {self.replicas}"
            )
        if not (np.diff(self.sequences.histories.offsets) > 0).any():
            raise InputError("there is no event to train on")

    @cached_property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch: what the first epoch fills, at least one."""
        rows = len(self.sequences.epoch(0)["item"])
        return max(rows // self.batch_size, 1)

    def dataset(self, first_epoch: int = 0, worker: int = 0, workers: int = 1) -> tf.data.Dataset:
        """An endless dataset that starts with the given epoch.

        Args:
          first_epoch: 0-based; a resumed training starts where it stopped.
          worker: Which of the workers asks.
          workers: How many workers share the parts of a batch.

        Returns:
          Dictionaries of arrays; with several replicas one element a part, in their order.
        """
        share = self.replicas // workers
        mine = range(worker * share, (worker + 1) * share)
        return endless(lambda epoch: self._parts(epoch, mine), first_epoch)

    def _parts(self, epoch: int, mine: range) -> Iterator[Arrays]:
        rows = self.sequences.epoch(epoch)
        count, steps = len(rows["item"]), self.steps_per_epoch
        for step in range(steps):
            generator = np.random.default_rng([self.sequences.seed, epoch, step])
            index = np.arange(step * self.batch_size, (step + 1) * self.batch_size) % count
            whole = {name: values[index] for name, values in rows.items()}
            if count < self.batch_size:
                whole["weight"][count:] = 0
            self._add_users(whole, generator)
            cut = self._cut_for_objectives if self.objectives else self._cut
            yield from cut(whole, generator, mine)

    def _add_users(self, batch: Arrays, generator: np.random.Generator) -> None:
        user = batch["user"]
        known = (user >= 0) & (generator.random(user.shape) >= self.user_dropout)
        for name, table in (("profile", self.profile), ("attributes", self.attributes)):
            batch[name] = table[user] * known[:, :, None].astype(np.float32)

    def _cut(self, whole: Arrays, generator: np.random.Generator, mine: range) -> Iterator[Arrays]:
        del whole["user"]
        negatives = np.zeros(0, np.int32)
        if self.sampled is not None:
            _choose_positions(whole, self.sampled.positions, generator)
            negatives = self._items(self.sampled, self.sampled.negatives, generator)
            # A place that is not trained still lends its target to the others as a negative.
            drawn = self._items(self.sampled, whole["target"].shape, generator)
            whole["target"] = np.where(whole["weight"] > 0, whole["target"], drawn)
        total = np.float32(max(float(whole["weight"].sum()), 1e-6))
        size = self.batch_size // self.replicas
        for replica in mine:
            part = {name: a[replica * size : (replica + 1) * size] for name, a in whole.items()}
            part["denominator"] = np.array([total], np.float32)
            if self.sampled is not None:
                share = len(negatives) // self.replicas
                _add_items(part, negatives[replica * share :][:share], self.sampled)
            yield part

    def _cut_for_objectives(
        self, whole: Arrays, generator: np.random.Generator, mine: range
    ) -> Iterator[Arrays]:
        sums = []
        for name, objective in self.objectives.items():
            whole |= objective.arrays(whole, generator)
            sums.append(max(float(whole[f"{name}_weight"].sum()), 1e-6))
        del whole["user"]
        negatives = np.zeros(0, np.int32)
        if self.sampled is not None:
            negatives = self._items(self.sampled, self.sampled.negatives, generator)
        size, share = self.batch_size // self.replicas, len(negatives) // self.replicas
        for replica in mine:
            part = {name: a[replica * size : (replica + 1) * size] for name, a in whole.items()}
            if self.sampled is not None:
                _add_items(part, negatives[replica * share :][:share], self.sampled)
                part["shift"] = _shift(part, self.sampled)
                del part["negatives"], part["target_id"]
            part["denominators"] = np.array(sums, np.float32)
            yield part

    @staticmethod
    def _items(
        sampled: SampledItems, shape: int | tuple[int, ...], generator: np.random.Generator
    ) -> NDArray[np.int32]:
        if sampled.known is not None:
            return sampled.known[generator.integers(len(sampled.known), size=shape)]
        return generator.integers(1, sampled.num_items + 1, shape, dtype=np.int32)


def endless(
    parts: Callable[[int], Iterator[Arrays]], first_epoch: int = 0, free: bool = False
) -> tf.data.Dataset:
    """A dataset of the parts of one epoch after the other, all of the same shapes; of the same
    ranks alone if ``free``."""
    first = next(parts(first_epoch))
    spec = {
        name: tf.TensorSpec([None] * a.ndim if free else a.shape, tf.as_dtype(a.dtype))
        for name, a in first.items()
    }

    def all_epochs() -> Iterator[Arrays]:
        for epoch in itertools.count(first_epoch):
            yield from parts(epoch)

    return tf.data.Dataset.from_generator(all_epochs, output_signature=spec).prefetch(2)


def _choose_positions(batch: Arrays, count: int, generator: np.random.Generator) -> None:
    """Keeps ``count`` random targets of every row: ``place``, and target and weight there."""
    weight = batch["weight"]
    draw = generator.random(weight.shape) - (weight > 0)
    place = np.sort(np.argsort(draw, axis=1, kind="stable")[:, :count], axis=1)
    batch["place"] = place.astype(np.int32)
    batch["target"] = np.take_along_axis(batch["target"], place, axis=1)
    batch["weight"] = np.take_along_axis(weight, place, axis=1)


def _add_items(part: Arrays, negatives: NDArray[np.int32], sampled: SampledItems) -> None:
    """Replaces item rows by places in ``items``, the distinct items of the part."""
    part["target_id"], part["negatives"] = part["target"], negatives
    named = [name for name in part if name.endswith(("item", "target", "negatives"))]
    flat = np.concatenate([[0], *(part[name].ravel() for name in named)])
    room = min(len(flat), sampled.num_items + 1)
    distinct, inverse = np.unique(flat, return_inverse=True)
    items = np.zeros(room, np.int32)
    items[: len(distinct)] = distinct
    part["items"] = items
    ends = np.cumsum([part[name].size for name in named])[:-1]
    for name, places in zip(named, np.split(inverse[1:].astype(np.int32), ends), strict=True):
        part[name] = places.reshape(part[name].shape)
    if sampled.tokens is not None and sampled.token_mask is not None:
        part["token_ids"] = sampled.tokens[items]
        part["padding_mask"] = sampled.token_mask[items]


def _shift(part: Arrays, sampled: SampledItems) -> NDArray[np.float32]:
    """What is added to the logits of ``items`` so that their softmax stands for the catalog's.

    An item that a row brought is there in any case and counts once; one of the uniform negatives
    stands for all the others like it (sampled softmax: Jean et al. 2015, arXiv:1412.2007). Places
    that hold no item never count.
    """
    brought = np.zeros(len(part["items"]), bool)
    for name in part:
        if name.endswith(("item", "target")):
            brought[part[name].ravel()] = True
    known = sampled.num_items if sampled.known is None else len(sampled.known)
    others = max(known - int(brought[1:].sum()), 1)
    drawn = np.zeros(len(part["items"]), bool)
    drawn[part["negatives"]] = True
    drawn &= ~brought
    stands_for = np.where(drawn, others / max(int(drawn.sum()), 1), 1.0)
    there = brought | drawn
    there[0] = False
    return np.where(there, np.log(stands_for), -1e9).astype(np.float32)
