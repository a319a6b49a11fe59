"""Grown: a bundle of as many items as wanted, whose models are real ones, trained on a few.

A two-tower and a ranker of the default shape, without texts, learn made-up events of two thousand
items; a query tower reads vectors, not ids, so what it learned holds for any catalog. The vectors
of further items lie beside the line between a trained one and one of its neighbours. The index is
tuned on queries of the model itself, and all of it is written by what `tfrec export` writes with.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

TRAINED, PEOPLE, EVENTS, WIDTH = 2_000, 1_500, 60, 64
GENRES = tuple(f"genre {number}" for number in range(18))
_SETTINGS = (
    "adapt.text=none",
    "adapt.tracking=[]",
    "adapt.jit_compile=false",
    "adapt.refit=false",
    "adapt.retrieval.epochs=3",
    f"adapt.retrieval.embedding_dim={WIDTH}",
    "adapt.ranking.epochs=1",
    "adapt.ranking.linear_items=0",
)


def trained(folder: Path) -> Path:
    """A run over made-up events, in which each person keeps to a few of the genres."""
    from tfrec.config import Config
    from tfrec.stages import adapt, prepare

    files, run = folder / "files", folder / "run"
    files.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    genre = rng.integers(len(GENRES), size=TRAINED)
    popular = 1 / (1 + rng.permutation(TRAINED)) ** 0.7
    lines = ["user_id,item_id,timestamp,rating"]
    for user in range(PEOPLE):
        liked = rng.choice(len(GENRES), 3, replace=False)
        chance = popular * np.where(np.isin(genre, liked), 20, 1)
        met = rng.choice(TRAINED, EVENTS, replace=False, p=chance / chance.sum())
        for place, item in enumerate(met.tolist()):
            lines.append(f"u{user},{item + 1},{1_600_000_000 + 3600 * place},{3 + item % 3}")
    (files / "events.csv").write_text("\n".join(lines) + "\n")
    rows = [f"{i + 1},Item {i + 1},{GENRES[g]}" for i, g in enumerate(genre.tolist())]
    (files / "items.csv").write_text("\n".join(["item_id,title,genres", *rows]) + "\n")
    given = [f"data.interactions={files / 'events.csv'}", f"data.items={files / 'items.csv'}"]
    settings = Config.load("files", [*given, *_SETTINGS])
    prepare.run(settings, run)
    adapt.run(settings, run, "retrieval")
    adapt.run(settings, run, "ranking")
    return run


def write(folder: Path, items: int, out: Path) -> None:
    """Leaves a bundle of so many items at ``out``; the run it is made from stays in ``folder``."""
    from tfrec import bundle
    from tfrec.artifact import write_json, writing
    from tfrec.models import bundling
    from tfrec.models.engine import load_recommender

    run = folder / "run"
    if not (run / "adapt" / "ranking" / "manifest.json").is_file():
        run = trained(folder)
    grown = _grown(load_recommender(run), items)
    bundle.writable(out).mkdir(parents=True, exist_ok=True)
    made = {"items": items, "width": WIDTH}
    with writing(out / bundle.VERSIONS / "1", kind=bundle.KIND, config=made) as draft:
        content = bundling.write(grown, "none", draft.path, saved_models=False)
        write_json(draft.path / bundle.CONTENT, {**content, "recommend": {}})
    bundle.publish(out, 1, 1)


def _grown(base: Any, items: int) -> Any:
    from tfrec.data.catalog import Catalog
    from tfrec.index import make_index
    from tfrec.recommender import Recommender

    vectors = _vectors(base.vectors[1:], items)
    rng = np.random.default_rng(2)
    told = (rng.integers(len(GENRES), size=items)).tolist()
    known, catalog = len(base.catalog), base.catalog
    names = [str(number) for number in range(known, items + 1)]
    genres = [GENRES[g] for g in told[known - 1 :]]
    catalog = Catalog(
        ids=(*catalog.ids, *names)[: items + 1],
        titles=(*catalog.titles, *(f"Item {name}" for name in names))[: items + 1],
        texts=("",) * (items + 1),
        attributes={"genres": (*catalog.attributes["genres"], *genres)[: items + 1]},
        schema=catalog.schema,
    )
    popularity = np.zeros(items + 1, np.float32)
    popularity[1:] = np.floor(1e6 / (1 + rng.permutation(items)) ** 0.8)
    small = Recommender(
        base.engine, base.catalog, base.users, base.interactions, base.coding, base.vectors,
        base.text, base.profile, base.policy,
    )  # fmt: skip
    people = np.arange(len(base.users), dtype=np.int32)
    queries = small.queries(small.who(base.interactions, people))
    rows = np.arange(1, items + 1, dtype=np.int32)
    weights = {p: w for p, w in base.policy.score.items() if p not in ("linear", "text")}
    weights["click"] = weights.get("click") or 1.0  # so that the ranker is asked
    return Recommender(
        base.engine,
        catalog,
        base.users,
        base.interactions,
        base.coding,
        vectors,
        np.zeros((items + 1, 0), np.float32),
        base.profile,
        replace(base.policy, score=weights),
        None,
        make_index(vectors[1:], rows, queries=queries, precision=_precision(items)),
        None,
        popularity,
    )


def _precision(items: int) -> str:
    """As the recommender chooses it."""
    from tfrec.index import EXACT_LIMIT

    return "bfloat16" if items > EXACT_LIMIT else "float32"


def _vectors(real: np.ndarray, items: int) -> np.ndarray:
    """float32 (items + 1, d): the trained ones first, then those between them and a neighbour."""
    from index import more_of

    more = [np.zeros((0, real.shape[1]), np.float32)]
    if items > len(real):
        more = list(more_of(real.astype(np.float32), items - len(real), 1))
    every = np.concatenate([np.zeros((1, real.shape[1]), np.float32), real, *more])
    return every[: items + 1].astype(np.float32)
