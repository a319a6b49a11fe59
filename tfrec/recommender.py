"""The one recommendation chain: encode, retrieve, filter, rank, over the Engine protocol.

A trained run and a deployed bundle recommend through this same code; only the Engine differs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from tfrec.data.catalog import Catalog, Users
from tfrec.data.interactions import Interactions
from tfrec.data.sequences import EventCoding, Histories
from tfrec.data.tokens import Coverage
from tfrec.errors import InputError
from tfrec.index import EXACT_LIMIT, ExactIndex, Index, Ragged, TopK, make_index, top_k
from tfrec.index.among import Among
from tfrec.rows import Vectors, int8_rows
from tfrec.steps import FILTERS, SOURCES, Search

Floats = NDArray[np.float32]
Rows = NDArray[np.int32]
Source = Literal["behaviour", "text", "popular"]

BLOCK = 512
_FADED = 0.01  # share of the further weight of popularity below which there is none
_PIECE = 256  # items of a history at a time: so many codes of int8 add up to no more than an int16
_STEP = 0.125  # of the spread of linear weights: the least step of their codes
_TYPICAL = 600  # users by whose queries ScaNN is tuned
_MET = 4  # items in a made-up history
_CELLS = 1 << 22  # numbers gathered at a time: 16 MiB
FUSED = 200
TOLD = 1e-3
"""Weight of popularity beside likeness to words that somebody says: it breaks ties."""
KEPT = 0.3
"""The same beside a profile that is kept of a user: age and occupation tell less than popularity.
On new users of MovieLens-100K it has three times the NDCG@10 of 0.001, and as much as popularity
alone."""
SCALARS = ("retrieval", "linear", "log_popularity")


class Engine(Protocol):
    """The models of a recommender, whatever runs them."""

    def encode_text(self, texts: Sequence[str], query: bool = False) -> Floats:
        """float32 (n, text width), vectors of texts; of a seeker's words if ``query``."""

    def coverage(self, texts: Sequence[str]) -> Coverage:
        """How well the text model's vocabulary fits texts."""

    def encode_candidate(self, text: Floats, attributes: Floats, rows: Rows) -> Floats:
        """float32 (n, d), candidate vectors; row 0 for items the model was not trained on."""

    def encode_query(
        self,
        histories: Histories,
        vectors: Vectors,
        profile: Floats,
        attributes: Floats,
        request_time: NDArray[np.int64] | None = None,
    ) -> Floats:
        """float32 (users, d), query vectors; ``histories.item`` are rows of ``vectors``."""

    def rank(self, inputs: Mapping[str, Floats]) -> dict[str, Floats]:
        """Task -> float32 (b, c), what the ranker says of each candidate.

        Args:
          inputs: ``query`` (b, d), ``history`` (b, h, d), ``history_mask`` (b, h), ``candidates``
            (b, c, d), ``attributes`` (b, c, f), ``user_attributes`` (b, g), ``text`` (b, c, p)
            and ``profile`` (b, p) in the :class:`TextDirections`, ``scalars``
            (b, c, len(SCALARS)).
        """


@dataclass(frozen=True)
class Policy:
    """How candidates are found and scores put together.

    Attributes:
      candidates: How many each source gives.
      history: Events of a history that the ranker and the text part read.
      score: Weight of each part: ``retrieval``, ``linear``, ``text``, ``popularity`` and the
        ranker's tasks. Retrieval, linear and text, where they count, bring candidates too.
      tasks: What the ranker predicts; empty: there is none.
      text_decay: Weight of an event in the text part, over that of the event after it.
      newcomer: Further weight of popularity for somebody without an event, as it were; that for
        somebody with n events is this times exp(-n / fade). Where it counts, it brings candidates.
      fade: Events in which it falls to 1 / e.
      rank: How many of the candidates the ranker reads, those with the best score without it;
        0: all.
      sources: What finds candidates, by name (:data:`tfrec.steps.SOURCES`); each decides whether
        it has a part.
      filters: What leaves items out of requests, by name (:data:`tfrec.steps.FILTERS`).
      blocked: Attribute -> values that requests never get.
    """

    candidates: int = 200
    history: int = 50
    score: Mapping[str, float] = field(default_factory=lambda: {"retrieval": 1.0})
    tasks: tuple[str, ...] = ()
    text_decay: float = 0.8
    newcomer: float = 0.0
    fade: float = 5.0
    rank: int = 0
    sources: tuple[str, ...] = ("behaviour", "text", "popular", "new")
    filters: tuple[str, ...] = ("seen", "hidden")
    blocked: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def ranks(self) -> bool:
        """Whether the ranker's predictions have a part in the score."""
        return any(self.uses(task) for task in self.tasks)

    @property
    def plain(self) -> bool:
        """Whether the score is that of retrieval alone."""
        others = (weight for part, weight in self.score.items() if part != "retrieval")
        return not (self.newcomer or any(others))

    def total(self, parts: Mapping[str, Floats]) -> Floats:
        """float32 (b, c), the weighted sum of the parts that count; the prior is not in it."""
        out = np.zeros_like(parts["retrieval"])
        for name, weight in self.score.items():
            if weight and name in parts:
                out += np.float32(weight) * parts[name]
        return out

    def prior(self, events: NDArray[np.int64]) -> Floats:
        """float32 (b,), the further weight of popularity by the number of events of each user."""
        share = np.exp(-events / self.fade)
        return np.where(share > _FADED, self.newcomer * share, 0).astype(np.float32)

    def uses(self, part: str) -> bool:
        """Whether a part counts."""
        return bool(self.score.get(part))

    def dump(self) -> dict[str, Any]:
        """Plain values for JSON: what was learned, and not how it is served."""
        told = {name: getattr(self, name) for name in _LEARNED}
        return {**told, "score": dict(self.score), "tasks": list(self.tasks)}

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> Policy:
        """Reads back what :meth:`dump` gave; what else is there is left."""
        known = {name: tree[name] for name in _LEARNED}
        return cls(**{**known, "tasks": tuple(known["tasks"])})


_LEARNED = (
    "candidates", "history", "score", "tasks", "text_decay", "newcomer", "fade"
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class LinearItems:
    """A linear item-item model: an item's score is the sum of its weights to the history.

    Attributes:
      weights: float32 (n + 1, n + 1); row: item of the history, column: item scored. Or int8 codes
        of them.
      scales: float32 (n + 1,), what to multiply each column of codes by; None: they are float32.
    """

    weights: NDArray[Any]
    scales: Floats | None = None

    def coded(self) -> LinearItems:
        """The same as int8 codes.

        Most weights are small and a few are large. A column's scale is that of its largest weight,
        but not below a share of the spread of all: smaller steps would cost room, since the codes
        compress less, and change few lists.
        """
        if self.scales is not None:
            return self
        weights = np.asarray(self.weights, np.float32)
        codes, scales = int8_rows(weights.T, _STEP * float(weights.std()))
        return LinearItems(np.ascontiguousarray(codes.T), scales)

    def scores(self, histories: Ragged) -> Floats:
        """float32 (batch, n + 1), of every item; each item of a history counts once."""
        out = np.zeros((len(histories), len(self.weights)), np.float32)
        # A history is short beside the catalog: adding its rows beats a product with all of them.
        for user, met in self._met(histories):
            out[user] += self.weights[met].sum(axis=0, dtype=self._total)
        return self._scaled(out, self.scales)

    def scores_of(self, histories: Ragged, rows: Rows) -> Floats:
        """float32 (batch, c), of the items int32 (batch, c) alone."""
        out = np.zeros(rows.shape, np.float32)
        known = rows < len(self.weights)
        wanted = np.where(known, rows, 0)
        for user, met in self._met(histories):
            out[user] += self.weights[met[:, None], wanted[user]].sum(axis=0, dtype=self._total)
        return self._scaled(out, None if self.scales is None else self.scales[wanted]) * known

    @property
    def _total(self) -> type[np.float32] | type[np.int16]:
        return np.float32 if self.scales is None else np.int16

    @staticmethod
    def _scaled(scores: Floats, scales: Floats | None) -> Floats:
        if scales is not None:
            scores *= scales
        return scores

    def _met(self, histories: Ragged) -> Iterator[tuple[int, NDArray[np.int64]]]:
        """Each user with what he met, a piece at a time, without the unknown, items added later,
        and repeats."""
        width = len(self.weights)
        user = np.repeat(np.arange(len(histories)), histories.lengths)
        known = (histories.ids > 0) & (histories.ids < width)
        user, item = np.divmod(np.unique(user[known] * width + histories.ids[known]), width)
        ends = np.searchsorted(user, np.arange(len(histories)), side="right")
        for place, (start, stop) in enumerate(zip([0, *ends], ends, strict=False)):
            for first in range(start, stop, _PIECE):
                yield place, item[first : min(first + _PIECE, stop)]


@dataclass(frozen=True, eq=False)
class TextDirections:
    """The directions in which a catalog's texts differ most: what the ranker reads of a text.

    Attributes:
      mean: float32 (text width,).
      matrix: float32 (text width, p); along each direction the texts have a variance of 1.
    """

    mean: Floats
    matrix: Floats

    @classmethod
    def of(cls, vectors: Floats, most: int) -> TextDirections | None:
        """At most so many principal directions of float32 (n, text width).

        Rows of zeros, which have no text, do not count. None: the others do not differ.
        """
        found = vectors[vectors.any(axis=1)] if most else vectors[:0]
        if not len(found):
            return None
        mean = found.mean(axis=0)
        _, size, directions = np.linalg.svd(found - mean, full_matrices=False)
        spread = size / np.sqrt(len(found))
        kept = min(most, int((spread > 1e-4).sum()))
        if not kept:
            return None
        matrix = directions[:kept].T / spread[:kept]
        return cls(mean.astype(np.float32), matrix.astype(np.float32))

    def __call__(self, vectors: Floats) -> Floats:
        """float32 (n, text width) -> (n, p); width 0 stays 0, and rows without text are zeros."""
        if not vectors.shape[1]:
            return vectors
        told = vectors.any(axis=1, keepdims=True)
        return np.asarray(((vectors - self.mean) @ self.matrix) * told, np.float32)


@dataclass(frozen=True, eq=False)
class Who:
    """A batch of those who ask.

    Attributes:
      histories: Their events.
      profile: float32 (b, text width), vectors of their profile texts; zeros where none.
      attributes: float32 (b, attribute width).
      request_time: int64 (b,), seconds; None: that of their newest events.
    """

    histories: Histories
    profile: Floats
    attributes: Floats
    request_time: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.histories)

    def take(self, index: NDArray[np.integer]) -> Who:
        """Those of the given places, in their order."""
        time = None if self.request_time is None else self.request_time[index]
        return Who(self.histories.take(index), self.profile[index], self.attributes[index], time)

    @property
    def new(self) -> NDArray[np.bool_]:
        """bool (b,): who has no event."""
        none: NDArray[np.bool_] = self.events == 0
        return none

    @property
    def events(self) -> NDArray[np.int64]:
        """int64 (b,): how many events they have."""
        return self.histories.lengths

    @property
    def seen(self) -> Ragged:
        """The items of their histories."""
        return Ragged(self.histories.offsets, self.histories.item)


@dataclass(frozen=True, eq=False)
class Evidence:
    """What finding candidates and scoring them both need, computed once for a batch.

    Attributes:
      words: float32 (b, text width), text queries; None where text does not count.
      linear: float32 (b, items + 1), the linear model's score of every item; None where it does
        not count.
    """

    words: Floats | None = None
    linear: Floats | None = None


@dataclass(frozen=True, slots=True)
class Met:
    """An event of a history.

    Attributes:
      item_id: With what.
      event: Its type; one that the models do not know counts as the first that they do.
      rating: None: there is none.
      time: Seconds since 1970; None: that of the event before.
      again: Whether the item may be recommended all the same.
    """

    item_id: str
    event: str = ""
    rating: float | None = None
    time: int | None = None
    again: bool = False

    @classmethod
    def of(cls, told: str | Met) -> Met:
        """An event of an item id, where no more is told."""
        return cls(told) if isinstance(told, str) else told


@dataclass(frozen=True)
class Request:
    """What one person asks for.

    Attributes:
      user_id: A known user, whose events and attributes are then used; or a new one.
      history: Item ids or events, oldest first, that follow what is known of the user.
      profile: What the person likes, in words.
      exclude: Item ids that must not come.
      include: Item ids to choose among; empty: all.
      filters: Attribute column -> values, one of which the items must have.
      include_seen: Whether items of the history may come.
      time: Seconds since 1970 of the request, for models that read it.
      hidden: Item ids that the user does not want to see.
      forgotten: Whether what is known of the user must not be used.
    """

    user_id: str = ""
    history: tuple[str | Met, ...] = ()
    profile: str = ""
    exclude: tuple[str, ...] = ()
    include: tuple[str, ...] = ()
    filters: Mapping[str, Sequence[str]] = field(default_factory=dict)
    include_seen: bool = False
    time: int | None = None
    hidden: tuple[str, ...] = ()
    forgotten: bool = False


@dataclass(frozen=True)
class Recommended:
    """One recommended item.

    Attributes:
      item_id: Its id.
      title: Its title.
      score: Higher is better; comparable within one answer only.
      source: What it rests on: ``behaviour``, ``text`` or ``popular``.
    """

    item_id: str
    title: str
    score: float
    source: Source


@dataclass(frozen=True, eq=False)
class Found(TopK):
    """Results, and how they came to be.

    Attributes:
      parts: What each part adds to the score, float32 (batch, k); their sum is the score.
      sources: What each source found, int32 (batch, any), 0 where there is nothing.
    """

    parts: Mapping[str, Floats] = field(default_factory=dict)
    sources: Mapping[str, Rows] = field(default_factory=dict)

    @classmethod
    def joined(cls, batch: int, k: int, some: Sequence[tuple[NDArray[np.int64], Found]]) -> Found:
        """One batch of the results of some of its rows each."""
        nothing = TopK.nothing(batch, k)
        parts: dict[str, Floats] = {}
        sources: dict[str, Rows] = {}
        for rows, found in some:
            nothing.scores[rows], nothing.ids[rows] = found.scores, found.ids
            for name, values in found.parts.items():
                parts.setdefault(name, np.zeros((batch, k), np.float32))[rows] = values
            for name, ids in found.sources.items():
                sources.setdefault(name, np.zeros((batch, 0), np.int32))
                wider = ids.shape[1] - sources[name].shape[1]
                sources[name] = np.pad(sources[name], ((0, 0), (0, max(wider, 0))))
                sources[name][rows, : ids.shape[1]] = ids
        return cls(nothing.scores, nothing.ids, parts, sources)


@dataclass(frozen=True, eq=False)
class Ranked:
    """The best items for one request, best first.

    Attributes:
      rows: int32 (n,), catalog rows.
      scores: float32 (n,).
      parts: What each part adds to the score, float32 (n,).
      source: What the answer rests on.
      sources: What each source found, int32 (any,).
      history: int32 (h,), catalog rows of the events that were read, oldest first.
    """

    rows: Rows
    scores: Floats
    parts: Mapping[str, Floats]
    source: Source
    sources: Mapping[str, Rows]
    history: Rows


class Recommender:
    """Answers requests with the models of an engine.

    Args:
      engine: The models.
      catalog: The items; row i has vector i.
      users: The users; row u has the events of user u.
      interactions: What is known of the users, and how popular items are.
      coding: How events become integers.
      vectors: float32 (n + 1, d), candidate vectors; row 0 is zero.
      text: float32 (n + 1, text width), vectors of the items' texts; width 0: none.
      profile: float32 (users, text width), vectors of the users' profiles; width 0: none.
      policy: How scores are put together.
      linear: A linear item-item model as another source of candidates.
      index: An index of the vectors; made if not given.
      directions: In which the ranker reads texts; None: it reads none.
      popularity: float32 (n + 1,), how often each item was met; None: counted in ``interactions``.
    """

    def __init__(
        self,
        engine: Engine,
        catalog: Catalog,
        users: Users,
        interactions: Interactions,
        coding: EventCoding,
        vectors: Vectors,
        text: Floats,
        profile: Floats,
        policy: Policy | None = None,
        linear: LinearItems | None = None,
        index: Index | None = None,
        directions: TextDirections | None = None,
        popularity: Floats | None = None,
    ) -> None:
        self.engine, self.catalog, self.users = engine, catalog, users
        self.interactions, self.coding = interactions, coding
        self.vectors, self.text, self.profile = vectors, text, profile
        self.policy, self.linear = policy or Policy(), linear
        self.directions = directions
        if popularity is None:
            counts = np.bincount(interactions.item, minlength=len(catalog))
            popularity = counts.astype(np.float32)
            popularity[0] = 0
        self.popularity = popularity
        self._histories = Histories.of(interactions, coding)
        self._added = np.zeros(0, np.int32)
        self.index = index or self._made_index()

    def _made_index(self) -> Index:
        rows = np.arange(1, len(self.catalog), dtype=np.int32)
        if len(rows) <= EXACT_LIMIT:
            return make_index(self.vectors[1:], rows)
        # A large catalog is searched approximately anyway, and half the memory is worth more there.
        queries = self.queries(self.typical())
        return make_index(self.vectors[1:], rows, precision="bfloat16", queries=queries)

    def mark(self, stage: str) -> None:
        """Called when a stage of the chain is done, by who times it."""

    def who(
        self,
        history: Interactions,
        users: Rows,
        request_time: NDArray[np.int64] | None = None,
    ) -> Who:
        """Known users with the given events as their histories."""
        known = history is self.interactions
        histories = self._histories if known else Histories.of(history, self.coding)
        return Who(
            histories.take(users),
            self.profile[users],
            self.users.features[users],
            request_time,
        )

    def typical(self) -> Who:
        """Some who may ask, for tuning: known users; made-up ones where nobody is known."""
        rng = np.random.default_rng(0)
        met = np.flatnonzero(np.diff(self.interactions.offsets)).astype(np.int32)
        if len(met):
            return self.who(self.interactions, np.sort(rng.permutation(met)[:_TYPICAL]))
        ids = self.catalog.ids
        rows = rng.integers(1, len(ids), (_TYPICAL, _MET)).tolist()
        told = [Request(history=tuple(ids[i] for i in row)) for row in rows]
        nobody = np.full(len(rows), -1)
        return Who(
            _joined([self._history(-1, request) for request in told]),
            _rows_or_zeros(self.profile, nobody),
            _rows_or_zeros(self.users.features, nobody),
        )

    def lists(
        self,
        history: Interactions,
        users: Rows,
        k: int,
        exclude_history: bool = True,
        request_time: NDArray[np.int64] | None = None,
        *,
        exclude: Ragged | None = None,
        among: Rows | None = None,
        profile: bool = True,
    ) -> dict[str, TopK]:
        """Recommendations for known users, of retrieval alone and of the whole chain.

        Who has no event in ``history`` is answered as :meth:`recommend` answers him.

        Args:
          history: The events that are known; user u's are his history.
          users: int32 (b,), user rows.
          k: Places of a list.
          exclude_history: Whether items of the history are left out.
          request_time: int64 (b,), seconds, or None.
          exclude: b lists of catalog rows, instead of those of the history.
          among: int32 (n,), the catalog rows to choose among; None: all.
          profile: Whether the users' profile texts and attributes are read.

        Returns:
          ``retrieval`` and, if there is more than retrieval, ``ranking``.
        """
        asked = self.who(history, users, request_time)
        if exclude is None and exclude_history:
            exclude = asked.seen
        if not profile:
            asked = replace(
                asked,
                profile=np.zeros_like(asked.profile),
                attributes=np.zeros_like(asked.attributes),
            )
        new = asked.new if profile else np.zeros(len(asked), bool)
        texts = [self.users.texts[u] if n else "" for u, n in zip(users, new, strict=True)]
        words = self._encoded(texts)
        index = self.index if among is None else ExactIndex.build(self.vectors[among], among)

        def found(policy: Policy) -> TopK:
            parts = [TopK(np.zeros((0, k), np.float32), np.zeros((0, k), np.int32))]
            for start in range(0, len(asked), BLOCK):
                rows = np.arange(start, min(start + BLOCK, len(asked)))
                left_out = None if exclude is None else exclude.take(rows)
                told = np.full(len(rows), KEPT, np.float32)
                block = asked.take(rows)
                parts.append(self.answer(block, words[rows], told, k, left_out, index, policy))
            return _stacked(parts)

        out = {"retrieval": found(replace(self.policy, score={"retrieval": 1.0}, newcomer=0.0))}
        if not self.policy.plain:
            out["ranking"] = found(self.policy)
        elif self.linear is not None:
            out["ranking"] = out["retrieval"]
        return out

    def answer(
        self,
        asked: Who,
        words: Floats,
        popular: Floats,
        k: int,
        exclude: Ragged | None,
        index: Index,
        policy: Policy,
    ) -> Found:
        """The ``k`` best items for each: by his events, else by his words, else what is popular.

        Args:
          asked: b users.
          words: float32 (b, text width), vectors of what is said by or of them; zeros: nothing.
          popular: float32 (b,), weight of popularity beside these words.
          k: Places of a list.
          exclude: b lists of catalog rows that must not come.
          index: Its ids are what may come.
          policy: How the scores of those with events are put together.
        """
        if not asked.new.any():
            return self.chain(asked, k, exclude, index, policy)
        some = []
        for rows, new in ((np.flatnonzero(~asked.new), False), (np.flatnonzero(asked.new), True)):
            if len(rows):
                left_out = None if exclude is None else exclude.take(rows)
                found = (
                    self._cold(words[rows], popular[rows], k, left_out, index)
                    if new
                    else self.chain(asked.take(rows), k, left_out, index, policy)
                )
                some.append((rows, found))
        return Found.joined(len(asked), k, some)

    def chain(
        self, asked: Who, k: int, exclude: Ragged | None, index: Index, policy: Policy
    ) -> Found:
        """Retrieve, rank and cut: the chain itself, for those with behaviour to go by."""
        query = self.queries(asked)
        self.mark("encode")
        if policy.plain:
            found = index.search(query, k, exclude)
            alone = np.where(found.ids > 0, found.scores, 0)
            return Found(found.scores, found.ids, {"retrieval": alone}, {"behaviour": found.ids})
        evidence = self.evidence(asked, policy)
        count = max(k, policy.candidates)
        search = Search(asked, query, count, exclude, index, policy, evidence)
        sources = self._sources(search)
        rows = _union(sources)
        parts = self._plain_parts(asked, query, rows, policy, evidence)
        if policy.ranks and 0 < policy.rank < rows.shape[1]:
            rows, parts = _promising(policy, rows, parts, max(policy.rank, k))
        self.mark("retrieve")
        parts |= self._ranker_parts(asked, query, rows, policy, parts)
        score = policy.total(parts)
        told = {n: np.float32(w) * parts[n] for n, w in policy.score.items() if w and n in parts}
        if policy.newcomer:
            prior = policy.prior(asked.events)[:, None] * self.popular(rows)
            score += prior
            told["popularity"] = told.get("popularity", 0) + prior
        score[rows == 0] = -np.inf
        order = best_order(score, rows, k)
        best = _best(score, rows, order, k)
        told = {name: _filled(_along(v, order), k, 0) * (best.ids > 0) for name, v in told.items()}
        self.mark("rank")
        return Found(best.scores, best.ids, told, sources)

    def queries(self, asked: Who) -> Floats:
        """float32 (b, d), query vectors."""
        return self.engine.encode_query(
            asked.histories, self.vectors, asked.profile, asked.attributes, asked.request_time
        )

    def evidence(self, asked: Who, policy: Policy) -> Evidence:
        """What :meth:`candidates` and :meth:`parts` of the same batch and policy share."""
        linear = self.linear if policy.uses("linear") else None
        reads = self.text.shape[1] > 0 and policy.uses("text")
        return Evidence(
            words=self.text_queries(asked, policy) if reads else None,
            linear=linear.scores(asked.seen) if linear is not None else None,
        )

    def candidates(
        self,
        asked: Who,
        query: Floats,
        count: int,
        exclude: Ragged | None = None,
        index: Index | None = None,
        policy: Policy | None = None,
        evidence: Evidence | None = None,
    ) -> Rows:
        """What the sources that count for a policy find.

        Args:
          asked: b users.
          query: float32 (b, d), their query vectors.
          count: How many each source gives.
          exclude: Rows that must not come.
          index: Where to look; None: the whole catalog.
          policy: None: the recommender's own.
          evidence: That of these users and this policy; None: computed here.

        Returns:
          int32 (b, c), distinct catalog rows, and 0 in places that are not used.
        """
        index, policy = index or self.index, policy or self.policy
        evidence = evidence or self.evidence(asked, policy)
        return _union(self._sources(Search(asked, query, count, exclude, index, policy, evidence)))

    def _sources(self, search: Search) -> dict[str, Rows]:
        """Source -> int32 (b, any), what it found; sources that do not apply are left out."""
        found = {name: SOURCES[name].find(self, search) for name in search.policy.sources}
        return {n: np.concatenate(a, axis=1) if a[1:] else a[0] for n, a in found.items() if a}

    def popular(self, rows: Rows) -> Floats:
        """float32, of the shape of ``rows``: logarithm of one more than an item's events."""
        return np.log1p(self.popularity[rows])

    def most_popular(self, users: int, k: int, exclude: Ragged | None, index: Index) -> TopK:
        """The ``k`` items of an index with the most events, for each of so many users."""
        left_out = 0 if exclude is None else int(exclude.lengths.max(initial=0))
        order = self._by_popularity
        if index is not self.index:
            order = order[np.isin(order, index.ids, kind="table")]
        best = np.sort(order[: k + left_out])
        return top_k(np.tile(self.popular(best), (users, 1)), best, k, exclude)

    @functools.cached_property
    def _most_met(self) -> float:
        """Events of the item with the most; at least 1."""
        return max(float(self.popularity.max()), 1.0)

    @functools.cached_property
    def _by_popularity(self) -> Rows:
        """int32 (n,), what may come, the items with the most events first."""
        ids = self.index.ids
        return ids[np.argsort(-self.popularity[ids], kind="stable")]

    def newest(self, count: int) -> Rows:
        """int32 (n,), the items that were added last, newest first."""
        return self._added[-count:][::-1]

    def text_among(self, index: Index) -> Index:
        """The index of the texts of the items that an index holds."""
        return self.text_index if index is self.index else Among(self.text_index, index.ids)

    @functools.cached_property
    def text_index(self) -> Index:
        """Index of the vectors of the items' texts; row i of the catalog has id i."""
        rows, queries = np.arange(1, len(self.catalog), dtype=np.int32), None
        if len(rows) > EXACT_LIMIT:
            asked = self.text_queries(self.typical(), self.policy)
            queries = asked[asked.any(axis=1)] if asked.any() else None
        return make_index(self.text[1:], rows, queries=queries)

    @functools.cached_property
    def described(self) -> Floats:
        """float32 (n + 1, p), the items' texts as the ranker reads them; p may be 0."""
        return self.read(self.text)

    def read(self, vectors: Floats) -> Floats:
        """float32 (b, text width) -> (b, p), texts as the ranker reads them; p may be 0."""
        return self.directions(vectors) if self.directions is not None else vectors[:, :0]

    def text_queries(self, asked: Who, policy: Policy) -> Floats:
        """float32 (b, text width): mean text of a history, recent events first; length 1 or 0."""
        vectors, mask = history_vectors(asked.histories, self.text, policy.history)
        age = np.arange(policy.history)[::-1]
        weight = mask * (policy.text_decay**age).astype(np.float32)
        mixed = np.matmul(weight[:, None], vectors)[:, 0]
        return unit(mixed)

    def parts(
        self,
        asked: Who,
        query: Floats,
        rows: Rows,
        policy: Policy | None = None,
        evidence: Evidence | None = None,
    ) -> dict[str, Floats]:
        """The parts of the score of the given candidates that count for a policy.

        Args:
          asked: b users.
          query: float32 (b, d), their query vectors.
          rows: int32 (b, c), candidates.
          policy: None: the recommender's own.
          evidence: That of these users and this policy; None: what is needed is computed here.

        Returns:
          ``retrieval``, ``linear``, ``text``, ``popularity`` and the ranker's tasks, as far as they
          count -> float32 (b, c).
        """
        policy, evidence = policy or self.policy, evidence or Evidence()
        parts = self._plain_parts(asked, query, rows, policy, evidence)
        return parts | self._ranker_parts(asked, query, rows, policy, parts)

    def _plain_parts(
        self, asked: Who, query: Floats, rows: Rows, policy: Policy, evidence: Evidence
    ) -> dict[str, Floats]:
        """The parts that take no ranker."""
        parts: dict[str, Floats] = {"retrieval": _inner(query, self.vectors, rows)}
        if self.linear is not None and policy.uses("linear"):
            parts["linear"] = (
                self.linear.scores_of(asked.seen, rows)
                if evidence.linear is None
                else _places(evidence.linear, rows)
            )
        if self.text.shape[1] and policy.uses("text"):
            words = evidence.words
            words = self.text_queries(asked, policy) if words is None else words
            parts["text"] = _inner(words, self.text, rows)
        if policy.uses("popularity"):
            parts["popularity"] = self.popular(rows)
        return parts

    def _ranker_parts(
        self, asked: Who, query: Floats, rows: Rows, policy: Policy, plain: Mapping[str, Floats]
    ) -> dict[str, Floats]:
        """What the ranker says, if it has a part, and the linear part, which it reads."""
        if not policy.ranks:
            return {}
        parts: dict[str, Floats] = {}
        linear = plain.get("linear")
        if linear is None:
            linear = np.zeros(rows.shape, np.float32)
            if self.linear is not None:
                linear = parts["linear"] = self.linear.scores_of(asked.seen, rows)
        history, mask = history_vectors(asked.histories, self.vectors, policy.history)
        inputs = {
            "query": query,
            "history": history,
            "history_mask": mask,
            "candidates": self.vectors[rows],
            "attributes": self.catalog.features[rows],
            "user_attributes": asked.attributes,
            "text": self.described[rows],
            "profile": self.read(asked.profile),
            "scalars": scalars(plain["retrieval"], linear, self.popularity[rows]),
        }
        return parts | self.engine.rank(inputs)

    def predictions(self, events: Interactions, history: Interactions) -> dict[str, Floats]:
        """What the ranker says of given events, from histories that do not hold them.

        Args:
          events: n events to predict.
          history: What is known of the users.

        Returns:
          Task -> float32 (n,); empty without a ranker.
        """
        out: dict[str, list[Floats]] = {task: [] for task in self.policy.tasks}
        policy = replace(self.policy, score=dict.fromkeys(self.policy.tasks, 1.0))
        users, first, place = np.unique(events.user, return_index=True, return_inverse=True)
        everyone = self.who(history, users, events.timestamp[first])
        queries = self.queries(everyone)
        for start in range(0, len(events) if out else 0, BLOCK):
            index = place[start : start + BLOCK]
            asked = everyone.take(index)
            rows = events.item[start : start + BLOCK][:, None]
            parts = self.parts(asked, queries[index], rows, policy)
            for task, values in out.items():
                values.append(parts[task][:, 0])
        return {task: np.concatenate([*v, np.zeros(0, np.float32)]) for task, v in out.items()}

    def recommend(self, requests: Sequence[Request], k: int = 10) -> list[list[Recommended]]:
        """Answers requests, each with exactly ``k`` items where ``k`` are allowed.

        Raises:
          InputError: k is below 1, or a filter names an attribute that items do not have.
        """
        return [
            [
                Recommended(self.catalog.ids[row], self.catalog.titles[row], score, best.source)
                for row, score in zip(best.rows[:k].tolist(), best.scores[:k].tolist(), strict=True)
            ]
            for best in self.ranked(requests, k)
        ]

    def ranked(self, requests: Sequence[Request], k: int) -> list[Ranked]:
        """The best of each request with what they rest on: at least ``k`` where so many may come.

        Raises:
          InputError: k is below 1, or a filter names an attribute that items do not have.
        """
        if k < 1:
            raise InputError(f"k must be at least 1, and got {k}")
        out: dict[int, Ranked] = {}
        groups: dict[tuple[object, ...], list[int]] = {}
        for place, request in enumerate(requests):
            filters = sorted((c, tuple(v)) for c, v in request.filters.items())
            # Profiles ask for deeper lists and times for another input; nobody beside them may.
            key = (bool(request.profile), bool(request.time), request.include, *filters)
            groups.setdefault(key, []).append(place)
        for places in groups.values():
            index = self._allowed(requests[places[0]])
            for start in range(0, len(places), BLOCK):
                block = places[start : start + BLOCK]
                answers = self._ranked([requests[p] for p in block], k, index)
                out.update(zip(block, answers, strict=True))
        return [out[place] for place in range(len(requests))]

    def _ranked(self, requests: Sequence[Request], k: int, index: Index) -> list[Ranked]:
        asked, exclude = self.asked(requests)
        words = self._encoded(
            [
                request.profile or (self._profile_text(request) if new else "")
                for request, new in zip(requests, asked.new, strict=True)
            ]
        )
        spoken = np.asarray(words.any(axis=1))
        both = np.flatnonzero(spoken & ~asked.new)
        deep = max(k, FUSED) if len(both) else k
        popular = np.array([TOLD if r.profile else KEPT for r in requests], np.float32)
        found = self.answer(asked, words, popular, deep, exclude, index, self.policy)
        said = np.zeros((0, deep), np.int32)
        if len(both):
            said = self._cold(words[both], popular[both], deep, exclude.take(both), index).ids
        place_of = {int(row): place for place, row in enumerate(both)}
        answers = []
        for row, new in enumerate(asked.new):
            source: Source = "behaviour" if not new else "text" if spoken[row] else "popular"
            start, stop = asked.histories.offsets[row : row + 2]
            history = asked.histories.item[start:stop][-self.policy.history :]
            sources = {name: rows[row] for name, rows in found.sources.items()}
            if row in place_of:
                heard = said[place_of[row]]
                ids, parts = _fused({"behaviour": found.ids[row], "text": heard})
                scores = np.asarray(sum(parts.values()), np.float32)
                sources["text"] = np.union1d(sources.get("text", heard), heard)
            else:
                known = found.ids[row] > 0
                ids, scores = found.ids[row][known], found.scores[row][known]
                parts = {n: v[row][known] for n, v in found.parts.items() if v[row].any()}
            answers.append(Ranked(ids, scores, parts, source, sources, history))
        return answers

    def heard(self, words: str) -> Coverage:
        """How well the text model reads what somebody says.

        Raises:
          InputError: it knows no word of it.
        """
        cover = self.engine.coverage([words])
        if cover.unknown >= 1 or not cover.characters_per_token:
            raise InputError(
                f"the text model knows no word of '{words.strip()[:40]}'; say it in a language "
                'that the model reads, or train with adapt.text = "multilingual-e5-small"'
            )
        return cover

    def _encoded(self, texts: Sequence[str]) -> Floats:
        """float32 (n, text width), vectors of what seekers say; zeros where that is nothing."""
        out = np.zeros((len(texts), self.text.shape[1]), np.float32)
        texts = [text.strip() for text in texts]
        distinct = list(dict.fromkeys(text for text in texts if text))
        if distinct and self.text.shape[1]:
            vector_of = dict(
                zip(distinct, self.engine.encode_text(distinct, query=True), strict=True)
            )
            for row, text in enumerate(texts):
                if text:
                    out[row] = vector_of[text]
        return out

    def asked(self, requests: Sequence[Request]) -> tuple[Who, Ragged]:
        """Those who ask, and the catalog rows that must not come for each of them."""
        rows = [self._row(request) for request in requests]
        histories = _joined([self._history(row, r) for row, r in zip(rows, requests, strict=True)])
        index = np.array(rows)
        times = np.array([r.time or 0 for r in requests], np.int64)
        asked = Who(
            histories,
            _rows_or_zeros(self.profile, index),
            _rows_or_zeros(self.users.features, index),
            times if any(r.time for r in requests) else None,
        )
        excluded = []
        for place, request in enumerate(requests):
            own = histories.alone(place)
            steps = [FILTERS[name].left_out(self, request, own) for name in self.policy.filters]
            excluded.append(np.concatenate([*steps, self.catalog.rows(request.exclude)]))
        return asked, Ragged.of(excluded)

    def _row(self, request: Request) -> int:
        """The user's row; -1 if he is not known or must not be."""
        known = request.user_id and not request.forgotten
        return self.users.row(request.user_id) if known else -1

    def _history(self, row: int, request: Request) -> Histories:
        known = self._histories.alone(row) if row >= 0 else _NO_EVENTS
        newest = int(known.timestamp[-1]) if len(known.item) else int(request.time or 0)
        follows = self._follows(request, newest)
        if not len(follows.item):
            return known
        return _one_after_the_other(known, follows) if len(known.item) else follows

    def _follows(self, request: Request, newest: int) -> Histories:
        """The history that a request brings, after an event at the time ``newest``."""
        names = self.coding.event_names
        if set(map(type, request.history)) <= {str}:  # several times as fast, and the usual case
            rows = self.catalog.rows(request.history)  # type: ignore[arg-type]
            rows = rows[rows > 0]
            n = len(rows)
            code, nothing = self.coding.events(names[:1])[0], np.zeros(n, np.int32)
            when = np.full(n, newest, np.int64)
            return Histories(
                np.array([0, n], np.int64), rows, np.full(n, code, np.int32), nothing, when
            )
        met = self.met(request)
        times = []
        for event in met:
            newest = newest if event.time is None else event.time
            times.append(newest)
        events = self.coding.events([m.event if m.event in names else names[0] for m in met])
        if any(m.rating is not None for m in met):
            told = np.array([np.nan if m.rating is None else m.rating for m in met], np.float32)
            ratings = self.coding.ratings(told)
        else:
            ratings = np.zeros(len(met), np.int32)
        rows, when = self.catalog.rows([m.item_id for m in met]), np.array(times, np.int64)
        return Histories(np.array([0, len(rows)], np.int64), rows, events, ratings, when)

    def met(self, request: Request) -> list[Met]:
        """The events of a request's history whose items are in the catalog."""
        told = map(Met.of, request.history)
        return [event for event in told if self.catalog.row(event.item_id)]

    def _allowed(self, request: Request) -> Index:
        if not (request.include or request.filters or self.policy.blocked):
            return self.index
        allowed = np.ones(len(self.catalog), bool)
        allowed[0] = False
        for column, values in self.policy.blocked.items():
            allowed[self.catalog.having(column, values)] = False
        wanted = [self.catalog.having(column, v) for column, v in request.filters.items()]
        if request.include:
            wanted.append(self.catalog.rows(request.include))
        for rows in wanted:
            among = np.zeros(len(self.catalog), bool)
            among[rows] = True
            allowed &= among
        return Among(self.index, np.flatnonzero(allowed).astype(np.int32))

    def _profile_text(self, request: Request) -> str:
        row = self._row(request)
        return self.users.texts[row] if row >= 0 else ""

    def _cold(
        self, profile: Floats, popular: Floats, k: int, exclude: Ragged | None, index: Index
    ) -> Found:
        """For those without a history: what is like their words, or popular.

        Args:
          profile: float32 (b, text width), vectors of their words; zeros where there are none.
          popular: float32 (b,), weight of popularity beside these.
          k: Places of a list.
          exclude: Rows that must not come.
          index: Its ids are what may come.
        """
        rows, most = index.ids, self._most_met
        share = self.popularity[rows] / most
        scores = np.tile(share.astype(np.float32), (len(profile), 1))
        spoken = np.asarray(profile.any(axis=1))
        if spoken.any():
            everything = len(rows) == len(self.text) - 1  # of which no copy need be made
            texts = self.text[1:] if everything else self.text[rows]
            scores[spoken] = profile[spoken] @ texts.T + popular[spoken, None] * share
        best = top_k(scores, rows, k, exclude)
        told = np.where(best.ids > 0, best.scores, 0)
        common = self.popularity[best.ids] / most
        weight = np.where(spoken, popular, 1)[:, None].astype(np.float32)
        parts = {"popularity": common * weight, "text": told - common * weight}
        said = np.where(spoken[:, None], best.ids, 0)
        return Found(best.scores, best.ids, parts, {"text": said, "popular": best.ids - said})


def unit(vectors: Floats) -> Floats:
    """float32 (n, d), vectors of length 1; zeros stay zeros."""
    length = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    return np.asarray(vectors / np.maximum(length, 1e-9)[:, None], np.float32)


def scalars(retrieval: Floats, linear: Floats, popularity: Floats) -> Floats:
    """float32 (b, c, 3): the numbers named in :data:`SCALARS`, as training and serving see them."""
    return np.stack([retrieval, linear, np.log1p(popularity)], axis=-1).astype(np.float32)


def _one_after_the_other(first: Histories, then: Histories) -> Histories:
    """The history of one user, of two parts."""
    item = np.concatenate([first.item, then.item])
    return Histories(
        np.array([0, len(item)], np.int64),
        item,
        np.concatenate([first.event, then.event]),
        np.concatenate([first.rating, then.rating]),
        np.concatenate([first.timestamp, then.timestamp]),
    )


def history_vectors(histories: Histories, vectors: Vectors, length: int) -> tuple[Floats, Floats]:
    """The last events of each history as vectors, the newest in the last place.

    Returns:
      float32 (b, length, d) and the mask float32 (b, length).
    """
    last = histories.last(length)
    counts = last.lengths
    user = np.repeat(np.arange(len(last)), counts)
    place = np.arange(len(last.item)) - np.repeat(last.offsets[1:], counts) + length
    rows = np.zeros((len(last), length), np.int32)
    mask = np.zeros((len(last), length), np.float32)
    rows[user, place], mask[user, place] = last.item, 1
    return vectors[rows] * mask[:, :, None], mask


def _rows_or_zeros(table: Floats, rows: NDArray[np.int64]) -> Floats:
    """Rows of a table; zeros for those below 0."""
    out = np.zeros((len(rows), table.shape[1]), np.float32)
    out[rows >= 0] = table[rows[rows >= 0]]
    return out


def _stacked(parts: Sequence[TopK]) -> TopK:
    return TopK(np.concatenate([p.scores for p in parts]), np.concatenate([p.ids for p in parts]))


def _places(scores: Floats, rows: Rows) -> Floats:
    """float32 (b, c): the scores (b, n) of the rows (b, c); 0 for rows from n on."""
    known = rows < scores.shape[1]
    out: Floats = np.take_along_axis(scores, np.where(known, rows, 0), axis=1) * known
    return out


def _distinct(rows: Rows) -> Rows:
    """Rows of ids with repeats replaced by 0."""
    ordered = np.sort(rows, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = 0
    return ordered


def _inner(queries: Floats, vectors: Vectors, rows: Rows) -> Floats:
    """float32 (b, c): inner products of queries (b, d) with the vectors of rows (b, c)."""
    out = np.empty(rows.shape, np.float32)
    size = max(1, _CELLS // max(rows.shape[1] * vectors.shape[1], 1))
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        out[part] = np.matmul(vectors[rows[part]], queries[part, :, None])[:, :, 0]
    return out


def best_of(score: Floats, rows: Rows, k: int) -> TopK:
    """The k best candidates of each row, the lower id first on equal scores."""
    return _best(score, rows, best_order(score, rows, k), k)


def best_order(score: Floats, rows: Rows, k: int) -> NDArray[np.intp]:
    """int (b, at most k): places of the best candidates, the lower id first on equal scores."""
    order: NDArray[np.intp] = np.lexsort((rows, -score), axis=1)[:, :k]
    return order


def _best(score: Floats, rows: Rows, order: NDArray[np.intp], k: int) -> TopK:
    scores = _filled(_along(score, order), k, -np.inf)
    return TopK(scores, np.where(scores > -np.inf, _filled(_along(rows, order), k, 0), 0))


def _along(values: NDArray[Any], order: NDArray[np.intp]) -> NDArray[Any]:
    """What ``np.take_along_axis`` gives for axis 1, in a third of its time for a short batch."""
    found: NDArray[Any] = values[np.arange(len(values))[:, None], order]
    return found


def _filled(values: NDArray[Any], k: int, fill: float) -> NDArray[Any]:
    """(b, k): columns that are missing, filled."""
    if values.shape[1] == k:
        return values
    out = np.full((len(values), k), fill, values.dtype)
    out[:, : values.shape[1]] = values
    return out


def _fused(lists: Mapping[str, Rows]) -> tuple[Rows, dict[str, Floats]]:
    """Lists as one, by reciprocal ranks (Cormack et al. 2009, with their constant 60).

    Returns:
      int32 (n,), best first, and what each list adds to their scores, float32 (n,).
    """
    ids = functools.reduce(np.union1d, lists.values())
    ids = ids[ids > 0]
    parts = {name: np.zeros(len(ids), np.float32) for name in lists}
    for name, found in lists.items():
        found = found[found > 0]
        parts[name][np.searchsorted(ids, found)] = 1 / (61 + np.arange(len(found)))
    order = np.argsort(-np.asarray(sum(parts.values())), kind="stable")
    return ids[order].astype(np.int32), {name: values[order] for name, values in parts.items()}


def _union(sources: Mapping[str, Rows]) -> Rows:
    """int32 (b, c), what all sources found, once each, and 0 in places that are not used."""
    found = list(sources.values())
    return _distinct(np.concatenate(found, axis=1)) if found else np.zeros((0, 0), np.int32)


def _promising(
    policy: Policy, rows: Rows, parts: Mapping[str, Floats], count: int
) -> tuple[Rows, dict[str, Floats]]:
    """The candidates with the best score without the ranker, and their parts."""
    score = policy.total(parts)
    score[rows == 0] = -np.inf
    # Of the last ones alone is it decided who stays, so their order does not matter.
    order = np.sort(np.argpartition(-score, count - 1, axis=1)[:, :count], axis=1)
    return _along(rows, order), {name: _along(values, order) for name, values in parts.items()}


_NOTHING = np.zeros(0, np.int32)
_NO_EVENTS = Histories(np.zeros(2, np.int64), _NOTHING, _NOTHING, _NOTHING, np.zeros(0, np.int64))


def _joined(histories: Sequence[Histories]) -> Histories:
    lengths = [len(h.item) for h in histories]
    return Histories(
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([h.item for h in histories]),
        np.concatenate([h.event for h in histories]),
        np.concatenate([h.rating for h in histories]),
        np.concatenate([h.timestamp for h in histories]),
    )
