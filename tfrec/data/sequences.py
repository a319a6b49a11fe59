"""Behaviour sequences as arrays of fixed shape, the same for training and for a request.

A user's tokens are a start token followed by the events, oldest first. In training, sequences
longer than a row are cut into windows at a random place each epoch, and several short windows are
packed into one row, so that hardly any place of a batch is padding; ``segment`` tells the windows
of a row apart. (Packing: Krell et al. 2021, "Efficient Sequence Packing without
Cross-contamination"; first-fit decreasing.)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.data.interactions import Interactions
from tfrec.rows import Vectors

GAP_BUCKETS = 32
RATING_BUCKETS = 11
MAX_SEGMENTS = 16

IntArray = NDArray[np.int32]
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class EventCoding:
    """How an event's type, rating and time become small integers; part of a trained model.

    Attributes:
      event_names: Event types seen in training.
      rating_min: Lowest rating seen in training.
      rating_max: Highest rating seen in training.
    """

    event_names: tuple[str, ...] = ("interaction",)
    rating_min: float = 0.0
    rating_max: float = 0.0

    @classmethod
    def of(cls, interactions: Interactions) -> EventCoding:
        """The coding that fits the given events."""
        rated = interactions.rating[np.isfinite(interactions.rating)]
        low, high = (float(rated.min()), float(rated.max())) if len(rated) else (0.0, 0.0)
        return cls(interactions.event_names, low, high)

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> EventCoding:
        """Reads back what :func:`dataclasses.asdict` gave."""
        return cls(**{**tree, "event_names": tuple(tree["event_names"])})

    @property
    def num_events(self) -> int:
        """Codes an event type can take: 0 is the start token, 1 an unknown type."""
        return len(self.event_names) + 2

    def events(self, names: Sequence[str]) -> IntArray:
        """int32 codes of event types given by name."""
        codes = {name: 2 + i for i, name in enumerate(self.event_names)}
        return np.array([codes.get(name, 1) for name in names], np.int32)

    def ratings(self, ratings: NDArray[np.float32]) -> IntArray:
        """int32 buckets 1..10 between the lowest and the highest rating; 0 for no rating."""
        span = max(self.rating_max - self.rating_min, 1e-9)
        scaled = np.clip((ratings - self.rating_min) / span, 0, 1)
        bucket = 1 + np.floor(np.nan_to_num(scaled) * (RATING_BUCKETS - 2))
        return np.where(np.isfinite(ratings), bucket, 0).astype(np.int32)


def gap_bucket(seconds: NDArray[np.int64]) -> IntArray:
    """int32 buckets of a time gap: 1 for none (or backwards), then one for each doubling."""
    doubling = np.floor(np.log2(np.maximum(seconds, 1))).astype(np.int32)
    return np.where(seconds <= 0, 1, np.minimum(2 + doubling, GAP_BUCKETS - 1)).astype(np.int32)


@dataclass(frozen=True, eq=False)
class Histories:
    """Histories of a batch of users, as flat arrays of events.

    Attributes:
      offsets: int64 (batch + 1,), events of query b are ``offsets[b]:offsets[b + 1]``.
      item: int32 (n,), catalog rows, oldest first.
      event: int32 (n,), codes of :class:`EventCoding`.
      rating: int32 (n,), buckets of :class:`EventCoding`.
      timestamp: int64 (n,), seconds; zeros where not known.
    """

    offsets: NDArray[np.int64]
    item: IntArray
    event: IntArray
    rating: IntArray
    timestamp: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        """int64 (batch,), how many events each history has."""
        return self.offsets[1:] - self.offsets[:-1]

    @classmethod
    def of(cls, interactions: Interactions, coding: EventCoding) -> Histories:
        """Every user's events, query b being user row b."""
        names = {name: 2 + i for i, name in enumerate(coding.event_names)}
        codes = np.array([names.get(n, 1) for n in interactions.event_names], np.int32)
        return cls(
            offsets=interactions.offsets,
            item=interactions.item,
            event=codes[interactions.event],
            rating=coding.ratings(interactions.rating),
            timestamp=interactions.timestamp,
        )

    def take(self, rows: Sequence[int] | NDArray[np.integer]) -> Histories:
        """The histories of the given rows, in their order."""
        starts = self.offsets[:-1][rows]
        return self._spans(starts, self.offsets[1:][rows] - starts)

    def alone(self, row: int) -> Histories:
        """The history of one row, without a copy."""
        start, stop = self.offsets[row : row + 2].tolist()
        part = slice(start, stop)
        return Histories(
            np.array([0, stop - start], np.int64),
            self.item[part],
            self.event[part],
            self.rating[part],
            self.timestamp[part],
        )

    def last(self, count: int) -> Histories:
        """Each history cut to its last ``count`` events."""
        lengths = np.minimum(self.lengths, count)
        return self._spans(self.offsets[1:] - lengths, lengths)

    def first(self, counts: NDArray[np.int64]) -> Histories:
        """Each history cut to its first events, of which ``counts`` (batch,) says how many."""
        return self._spans(self.offsets[:-1], counts)

    def _spans(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Histories:
        """A history of so many events from each of the places on."""
        index = _ranges(starts, lengths)
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        return Histories(
            offsets, self.item[index], self.event[index], self.rating[index], self.timestamp[index]
        )

    @property
    def gap(self) -> IntArray:
        """int32 (n,), bucket of the time since the event before; 0 for a user's first."""
        seconds = np.diff(self.timestamp, prepend=self.timestamp[:1])
        bucket = gap_bucket(seconds)
        first = self.offsets[:-1][self.lengths > 0]
        bucket[first] = 0
        return bucket


def query_arrays(
    histories: Histories, length: int, request_time: NDArray[np.int64] | None = None
) -> Arrays:
    """Arrays of one row a query, newest event in the last used place.

    Args:
      histories: The users' events.
      length: Places of a row; older events are left out.
      request_time: int64 (batch,), seconds, for models that read the time of the request; None:
        that of each user's newest event.

    Returns:
      int32 (batch, length) ``item``, ``event``, ``rating``, ``gap``, ``next_gap``, ``position``,
      ``segment`` (0 marks padding), and int32 (batch,) ``last``, the place that answers.
    """
    batch = len(histories)
    counts = histories.lengths
    used = np.minimum(counts, length)
    with_start = (counts < length).astype(np.int64)
    tokens = used + with_start
    rows = np.repeat(np.arange(batch), used)
    source = _ranges(histories.offsets[1:] - used, used)
    places = _ranges(with_start, used)
    out: Arrays = {}
    columns = {
        "item": histories.item,
        "event": histories.event,
        "rating": histories.rating,
        "gap": histories.gap,
    }
    for name, values in columns.items():
        array = np.zeros((batch, length), np.int32)
        array[rows, places] = values[source]
        out[name] = array
    grid = np.arange(length, dtype=np.int32)[None, :]
    inside = grid < tokens[:, None]
    out["position"] = np.where(inside, grid, 0).astype(np.int32)
    out["segment"] = inside.astype(np.int32)
    out["last"] = (tokens - 1).astype(np.int32)
    out["next_gap"] = _next_gaps(out, histories, rows, places, source, request_time)
    return out


def query_inputs(
    histories: Histories,
    length: int,
    vectors: Vectors,
    profile: NDArray[np.float32],
    attributes: NDArray[np.float32],
    request_time: NDArray[np.int64] | None = None,
) -> Arrays:
    """Everything that a query tower reads, whatever runs it.

    Args:
      histories: The users' events; ``item`` are rows of ``vectors``.
      length: Places of a row.
      vectors: float32 (catalog rows, d), candidate vectors.
      profile: float32 (batch, text width).
      attributes: float32 (batch, attribute width).
      request_time: See :func:`query_arrays`.

    Returns:
      What :func:`query_arrays` gives, and float32 ``vectors`` (batch, length, d), ``profile``
      (batch, 1, text width) and ``attributes`` (batch, 1, attribute width).
    """
    out = query_arrays(histories, length, request_time)
    out["vectors"] = vectors[out["item"]]
    out["profile"], out["attributes"] = profile[:, None], attributes[:, None]
    return out


def _next_gaps(
    arrays: Arrays,
    histories: Histories,
    rows: NDArray[np.int64],
    places: NDArray[np.int64],
    source: NDArray[np.int64],
    request_time: NDArray[np.int64] | None,
) -> IntArray:
    """Each place's gap to what comes next; the last place's gap to the request."""
    out = np.zeros(arrays["item"].shape, np.int32)
    out[:, :-1] = np.where(arrays["segment"][:, 1:] > 0, arrays["gap"][:, 1:], 0)
    newest = np.zeros(len(histories), np.int64)
    newest[rows] = histories.timestamp[source]
    which = np.flatnonzero(histories.lengths)
    passed = (newest if request_time is None else request_time)[which] - newest[which]
    out[which, np.asarray(arrays["last"])[which]] = gap_bucket(passed)
    return out


class PackedSequences:
    """Training rows over the events of all users, packed anew for each epoch.

    Args:
      histories: Every user's training events.
      weight: float32 (n,), training weight of each event as a target.
      length: Places of a row.
      seed: The same seed and epoch give the same rows.
    """

    def __init__(
        self, histories: Histories, weight: NDArray[np.float32], length: int, seed: int
    ) -> None:
        self.histories = histories
        self.weight = weight
        self.length = length
        self.seed = seed
        self._gap = histories.gap

    def epoch(self, epoch: int) -> Arrays:
        """Rows of one epoch in random order.

        Returns:
          int32 (rows, length): ``item``, ``event``, ``rating``, ``gap``, ``next_gap``,
          ``position``, ``segment``, ``target`` (0: none); float32 (rows, length) ``weight``; int32
          (rows, MAX_SEGMENTS) ``user``, the user row of segments 1, 2, …, -1 where there is none.
        """
        generator = np.random.default_rng([self.seed, epoch])
        user, start, size = self._windows(generator)
        row, column, rows = pack(size, self.length, MAX_SEGMENTS)
        order = generator.permutation(rows)
        return self._fill(user, start, size, order[row], column, rows)

    def _windows(
        self, generator: np.random.Generator
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        counts = self.histories.lengths
        users = np.flatnonzero(counts)
        m = counts[users]
        offset = np.where(m > self.length, generator.integers(0, self.length, len(users)), 0)
        pieces = np.where(m > self.length, -(-(m - offset) // self.length) + (offset > 0), 1)
        user = np.repeat(users, pieces)
        nth = _ranges(np.zeros(len(users), np.int64), pieces)
        shift = np.repeat(np.where(offset > 0, offset - self.length, 0), pieces)
        first = shift + nth * self.length
        start = np.maximum(first, 0)
        stop = np.minimum(first + self.length, np.repeat(m, pieces))
        return user, start, stop - start

    def _fill(
        self,
        user: NDArray[np.int64],
        start: NDArray[np.int64],
        size: NDArray[np.int64],
        row: NDArray[np.int64],
        column: NDArray[np.int64],
        rows: int,
    ) -> Arrays:
        places = _ranges(row * self.length + column, size)
        target = _ranges(self.histories.offsets[:-1][user] + start, size)
        is_start = _ranges(start, size) == 0
        source = np.where(is_start, 0, target - 1)
        h = self.histories
        segment = _rank_in_row(row, column)
        columns = {
            "item": np.where(is_start, 0, h.item[source]),
            "event": np.where(is_start, 0, h.event[source]),
            "rating": np.where(is_start, 0, h.rating[source]),
            "gap": np.where(is_start, 0, self._gap[source]),
            "next_gap": self._gap[target],
            "position": _ranges(np.zeros(len(size), np.int64), size),
            "segment": np.repeat(segment, size),
            "target": h.item[target],
        }
        out: Arrays = {name: _scatter(v, places, rows, self.length) for name, v in columns.items()}
        weight = np.zeros(rows * self.length, np.float32)
        weight[places] = self.weight[target] * (h.item[target] > 0)
        out["weight"] = weight.reshape(rows, self.length)
        users = np.full((rows, MAX_SEGMENTS), -1, np.int32)
        users[row, segment - 1] = user
        out["user"] = users
        return out


def pack(
    size: NDArray[np.int64], length: int, most: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Packs pieces into rows, longest first, each into the fullest row that still holds it.

    Args:
      size: int64 (pieces,), each from 1 to ``length``.
      length: Places of a row.
      most: Pieces a row holds at most.

    Returns:
      Row of each piece, first column of each piece, and how many rows there are.
    """
    row = np.empty(len(size), np.int64)
    column = np.empty(len(size), np.int64)
    open_rows: list[list[int]] = [[] for _ in range(length + 1)]
    pieces: list[int] = []
    for piece in np.argsort(-size, kind="stable").tolist():
        need = int(size[piece])
        room = next((r for r in range(need, length + 1) if open_rows[r]), 0)
        if room:
            place = open_rows[room].pop()
        else:
            room, place = length, len(pieces)
            pieces.append(0)
        row[piece], column[piece] = place, length - room
        pieces[place] += 1
        if pieces[place] < most:
            open_rows[room - need].append(place)
    return row, column, len(pieces)


def _rank_in_row(row: NDArray[np.int64], column: NDArray[np.int64]) -> NDArray[np.int64]:
    order = np.lexsort((column, row))
    first = np.r_[True, np.diff(row[order]) > 0] if len(row) else np.zeros(0, bool)
    nth = np.arange(len(row)) - np.maximum.accumulate(np.where(first, np.arange(len(row)), 0))
    out = np.empty(len(row), np.int64)
    out[order] = nth + 1
    return out


def _scatter(
    values: NDArray[np.generic], places: NDArray[np.int64], rows: int, length: int
) -> IntArray:
    flat = np.zeros(rows * length, np.int32)
    flat[places] = values
    return flat.reshape(rows, length)


def _ranges(starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Concatenates ``arange(start, start + length)`` of every pair."""
    total = int(lengths.sum())
    ends = np.cumsum(lengths)
    index: NDArray[np.int64] = np.arange(total) + np.repeat(starts - (ends - lengths), lengths)
    return index
