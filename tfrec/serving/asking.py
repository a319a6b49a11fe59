"""Asking: a request, and what is known of who asks -> lists with what they rest on."""

from __future__ import annotations

import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.config import StepsConfig
from tfrec.data.sequences import RATING_BUCKETS
from tfrec.index import Ragged, TopK
from tfrec.recommender import Floats, Met, Policy, Ranked, Recommender, Request, Rows, Who, unit
from tfrec.serving.live import LiveRecommender
from tfrec.serving.schemas import Past, RecommendBody, Shelf
from tfrec.serving.served import diversity as diversity_of
from tfrec.serving.state import Event
from tfrec.steps import Slate, reranked

Known = tuple[Who, Ragged]
"""Who asks and what must not come for him, as :meth:`Recommender.asked` gives them for one."""

HIDES = frozenset({"hide", "dislike"})
"""Events after which an item does not come again; another event takes that back."""

_NEAREST = 3
_LIKED = frozenset({"like", "purchase", "rating"})
_BECAUSE = 2  # shelves about an item that was liked
_FAMILIAR = 20
_TASTE = 0.1
_TITLE = 0.3
_LARGEST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, eq=False)
class Ask:
    """One request, with what the state knows of who asks.

    Attributes:
      body: What was sent.
      request_id: Also what exploration is drawn by.
      events: The user's acknowledged events, in their order.
      forgotten: Whether what the bundle knows of him must not be used.
      shelves: What lists are wanted; empty: one.
    """

    body: RecommendBody
    request_id: str
    events: Sequence[Event] = ()
    forgotten: bool = False
    shelves: tuple[Shelf, ...] = ()


@dataclass(frozen=True, eq=False)
class Listed:
    """A list to be shown.

    Attributes:
      items: As the answer has them.
      rows: int32 (n,), their catalog rows.
      propensity: float32 (n,).
      diversity: See :func:`diversity`.
    """

    items: list[dict[str, Any]]
    rows: Rows
    propensity: Floats
    diversity: float | None


def served_policy(policy: Policy, steps: StepsConfig, finds: int) -> Policy:
    """How a server finds and ranks, by the learned policy and the steps of ``policy.toml``.

    Args:
      policy: Learned.
      steps: As they stand there.
      finds: How many of the sources always find something.
    """
    return replace(
        policy,
        candidates=-(-steps.retrieve // max(finds, 1)),
        rank=steps.rank,
        sources=tuple(steps.sources),
        filters=tuple(steps.filters),
        blocked=dict(steps.blocked),
    )


def request_of(ask: Ask, chain: Recommender, steps: StepsConfig) -> Request:
    """What the recommender is asked: a user's own events first, then the request's history."""
    hidden: dict[str, bool] = {}
    history: list[str | Met] = []
    for event in ask.events:
        hidden[event.item_id] = event.event in HIDES
        if event.event not in HIDES:
            history.append(_met(event, chain, steps))
    history += [_past(h, chain) if isinstance(h, Past) else h for h in ask.body.history]
    body, context = ask.body, ask.body.context
    return Request(
        user_id=body.user_id or "",
        history=tuple(history),
        profile=body.profile or "",
        exclude=tuple(body.exclude),
        include=tuple(body.include),
        filters=body.filters,
        time=int(context.time) if context and context.time is not None else None,
        hidden=tuple(item for item, gone in hidden.items() if gone),
        forgotten=ask.forgotten,
    )


def _met(event: Event, chain: Recommender, steps: StepsConfig) -> Met:
    rating = _rating(event.event, event.value if event.event == "rating" else None, chain)
    again = bool(steps.seen) and event.event not in steps.seen
    return Met(event.item_id, event.event, rating, int(event.timestamp), again)


def _past(told: Past, chain: Recommender) -> Met:
    when = None if told.timestamp is None else int(told.timestamp)
    rating = _rating(told.event, told.value if told.event in ("rating", "") else None, chain)
    return Met(told.item_id, told.event, rating, when)


def _rating(event: str, value: float | None, chain: Recommender) -> float | None:
    """A rating on the scale that the models know, which a like has the top of."""
    low, high = chain.coding.rating_min, chain.coding.rating_max
    if high <= low:
        return value if value is None else float(np.clip(value, -_LARGEST, _LARGEST))
    if event == "like":
        return high
    return value if value is None else min(max(value, low), high)


def answers(
    asks: Sequence[Ask], chain: LiveRecommender, steps: StepsConfig
) -> list[dict[str, Listed]]:
    """The lists of each request: ``items`` alone, or those of its shelves.

    Raises:
      InputError: a filter names an attribute that items do not have, or the text model knows no
        word of a profile.
    """
    for ask in asks:
        if ask.body.profile and chain.text.shape[1]:
            chain.heard(ask.body.profile)
    requests = [request_of(ask, chain, steps) for ask in asks]
    keep = max([steps.keep, *(ask.body.k + _FAMILIAR * bool(ask.shelves) for ask in asks)])
    ranked = chain.ranked(requests, keep)
    out = []
    for ask, request, best in zip(asks, requests, ranked, strict=True):
        if ask.shelves:
            out.append(_shelves(ask, request, best, chain, steps))
        else:
            out.append({"items": listed(ask, best, chain, steps)})
    chain.mark("rerank")
    return out


def listed(ask: Ask, best: Ranked, chain: LiveRecommender, steps: StepsConfig) -> Listed:
    """A ranked list after the re-ranking steps, as the answer has it."""
    k = ask.body.k
    diversity = ask.body.diversity
    slate = reranked(
        _slate(ask, best, chain, k, steps.diversity if diversity is None else diversity), steps
    )
    places = slate.before[:k].tolist()
    rows, items = slate.rows[:k], []
    for row, place, score, parts, chance, by, source in zip(
        rows.tolist(),
        places,
        slate.scores.tolist(),
        _parts(best, places),
        slate.propensity.tolist(),
        slate.moved,
        _sources(best, rows),
        strict=False,
    ):
        item = {
            "item_id": chain.catalog.ids[row],
            "title": chain.catalog.titles[row],
            "score": round(score, 6),
            "source": "exploration" if by == "exploration" else source,
            "attributes": chain.attributes_of(row),
            "parts": parts,
            "propensity": chance,
        }
        items.append(item)
        if ask.body.explain:
            item["explanation"] = _explained(chain, best, place, by)
    return Listed(items, rows, slate.propensity[:k], diversity_of(slate.vectors[:k]))


def _slate(ask: Ask, best: Ranked, chain: LiveRecommender, k: int, diversity: float) -> Slate:
    n = len(best.rows)
    rows = best.rows.tolist()

    def values(column: str) -> list[list[str]]:
        return [chain.attributes_of(row).get(column, []) for row in rows]

    return Slate(
        rows=best.rows,
        scores=best.scores,
        vectors=unit(chain.vectors[best.rows]),
        values=values,
        age=_ages(chain, rows),
        places=k,
        diversity=diversity,
        random=np.random.default_rng(zlib.crc32(ask.request_id.encode())),
        propensity=np.ones(n, np.float32),
        moved=("",) * n,
        before=np.arange(n),
    )


def _ages(chain: LiveRecommender, rows: list[int]) -> NDArray[np.float64]:
    """float64 (n,), seconds since items were put, at least 0; infinite for the bundle's."""
    if not chain.created:
        return np.full(len(rows), np.inf)
    now = time.time()
    age = np.array([now - chain.created.get(row, -np.inf) for row in rows], np.float64)
    return np.maximum(age, 0)


def _parts(best: Ranked, places: list[int]) -> list[dict[str, float]]:
    """What each part of the score gave the items in these places."""
    if not best.parts:
        return [{} for _ in places]
    table = np.array([values[places] for values in best.parts.values()], np.float64)
    return [dict(zip(best.parts, row, strict=True)) for row in table.T.round(6).tolist()]


def _sources(best: Ranked, rows: Rows) -> list[str]:
    """The first source that found each item, those that go by the user before the others."""
    out: list[str] = [best.source] * len(rows)
    for name in ("popular", "new", "text", "behaviour"):
        if name in best.sources:
            found = (rows[:, None] == best.sources[name]).any(axis=1)
            for place in np.flatnonzero(found).tolist():
                out[place] = name
    return out


def _explained(chain: LiveRecommender, best: Ranked, place: int, moved: str) -> dict[str, Any]:
    row = int(best.rows[place])
    near = _nearest(chain, best.history, row)
    found = [name for name, rows in best.sources.items() if (rows == row).any()]
    return {
        "sentence_key": "because_of" if near and best.source != "popular" else best.source,
        "because": near,
        "sources": found or [best.source],
        "rank_before": place + 1,
        "moved": moved or None,
    }


def _nearest(chain: LiveRecommender, history: Rows, row: int) -> list[dict[str, Any]]:
    """The items of a history that are most like an item, by their vectors."""
    met = np.unique(history[(history > 0) & (history != row)])
    if not len(met):
        return []
    alike = unit(chain.vectors[met]) @ unit(chain.vectors[[row]])[0]
    order = np.argsort(-alike, kind="stable")[:_NEAREST]
    return [
        {
            "item_id": chain.catalog.ids[int(met[at])],
            "title": chain.catalog.titles[int(met[at])],
            "similarity": round(float(alike[at]), 4),
        }
        for at in order.tolist()
    ]


# --- shelves, and lists that are no recommendation of the chain ----------------------------------


def _shelves(
    ask: Ask, request: Request, best: Ranked, chain: LiveRecommender, steps: StepsConfig
) -> dict[str, Listed]:
    out: dict[str, Listed] = {}
    if "for_you" in ask.shelves:
        out["for_you"] = listed(ask, best, chain, steps)
    shown = {int(row) for some in out.values() for row in some.rows}
    known = chain.asked([request])
    if "because" in ask.shelves:
        for row in _liked(ask, request, chain, known):
            near = similar(chain, row, ask.body.k, known, shown)
            if len(near.rows):
                out[f"because:{chain.catalog.ids[row]}"] = listed(ask, near, chain, _PLAIN)
                shown |= set(near.rows.tolist())
    if "new_to_you" in ask.shelves and len(best.history):
        fresh = _unfamiliar(best, chain, shown, ask.body.k)
        out["new_to_you"] = listed(ask, fresh, chain, _PLAIN)
    if "popular" in ask.shelves:
        out["popular"] = listed(ask, popular(chain, ask.body.k, known), chain, _PLAIN)
    return out


_PLAIN = StepsConfig(rerank=[])


def _liked(ask: Ask, request: Request, chain: LiveRecommender, known: Known) -> list[int]:
    """Catalog rows of what was liked last, else met last."""
    hidden = set(chain.catalog.rows(request.hidden).tolist())
    middle = (chain.coding.rating_min + chain.coding.rating_max) / 2
    liked = [
        chain.catalog.row(e.item_id)
        for e in ask.events
        if e.event in _LIKED and (e.event != "rating" or (e.value or 0) > middle)
    ]
    if not any(liked):
        met = known[0].histories
        good = (met.rating == 0) | (met.rating > RATING_BUCKETS // 2)
        liked = met.item[good].tolist()
    rows = (row for row in reversed(liked) if row and row not in hidden)
    return list(dict.fromkeys(rows))[:_BECAUSE]


def _unfamiliar(best: Ranked, chain: LiveRecommender, shown: set[int], k: int) -> Ranked:
    """Of the ranked, those that are least like anything in the history, best first."""
    left = np.array([place for place, row in enumerate(best.rows) if int(row) not in shown], int)
    if not len(left):
        return _taken(best, left)
    met = unit(chain.vectors[best.history[-_FAMILIAR:]])
    familiar = (unit(chain.vectors[best.rows[left]]) @ met.T).max(axis=1)
    return _taken(best, np.sort(left[np.argsort(familiar, kind="stable")[:k]]))


def _taken(best: Ranked, places: NDArray[np.integer]) -> Ranked:
    parts = {name: values[places] for name, values in best.parts.items()}
    return replace(best, rows=best.rows[places], scores=best.scores[places], parts=parts)


def similar(
    chain: LiveRecommender, row: int, k: int, known: Known, shown: set[int] | None = None
) -> Ranked:
    """The items most like one, by the cosine of their vectors, without what must not come."""
    history, gone = known[0].histories.item, known[1].ids
    exclude = Ragged.of([np.concatenate([gone, [row], np.array(sorted(shown or ()), np.int32)])])
    query = unit(chain.vectors[[row]])
    found = chain.index.search(query, 4 * k, exclude)
    rows = found.ids[0][found.ids[0] > 0]
    alike = unit(chain.vectors[rows]) @ query[0]
    order = np.argsort(-alike, kind="stable")[:k]
    scores = np.asarray(alike[order], np.float32)
    return Ranked(rows[order], scores, {"similarity": scores}, "behaviour", {}, history)


def popular(chain: LiveRecommender, k: int, known: Known) -> Ranked:
    """What most have met, without what must not come."""
    asked, exclude = known
    found = chain.most_popular(1, k, exclude, chain.index)
    return _ranked(found, "popularity", "popular", asked.histories.item)


def search(chain: LiveRecommender, words: str, k: int, request: Request) -> Ranked:
    """Items by words: how alike their texts are, a title that holds the words, and taste.

    Raises:
      InputError: the models read no texts.
    """
    query = chain.engine.encode_text([words], query=True)
    asked, _ = chain.asked([request])
    exclude = Ragged.of([chain.catalog.rows(request.hidden)])
    found = chain.text_index.search(query, max(4 * k, 100), exclude)
    rows = found.ids[0][found.ids[0] > 0]
    named = chain.titled(words)
    gone = np.concatenate([exclude.ids, rows])
    rows = np.concatenate([rows, named[~np.isin(named, gone)]])
    parts = {"text": chain.text[rows] @ query[0]}
    parts["title"] = np.where(np.isin(rows, named), np.float32(_TITLE), 0).astype(np.float32)
    if not asked.new[0]:
        taste = chain.vectors[rows] @ chain.queries(asked)[0]
        parts["retrieval"] = _TASTE * (taste - taste.mean()) / max(float(taste.std()), 1e-6)
    scores = np.asarray(sum(parts.values()), np.float32)
    order = np.argsort(-scores, kind="stable")[:k]
    return Ranked(
        rows[order], scores[order], {n: v[order] for n, v in parts.items()}, "text", {},
        asked.histories.item,
    )  # fmt: skip


def _ranked(found: TopK, part: str, source: Any, history: Rows) -> Ranked:
    known = found.ids[0] > 0
    scores = found.scores[0][known]
    return Ranked(found.ids[0][known], scores, {part: scores}, source, {}, history)


def shelf_answer(lists: Mapping[str, Listed], chain: LiveRecommender) -> list[dict[str, Any]]:
    """Shelves as the answer has them."""
    out = []
    for key, some in lists.items():
        name, _, item = key.partition(":")
        row = chain.catalog.row(item)
        about = {"item_id": item, "title": chain.catalog.titles[row]} if row else None
        out.append({"key": name, "about": about, "items": some.items})
    return out
