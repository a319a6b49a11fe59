"""Exposures: what the ranker is trained on, one event among sampled items that led to none.

An example is an event of a user with what he had done before it. Its exposures are the event's
item, in column 0, and, for the task ``click``, items that he has not interacted with: half of them
from what retrieval found for him, as those are what the ranker will have to tell apart, the rest
uniform. A ranker of ratings alone sees rated events alone.

The retriever and the linear model have been trained on these same events, so their scores say
more about an event here than they will about an unseen one, and the ranker learns to trust them too
much. Leaving each user's events out of what scores him would need a retriever for each fold.
Therefore how much the ranker and each score count in the end is decided on validation events,
which no model has seen, and not by the ranker's loss. What a retriever that has not seen them gives
is in docs/benchmarks/quality.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tfrec.config import RankingConfig
from tfrec.data.interactions import Interactions
from tfrec.data.sequences import Arrays, Histories
from tfrec.errors import ConfigError, InputError
from tfrec.index import Ragged
from tfrec.models.keras_bridge import tf
from tfrec.recommender import history_vectors

CONVERSION_EVENT = "purchase"

Floats = NDArray[np.float32]
Rows = NDArray[np.int32]
QueryVectors = Callable[[Rows, Histories, NDArray[np.int64]], Floats]
Scalars = Callable[[Rows, Floats, Histories, Rows], Floats]

# Examples whose query vectors are computed at a time.
_QUERY_CHUNK = 1024

# Uniform draws that hit a seen item are repeated so often before the unseen are listed.
_REDRAWS = 8


@dataclass(frozen=True, eq=False)
class Examples:
    """Events to learn from.

    Attributes:
      event: int64 (n,), places of the events in the interactions.
      user: int32 (n,), their users.
      before: int64 (n,), how many events the user had before.
    """

    event: NDArray[np.int64]
    user: Rows
    before: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.event)

    def take(self, index: NDArray[np.integer]) -> Examples:
        """The given examples, in their order."""
        return Examples(self.event[index], self.user[index], self.before[index])

    def histories(self, histories: Histories) -> Histories:
        """What each user had done before; ``histories`` has row u for user u."""
        offsets = np.concatenate([[0], np.cumsum(self.before)]).astype(np.int64)
        starts = histories.offsets[:-1][self.user]
        index = np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], self.before)
        return Histories(
            offsets,
            histories.item[index],
            histories.event[index],
            histories.rating[index],
            histories.timestamp[index],
        )


class NothingToLearnError(InputError):
    """The data has no event that the tasks could be learned from."""


class Unseen:
    """Draws items that users have not interacted with.

    Attributes:
      num_items: Items of the catalog.
      counts: int64 (users,), how many of them each user has not interacted with.

    Args:
      interactions: What they have interacted with.
      num_items: Items of the catalog, rows 1 to ``num_items``.
      hard: For each user, items that are hard to tell from those he interacts with, best first;
        what he has interacted with is left out here. None: there are none.
    """

    def __init__(self, interactions: Interactions, num_items: int, hard: Ragged | None) -> None:
        self.num_items = num_items
        # Sorted by user already, which a stable sort makes use of.
        keys = np.sort(self._key(interactions.user, interactions.item), kind="stable")
        self._seen = keys[np.append(True, np.diff(keys) > 0)[: len(keys)]]
        user, item = np.divmod(self._seen, num_items + 1)
        self.counts = num_items - np.bincount(user[item > 0], minlength=interactions.num_users)
        self._hard = self._without_seen(hard or Ragged.of([[]] * interactions.num_users))

    def draw(self, users: Rows, count: int, generator: np.random.Generator) -> Rows:
        """int32 (b, count): the first half hard as far as the user has such, the rest uniform.

        Every user must have an unseen item. One item may come twice.
        """
        rows = self._uniform(users, count, generator)
        half = count // 2
        starts = self._hard.offsets[:-1][users]
        lengths = self._hard.lengths[users][:, None]
        # One draw from each of `half` equal stretches of the list, so that few come twice.
        part = (np.arange(half) + generator.random((len(users), half))) / max(half, 1)
        place = np.minimum((part * lengths).astype(np.int64), lengths - 1)
        ids = np.append(self._hard.ids, 0)
        found = ids[np.where(lengths > 0, starts[:, None] + place, -1)]
        rows[:, :half] = np.where(lengths > 0, found, rows[:, :half])
        return rows

    def is_seen(self, users: NDArray[np.integer], items: NDArray[np.integer]) -> NDArray[np.bool_]:
        """Whether each user has interacted with the item beside him."""
        key = self._key(users, items)
        place = np.searchsorted(self._seen, key)
        found: NDArray[np.bool_] = np.append(self._seen, -1)[place] == key
        return found

    def _key(self, users: NDArray[np.integer], items: NDArray[np.integer]) -> NDArray[np.int64]:
        return users.astype(np.int64) * (self.num_items + 1) + items

    def _without_seen(self, lists: Ragged) -> Ragged:
        user = np.repeat(np.arange(len(lists)), lists.lengths)
        kept = (lists.ids > 0) & ~self.is_seen(user, lists.ids)
        counts = np.bincount(user[kept], minlength=len(lists))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return Ragged(offsets, lists.ids[kept])

    def _uniform(self, users: Rows, count: int, generator: np.random.Generator) -> Rows:
        shape = (len(users), count)
        rows = generator.integers(1, self.num_items + 1, shape, dtype=np.int32)
        beside = np.broadcast_to(users[:, None], shape)
        for _ in range(_REDRAWS):
            wrong = self.is_seen(beside, rows)
            rows[wrong] = generator.integers(1, self.num_items + 1, wrong.sum(), dtype=np.int32)
        # Who has seen nearly everything would be drawn for without end.
        wrong = self.is_seen(beside, rows)
        items = np.arange(1, self.num_items + 1, dtype=np.int32)
        for row in np.flatnonzero(wrong.any(axis=1)):
            left = items[~self.is_seen(np.full(len(items), users[row]), items)]
            rows[row, wrong[row]] = generator.choice(left, int(wrong[row].sum()))
        return rows


@dataclass(frozen=True, eq=False)
class RankingBatches:
    """Batches of exposures, epoch after epoch, the same for the same seed.

    Made by :func:`ranking_batches`; what they hold is said at :meth:`Ranker.compute_loss
    <tfrec.models.ranking.Ranker.compute_loss>`.

    Attributes:
      config: The ranker's settings.
      histories: Every user's events.
      interactions: The same events.
      examples: The events that are learned from, the same in every epoch.
      queries: float32 (examples, d), their query vectors.
      vectors: float32 (n + 1, d), candidate vectors.
      attributes: float32 (n + 1, F).
      user_attributes: float32 (users, user attribute width).
      text: float32 (n + 1, p), the items' texts.
      profile: float32 (users, p), the users' profile texts; either may have width 0.
      scalars_of: Users, query vectors, histories and int32 (b, C) rows -> float32 (b, C, S).
      unseen: Where the other exposures come from; they are drawn anew in every epoch.
      seed: Of everything random.
      tasks: What labels are given.
      replicas: Parts of a global batch.
    """

    config: RankingConfig
    histories: Histories
    interactions: Interactions
    examples: Examples
    queries: Floats
    vectors: Floats
    attributes: Floats
    user_attributes: Floats
    text: Floats
    profile: Floats
    scalars_of: Scalars
    unseen: Unseen
    seed: int
    tasks: tuple[str, ...]
    replicas: int = 1

    @property
    def steps_per_epoch(self) -> int:
        """Full batches of an epoch, at least one."""
        return max(len(self.examples) // self.config.batch_size, 1)

    @property
    def negatives(self) -> int:
        """Exposures beside the event's own: none where only ratings are learned from."""
        return self.config.negatives if "click" in self.tasks else 0

    @cached_property
    def num_scalars(self) -> int:
        """S, how many scalars a candidate has."""
        return int(self._scalars(*self.exposures(0, 0)).shape[-1])

    def dataset(self, first_epoch: int = 0, worker: int = 0, workers: int = 1) -> tf.data.Dataset:
        """An endless dataset that starts with the given epoch.

        Args:
          first_epoch: 0-based; a resumed training starts where it stopped.
          worker: Which of the workers asks.
          workers: How many workers share the parts of a batch.

        Returns:
          Dictionaries of float32 arrays; with several replicas one element a part, in their order.
        """
        share = self.replicas // workers
        mine = range(worker * share, (worker + 1) * share)
        first = next(self._parts(first_epoch, mine))
        spec = {name: tf.TensorSpec(a.shape, tf.as_dtype(a.dtype)) for name, a in first.items()}

        def endless() -> Iterator[Arrays]:
            epoch = first_epoch
            while True:
                yield from self._parts(epoch, mine)
                epoch += 1

        made = tf.data.Dataset.from_generator(endless, output_signature=spec)
        return made.prefetch(2)

    def exposures(self, epoch: int, step: int) -> tuple[NDArray[np.int64], Rows]:
        """What a global batch is about.

        Args:
          epoch: 0-based.
          step: 0-based, below ``steps_per_epoch``.

        Returns:
          int64 (batch_size,), indices of ``examples``; where there are fewer of them than
          ``batch_size``, they come again, and are not weighed. And int32 (batch_size, 1 +
          negatives), item rows, the event's first.
        """
        order = np.random.default_rng([self.seed, epoch]).permutation(len(self.examples))
        generator = np.random.default_rng([self.seed, epoch, step])
        size = self.config.batch_size
        index = order[np.arange(step * size, (step + 1) * size) % len(order)]
        drawn = self.unseen.draw(self.examples.user[index], self.negatives, generator)
        clicked = self.interactions.item[self.examples.event[index]]
        return index, np.concatenate([clicked[:, None], drawn], axis=1)

    def sample_scalars(self, steps: int = 4) -> Floats:
        """float32 (m, S): scalars of the first batches, for :meth:`Ranker.adapt_scalars
        <tfrec.models.ranking.Ranker.adapt_scalars>`."""
        taken = range(min(steps, self.steps_per_epoch))
        found = np.concatenate([self._scalars(*self.exposures(0, step)) for step in taken])
        return found.reshape(-1, found.shape[-1])

    def _parts(self, epoch: int, mine: range) -> Iterator[Arrays]:
        size = self.config.batch_size // self.replicas
        weight = np.ones(self.config.batch_size, np.float32)
        weight[len(self.examples) :] = 0
        for step in range(self.steps_per_epoch):
            index, rows = self.exposures(epoch, step)
            for replica in mine:
                part = slice(replica * size, (replica + 1) * size)
                batch = self._inputs(index[part], rows[part]) | self._labels(index[part])
                batch["weight"] = weight[part]
                batch["denominator"] = weight.sum(keepdims=True)
                yield batch

    def _inputs(self, index: NDArray[np.int64], rows: Rows) -> Arrays:
        examples = self.examples.take(index)
        before = examples.histories(self.histories)
        history, mask = history_vectors(before, self.vectors, self.config.history)
        return {
            "query": self.queries[index],
            "history": history,
            "history_mask": mask,
            "candidates": self.vectors[rows],
            "attributes": self.attributes[rows],
            "user_attributes": self.user_attributes[examples.user],
            "text": self.text[rows],
            "profile": self.profile[examples.user],
            "scalars": self.scalars_of(examples.user, self.queries[index], before, rows),
        }

    def _scalars(self, index: NDArray[np.int64], rows: Rows) -> Floats:
        examples = self.examples.take(index)
        before = examples.histories(self.histories)
        return self.scalars_of(examples.user, self.queries[index], before, rows)

    def _labels(self, index: NDArray[np.int64]) -> Arrays:
        """Labels and masks; only the event's own column can be other than 0."""
        event = self.examples.event[index]
        rating = self.interactions.rating[event]
        rated = np.isfinite(rating)
        known = np.where(rated, rating, 0)
        names = self.interactions.event_names
        converts = np.array([name == CONVERSION_EVENT for name in names], bool)
        columns = {
            "label_click": np.ones(len(event)),
            "label_like": rated & (known >= self.config.like_rating),
            "mask_like": rated,
            "label_rating": known,
            "mask_rating": rated,
            "label_conversion": converts[self.interactions.event[event]],
        }
        nothing = np.zeros((len(event), self.negatives), np.float32)
        return {
            name: np.concatenate([values[:, None], nothing], axis=1, dtype=np.float32)
            for name, values in columns.items()
            if name.split("_")[1] in self.tasks
        }


def ranking_batches(
    config: RankingConfig,
    *,
    histories: Histories,
    interactions: Interactions,
    vectors: Floats,
    query_vectors_of: QueryVectors,
    hard: Ragged | None,
    attributes: Floats,
    user_attributes: Floats,
    text: Floats,
    profile: Floats,
    scalars_of: Scalars,
    seed: int,
    replicas: int = 1,
    tasks: tuple[str, ...] = ("click", "like", "rating"),
) -> RankingBatches:
    """Chooses the events to learn from and computes their query vectors, with a progress bar.

    Args:
      config: The ranker's settings.
      histories: Every user's events, row u for user u.
      interactions: The same events, in the same order.
      vectors: float32 (n + 1, d), candidate vectors of the catalog, row 0 the unknown item.
      query_vectors_of: Users int32 (b,), their histories and the times int64 (b,) of the examples
        -> float32 (b, d). The histories are all events before each example.
      hard: For each user, rows that retrieval finds for him, best first; what he has interacted
        with is left out here.
      attributes: float32 (n + 1, F); F may be 0.
      user_attributes: float32 (users, width); width may be 0.
      text: float32 (n + 1, p), the items' texts as they are read; p may be 0.
      profile: float32 (users, p), the users' profile texts; p may be 0.
      scalars_of: Users int32 (b,), query vectors float32 (b, d), the same histories and candidates
        int32 (b, C) -> float32 (b, C, S). Called for each part of each batch, so it has to be
        cheap.
      seed: Of the choice of events and of the other exposures.
      replicas: Parts of a global batch.
      tasks: What labels are given.

    Raises:
      ConfigError: the batch cannot be shared by the replicas.
      InputError: histories and interactions are not the same events, or the tables do not fit
        them.
      NothingToLearnError: there is no event to learn from.
    """
    if config.batch_size % replicas:
        raise ConfigError(
            f"adapt.ranking.batch_size = {config.batch_size} cannot be shared by {replicas} "
            f"replicas; take a multiple of {replicas}"
        )
    _check(
        histories,
        interactions,
        len(vectors),
        {"attributes": attributes, "text": text},
        {"user_attributes": user_attributes, "profile": profile, "hard": hard},
    )
    unseen = Unseen(interactions, len(vectors) - 1, hard)
    examples = _choose(interactions, unseen, tasks, config.examples_per_user, seed)
    return RankingBatches(
        config=config,
        histories=histories,
        interactions=interactions,
        examples=examples,
        queries=_query_vectors(examples, histories, interactions.timestamp, query_vectors_of),
        vectors=vectors,
        attributes=attributes,
        user_attributes=user_attributes,
        text=text,
        profile=profile,
        scalars_of=scalars_of,
        unseen=unseen,
        seed=seed,
        tasks=tuple(tasks),
        replicas=replicas,
    )


def _choose(
    interactions: Interactions, unseen: Unseen, tasks: tuple[str, ...], most: int, seed: int
) -> Examples:
    """Up to ``most`` random events of each user, never his first."""
    user = interactions.user
    before = np.arange(len(user)) - interactions.offsets[:-1][user]
    fit = (before >= 1) & (interactions.item > 0) & (interactions.weight > 0)
    clicks = "click" in tasks
    fit &= unseen.counts[user] > 0 if clicks else np.isfinite(interactions.rating)
    events = np.flatnonzero(fit)
    if not len(events):
        raise NothingToLearnError(
            "the ranker has no event to learn from: it needs users with at least two events"
            + (" and an item they have not interacted with" if clicks else ", the later rated")
        )
    shuffled = np.random.default_rng([seed]).permutation(events)
    shuffled = shuffled[np.argsort(user[shuffled], kind="stable")]
    first = np.searchsorted(user[shuffled], user[shuffled])
    kept = np.sort(shuffled[np.arange(len(shuffled)) - first < most])
    return Examples(kept, user[kept], before[kept])


def _query_vectors(
    examples: Examples,
    histories: Histories,
    timestamp: NDArray[np.int64],
    query_vectors_of: QueryVectors,
) -> Floats:
    index = np.arange(len(examples))
    with tqdm(total=len(index), desc="query vectors", unit="query", dynamic_ncols=True) as bar:
        found = []
        for start in range(0, len(index), _QUERY_CHUNK):
            chunk = examples.take(index[start : start + _QUERY_CHUNK])
            before, now = chunk.histories(histories), timestamp[chunk.event]
            vectors = query_vectors_of(chunk.user, before, now)
            found.append(np.asarray(vectors, np.float32))
            bar.update(len(chunk))
    return np.concatenate(found)


def _check(
    histories: Histories,
    interactions: Interactions,
    num_rows: int,
    of_items: Mapping[str, Floats],
    of_users: Mapping[str, Floats | Ragged | None],
) -> None:
    if not np.array_equal(histories.offsets, interactions.offsets):
        raise InputError(
            f"the ranker needs histories of the same events as the interactions; got "
            f"{len(histories.item)} and {len(interactions)} events"
        )
    if int(interactions.item.max(initial=0)) >= num_rows:
        raise InputError(
            f"an interaction is with item row {interactions.item.max()}, and there are vectors of "
            f"rows 0 to {num_rows - 1}"
        )
    for tables, expected in ((of_items, num_rows), (of_users, interactions.num_users)):
        for name, table in tables.items():
            if table is not None and len(table) != expected:
                raise InputError(
                    f"the ranker's '{name}' has {len(table)} rows, and {expected} are needed"
                )
