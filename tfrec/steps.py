"""Steps: what finds, leaves out and orders candidates, each a small class with one method, by name.

The names stand in a bundle's ``policy.toml``. A step of your own is registered under a new name in
a module that ``plugins`` there names::

    from tfrec import steps

    @steps.RERANKERS.register("shuffled")
    class Shuffled:
        def order(self, slate: steps.Slate, settings: steps.Settings) -> steps.Slate:
            return slate.take(slate.random.permutation(len(slate)), "shuffled")
"""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from tfrec.config import StepsConfig
from tfrec.errors import ConfigError
from tfrec.index import Index, Ragged, top_k

if TYPE_CHECKING:
    from tfrec.data.sequences import Histories
    from tfrec.recommender import Evidence, Policy, Recommender, Request, Who

Floats = NDArray[np.float32]
Rows = NDArray[np.int32]
Settings = StepsConfig
Step = TypeVar("Step")

_NEWEST = 64
_DAY = 86_400.0


class Registry(Generic[Step]):
    """Steps of one kind by name.

    Args:
      kind: What they are called in messages.
    """

    def __init__(self, kind: str) -> None:
        self._kind = kind
        self._steps: dict[str, Step] = {}

    def register(self, name: str) -> Callable[[type[Step]], type[Step]]:
        """A decorator: an instance of the class is the step of this name."""

        def add(made: type[Step]) -> type[Step]:
            self._steps[name] = made()
            return made

        return add

    def __getitem__(self, name: str) -> Step:
        """The step of this name.

        Raises:
          ConfigError: there is none.
        """
        if name not in self._steps:
            known = ", ".join(self._steps)
            raise ConfigError(
                f"there is no {self._kind} '{name}'; there are: {known}. A module with one of your "
                "own is named under plugins"
            )
        return self._steps[name]


@dataclass(frozen=True, eq=False)
class Search:
    """What sources are asked.

    Attributes:
      asked: b users, each with some events.
      query: float32 (b, d), their query vectors.
      count: How many candidates a source gives.
      exclude: Rows that must not come.
      index: Its ids are what may come.
      policy: How scores are put together.
      evidence: What was computed for the batch.
    """

    asked: Who
    query: Floats
    count: int
    exclude: Ragged | None
    index: Index
    policy: Policy
    evidence: Evidence


class Source(Protocol):
    """Finds candidates."""

    def find(self, chain: Recommender, search: Search) -> list[Rows]:
        """Arrays int32 (b, any) of catalog rows, 0 where there is nothing; none: does not apply."""


class Filter(Protocol):
    """Leaves items out."""

    def left_out(self, chain: Recommender, request: Request, history: Histories) -> Rows:
        """int32 (n,), catalog rows that must not come for this request.

        Args:
          chain: Whose catalog it is.
          request: What is asked for.
          history: The events that are known of who asks: a batch of one.
        """


class Reranker(Protocol):
    """Orders the best of the ranked anew."""

    def order(self, slate: Slate, settings: Settings) -> Slate:
        """The slate in another order, with other scores, or with fewer items."""


SOURCES: Registry[Source] = Registry("source of candidates")
FILTERS: Registry[Filter] = Registry("filter")
RERANKERS: Registry[Reranker] = Registry("re-ranking step")


@SOURCES.register("behaviour")
class Behaviour:
    """What the two-tower and the linear model find for a history."""

    def find(self, chain: Recommender, search: Search) -> list[Rows]:
        """See :class:`Source`."""
        index, exclude, count = search.index, search.exclude, search.count
        found = [index.search(search.query, count, exclude).ids]
        linear = search.evidence.linear
        if linear is not None:
            ids = index.ids[index.ids < linear.shape[1]]
            found.append(top_k(linear[:, ids], ids, min(count, max(len(ids), 1)), exclude).ids)
        return found


@SOURCES.register("text")
class Text:
    """What reads like the history."""

    def find(self, chain: Recommender, search: Search) -> list[Rows]:
        """See :class:`Source`."""
        words = search.evidence.words
        if words is None:
            return []
        near = chain.text_among(search.index)
        alike = near.search(words, search.count, search.exclude).ids
        return [alike * words.any(axis=1, keepdims=True)]  # nothing is like no text


@SOURCES.register("popular")
class Popular:
    """What most have met, for those with few events."""

    def find(self, chain: Recommender, search: Search) -> list[Rows]:
        """See :class:`Source`."""
        few = np.flatnonzero(search.policy.prior(search.asked.events))
        if not len(few):
            return []
        exclude = None if search.exclude is None else search.exclude.take(few)
        found = np.zeros((len(search.asked), search.count), np.int32)
        found[few] = chain.most_popular(len(few), search.count, exclude, search.index).ids
        return [found]


@SOURCES.register("new")
class New:
    """The items that were added last, which no event taught anything yet."""

    def find(self, chain: Recommender, search: Search) -> list[Rows]:
        """See :class:`Source`."""
        new = chain.newest(_NEWEST)
        new = new[np.isin(new, search.index.ids)] if len(new) else new
        if not len(new):
            return []
        scores = search.query @ chain.vectors[new].T
        return [top_k(scores, new, min(search.count, len(new)), search.exclude).ids]


@FILTERS.register("seen")
class Seen:
    """The items of the history, unless the request wants them."""

    def left_out(self, chain: Recommender, request: Request, history: Histories) -> Rows:
        """See :class:`Filter`."""
        if request.include_seen:
            return history.item[:0]
        if set(map(type, request.history)) <= {str}:
            return history.item
        met = chain.met(request)
        if not any(event.again for event in met):
            return history.item
        known = history.item[: len(history.item) - len(met)]
        counts = [event.item_id for event in met if not event.again]
        return np.concatenate([known, chain.catalog.rows(counts)])


@FILTERS.register("hidden")
class Hidden:
    """What the user does not want to see."""

    def left_out(self, chain: Recommender, request: Request, history: Histories) -> Rows:
        """See :class:`Filter`."""
        return chain.catalog.rows(request.hidden)


@dataclass(frozen=True, eq=False)
class Slate:
    """The best of one answer, best first.

    Attributes:
      rows: int32 (n,), catalog rows.
      scores: float32 (n,).
      vectors: float32 (n, d), of length 1.
      values: Attribute -> values of each of the n items.
      age: float64 (n,), seconds since an item was added; infinite for those of the bundle.
      places: How many of them will be shown.
      diversity: 0: relevance alone; 1: all variety.
      random: Of this request alone.
      propensity: float32 (n,), the chance of each to stand where it stands.
      moved: (n,), name of the last step that moved each; empty: none.
    """

    rows: Rows
    scores: Floats
    vectors: Floats
    values: Callable[[str], list[list[str]]]
    age: NDArray[np.float64]
    places: int
    diversity: float
    random: np.random.Generator
    propensity: Floats
    moved: tuple[str, ...]
    before: NDArray[np.int64] = field(default_factory=lambda: np.zeros(0, np.int64))

    def __len__(self) -> int:
        return len(self.rows)

    def take(self, order: Sequence[int] | NDArray[np.integer], by: str) -> Slate:
        """Those of the given places in their order; ``by`` is noted where an item moved."""
        order = np.asarray(order, np.int64)
        moved = tuple(
            by if place != new else self.moved[place] for new, place in enumerate(order.tolist())
        )
        old = self.values
        return replace(
            self,
            rows=self.rows[order],
            scores=self.scores[order],
            vectors=self.vectors[order],
            values=lambda column: [old(column)[place] for place in order.tolist()],
            age=self.age[order],
            propensity=self.propensity[order],
            moved=moved,
            before=self.before[order],
        )

    @property
    def relevance(self) -> Floats:
        """float32 (n,), the scores between 0 and 1; all 1 where they are equal."""
        low, high = float(self.scores.min()), float(self.scores.max())
        return np.asarray((self.scores - low) / (high - low) if high > low else self.scores * 0 + 1)


@RERANKERS.register("freshness")
class Freshness:
    """Adds to the scores of new items, less the older they are."""

    def order(self, slate: Slate, settings: Settings) -> Slate:
        """See :class:`Reranker`."""
        if not settings.freshness or not np.isfinite(slate.age).any():
            return slate
        gain = 0.5 ** (slate.age / (settings.half_life_days * _DAY))
        gained = slate.scores + settings.freshness * float(slate.scores.std()) * gain
        scores = np.asarray(gained, np.float32)
        fresh = replace(slate, scores=scores)
        return fresh.take(np.argsort(-scores, kind="stable"), "freshness")


@RERANKERS.register("diversity")
class MaximalMarginalRelevance:
    """Each place goes to who is relevant and unlike those before (Carbonell and Goldstein 1998)."""

    def order(self, slate: Slate, settings: Settings) -> Slate:
        """See :class:`Reranker`."""
        share = slate.diversity
        if not share:
            return slate
        gain = (1 - share) * slate.relevance
        alike = slate.vectors @ slate.vectors.T
        nearest = np.full(len(slate), -np.inf, np.float32)
        chosen: list[int] = []
        for _ in range(min(slate.places, len(slate))):
            worth = gain - share * nearest if chosen else gain.copy()
            worth[chosen] = -np.inf
            chosen.append(int(np.argmax(worth)))
            nearest = np.maximum(nearest, alike[chosen[-1]])
        return slate.take(_first(chosen, len(slate)), "diversity")


@RERANKERS.register("caps")
class Caps:
    """No more of the same value in a list than allowed, as long as there are others."""

    def order(self, slate: Slate, settings: Settings) -> Slate:
        """See :class:`Reranker`."""
        if not settings.caps:
            return slate
        columns = [(slate.values(column), most) for column, most in settings.caps.items()]
        counts: list[Counter[str]] = [Counter() for _ in columns]
        first: list[int] = []
        late: list[int] = []
        for place in range(len(slate)):
            values = [set(column[place]) for column, _ in columns]
            full = any(
                counted[value] >= most
                for own, counted, (_, most) in zip(values, counts, columns, strict=True)
                for value in own
            )
            (late if full else first).append(place)
            if not full:
                for own, counted in zip(values, counts, strict=True):
                    counted.update(own)
        return slate.take(first + late, "caps")


@RERANKERS.register("exploration")
class Exploration:
    """Gives a share of the places to any of those that follow, drawn evenly, and says how likely.

    Place by place: with probability 1 - e the next in order, with e one of all that are left. What
    only made way for it counts as not moved.
    """

    def order(self, slate: Slate, settings: Settings) -> Slate:
        """See :class:`Reranker`."""
        share = settings.exploration
        if not share:
            return slate
        left, chosen, chances = list(range(len(slate))), [], []
        moved = list(slate.moved)
        for _ in range(min(slate.places, len(slate))):
            drawn = slate.random.random() < share
            at = int(slate.random.integers(len(left))) if drawn else 0
            chances.append(share / len(left) + (1 - share) * (at == 0))
            if at:
                moved[left[at]] = "exploration"
            chosen.append(left.pop(at))
        order = chosen + left
        shown = slate.take(order, "exploration")
        propensity = shown.propensity.copy()
        propensity[: len(chances)] *= np.array(chances, np.float32)
        return replace(shown, propensity=propensity, moved=tuple(moved[place] for place in order))


def _first(chosen: Sequence[int], n: int) -> NDArray[np.int64]:
    """The chosen places, then the others in their order."""
    others = np.delete(np.arange(n), chosen)
    return np.concatenate([np.array(chosen, np.int64), others])


def check(settings: Settings, attributes: Mapping[str, object]) -> None:
    """Imports plugins and refuses names that no step and no attribute has.

    Raises:
      ConfigError: there is no such module, step or attribute.
    """
    for module in settings.plugins:
        try:
            importlib.import_module(module)
        except Exception as error:
            raise ConfigError(f"steps.plugins names '{module}', which fails: {error}") from error
    for registry, names in (
        (SOURCES, settings.sources),
        (FILTERS, settings.filters),
        (RERANKERS, settings.rerank),
    ):
        for name in names:
            registry[name]
    for key, columns in (("caps", settings.caps), ("blocked", settings.blocked)):
        for column in columns:
            if column not in attributes:
                known = ", ".join(attributes) or "none"
                raise ConfigError(
                    f"steps.{key} names the attribute '{column}', and items have: {known}"
                )


def reranked(slate: Slate, settings: Settings) -> Slate:
    """The slate after all re-ranking steps of the settings."""
    for name in settings.rerank:
        if len(slate):
            slate = RERANKERS[name].order(slate, settings)
    return slate
