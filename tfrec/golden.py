"""Golden: questions with the trained model's own answers, to be asked again of an export."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from tfrec.artifact import write_json
from tfrec.bundle import load_rows
from tfrec.errors import ArtifactError
from tfrec.recommender import Floats, Recommender, Request, Rows, Who

_FILE = "golden.json"
_PEOPLE, _EVENTS, _TEXTS, _K, _CANDIDATES = 32, 12, 64, 10, 20


@dataclass(frozen=True, eq=False)
class Golden:
    """Questions and what a recommender answered.

    Attributes:
      texts: Texts of items, and words that somebody might look for.
      requests: Who asks for recommendations, and what is known of them.
      items: The ids of the items that each was recommended.
      text: float32 (texts, text width), their vectors; width 0 without a text model.
      query: float32 (requests, d), query vectors.
      candidate: float32 (n, d), vectors of the first items as if they were new; 0 rows: there are
        none without an id.
      candidates: int32 (requests, c), the rows that the ranker was asked about.
      tasks: float32 (requests, c, tasks), what it said.
    """

    texts: tuple[str, ...]
    requests: tuple[Request, ...]
    items: tuple[tuple[str, ...], ...]
    text: Floats
    query: Floats
    candidate: Floats
    candidates: Any
    tasks: Floats

    @classmethod
    def ask(cls, recommender: Recommender) -> Golden:
        """Makes up questions from the catalog and the histories, and asks them."""
        catalog, interactions = recommender.catalog, recommender.interactions
        known = [text for text in catalog.texts if text] if recommender.text.shape[1] else []
        spread = np.linspace(0, len(known) - 1, min(_TEXTS, len(known))).astype(int)
        texts = tuple(known[i] for i in spread)
        met = np.flatnonzero(np.diff(interactions.offsets))
        people = met[np.linspace(0, len(met) - 1, min(_PEOPLE, len(met))).astype(int)]
        rows = interactions.histories(people.astype(np.int32))
        if not len(met):  # nobody is known: as if the items came in their order
            order = np.arange(1, len(catalog), dtype=np.int32)
            rows = [order[start : start + _EVENTS] for start in range(0, len(order), _EVENTS)]
            rows = rows[:_PEOPLE]
        said = texts or ("",)
        requests = [
            Request(history=tuple(catalog.ids[i] for i in history[-_EVENTS:])) for history in rows
        ]
        requests += [Request(user_id=recommender.users.ids[u]) for u in people[:4]]
        requests += [replace(r, profile=said[i % len(said)]) for i, r in enumerate(requests[:4])]
        requests += [Request(profile=text) for text in said[:4]]
        return cls.answered(recommender, texts, tuple(requests))

    @classmethod
    def answered(
        cls,
        recommender: Recommender,
        texts: tuple[str, ...],
        requests: tuple[Request, ...],
        candidates: Any = None,
    ) -> Golden:
        """What a recommender answers.

        Args:
          recommender: Is asked.
          texts: See above.
          requests: See above.
          candidates: See above; None: its own.
        """
        text = np.zeros((0, recommender.text.shape[1]), np.float32)
        if texts:
            text = recommender.engine.encode_text(texts)
        asked, _ = recommender.asked(requests)
        query = recommender.queries(asked)
        if candidates is None:
            found = recommender.candidates(asked, query, _CANDIDATES)
            items_first = np.argsort(found == 0, axis=1, kind="stable")[:, :_CANDIDATES]
            candidates = np.take_along_axis(found, items_first, axis=1)
        answers = recommender.recommend(requests, _K)
        return cls(
            texts,
            requests,
            tuple(tuple(item.item_id for item in answer) for answer in answers),
            text,
            query,
            new_items(recommender),
            candidates,
            predictions(recommender, asked, query, candidates),
        )

    def save(self, folder: Path) -> None:
        """Writes JSON and .npy files."""
        folder.mkdir(parents=True, exist_ok=True)
        told = {
            "texts": self.texts,
            "requests": [asdict(request) for request in self.requests],
            "items": self.items,
        }
        write_json(folder / _FILE, told)
        for name in ("text", "query", "candidate", "candidates", "tasks"):
            np.save(folder / f"{name}.npy", getattr(self, name), allow_pickle=False)

    @classmethod
    def load(cls, folder: Path) -> Golden:
        """Reads what :meth:`save` wrote.

        Raises:
          ArtifactError: a file is missing or damaged.
        """
        try:
            told = json.loads((folder / _FILE).read_text("utf-8"))
            requests = tuple(_request(tree) for tree in told["requests"])
            items = tuple(tuple(ids) for ids in told["items"])
            texts = tuple(told["texts"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{folder / _FILE} cannot be read: {error}") from None
        names = ("text", "query", "candidate", "candidates", "tasks")
        arrays = {name: load_rows(folder / f"{name}.npy") for name in names}
        return cls(texts, requests, items, **arrays)

    def compare(self, other: Golden) -> dict[str, dict[str, float]]:
        """How far another's answers to the same questions are from these.

        Returns:
          Part -> ``cosine_min`` and ``cosine_mean`` of vectors, ``max_difference`` of predictions
          relative to their spread, or ``overlap``, the mean share of common items of lists.
        """
        out: dict[str, dict[str, float]] = {}
        for name in ("text", "query", "candidate"):
            mine, its = getattr(self, name), getattr(other, name)
            if len(mine) and mine.shape[1]:
                out[name] = cosines(mine, its)
        if self.tasks.size:
            out["rank"] = difference(self.tasks, other.tasks)
        out["lists"] = {"overlap": overlap(self.items, other.items)}
        return out


def new_items(recommender: Recommender) -> Floats:
    """float32 (n, d), what a recommender's models say of its first items as if they were new."""
    text, features = (
        array[1 : 1 + _TEXTS] for array in (recommender.text, recommender.catalog.features)
    )
    if not (text.shape[1] or features.shape[1]):
        return np.zeros((0, recommender.vectors.shape[1]), np.float32)
    return recommender.engine.encode_candidate(text, features, np.zeros(len(features), np.int32))


def predictions(recommender: Recommender, asked: Who, query: Floats, candidates: Rows) -> Floats:
    """float32 (b, c, tasks), what its ranker says of candidates int32 (b, c), in their order."""
    policy = recommender.policy
    if not policy.tasks:
        return np.zeros((*candidates.shape, 0), np.float32)
    everything = replace(policy, score=dict.fromkeys(policy.tasks, 1.0))
    parts = recommender.parts(asked, query, candidates, everything)
    return np.stack([parts[task] for task in policy.tasks], axis=-1)


def _request(tree: dict[str, Any]) -> Request:
    lists = {name: tuple(tree[name]) for name in ("history", "exclude", "include")}
    return Request(**{**tree, **lists})


def overlap(mine: Sequence[Collection[str]], its: Sequence[Collection[str]]) -> float:
    """Mean share of the items of lists that are in others too; two empty lists are the same."""
    shares = [
        len(set(a) & set(b)) / len(a) if len(a) else float(not b)
        for a, b in zip(mine, its, strict=True)
    ]
    return float(np.mean(shares))


def difference(mine: Floats, its: Floats) -> dict[str, float]:
    """``max_difference`` of predictions, in units of the spread of ``mine``."""
    if mine.shape != its.shape:
        raise ArtifactError(f"predictions of shape {its.shape} were given, and {mine.shape} stored")
    spread = max(float(mine.std()), 1e-9)
    apart = np.nan_to_num(np.abs(mine - its), nan=np.inf)
    return {"max_difference": float(apart.max(initial=0)) / spread}


def cosines(mine: Floats, its: Floats) -> dict[str, float]:
    """``cosine_min`` and ``cosine_mean`` of vectors, row by row; zeros in ``mine`` do not count."""
    if mine.shape != its.shape:
        raise ArtifactError(f"vectors of shape {its.shape} were given, and {mine.shape} exported")
    told = np.linalg.norm(mine, axis=1) > 0
    mine, its = mine[told], np.nan_to_num(its[told], posinf=0, neginf=0)
    if not len(mine):
        return {"cosine_min": 1.0, "cosine_mean": 1.0}
    lengths = np.linalg.norm(mine, axis=1) * np.linalg.norm(its, axis=1)
    # Zeros, and what is no number, are like nothing.
    cosine = (mine * its).sum(axis=1) / np.maximum(lengths, 1e-12)
    return {"cosine_min": float(cosine.min()), "cosine_mean": float(cosine.mean())}
