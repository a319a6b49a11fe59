"""The checkerboard: a data set whose right answer is known, and tiny runs that learn it.

Users and items are black or white, and users only meet items of their own colour, each user in an
order of his own. Any recommender worth its name recommends a user the items of his colour.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tiny_bert import write_tiny_bert

from tfrec.config import Config
from tfrec.data.dataset import Dataset
from tfrec.models.text import TextEncoder
from tfrec.stages import adapt, prepare

USERS, ITEMS = 40, 24
TITLES = ("the war of space ship", "the love story of film")
EVENTS = ("view", "purchase")

TINY = (
    "adapt.jit_compile=false",
    "adapt.tracking=[]",
    "adapt.checkpoint_minutes=0",
    "adapt.warmup_steps=1",
    "adapt.batch_size=8",
    "adapt.validate_every=1",
    "adapt.refit_epochs=1",
    "adapt.text_length=16",
    "adapt.retrieval.epochs=2",
    "adapt.retrieval.embedding_dim=8",
    "adapt.retrieval.layers=1",
    "adapt.retrieval.history=8",
    "adapt.ranking.epochs=1",
    "adapt.ranking.hidden=8",
    "adapt.ranking.experts=2",
    "adapt.ranking.cross_layers=1",
    "adapt.ranking.history=4",
    "adapt.ranking.candidates=12",
    'evaluate.baselines=["popular", "ease"]',
    "evaluate.bootstrap=20",
)
"""Settings of a run of seconds."""


def colour(number: int | str) -> int:
    """0 or 1, of ``u3``, ``i3`` or 3."""
    return int(str(number).lstrip("ui")) % 2


def events(
    users: int = USERS, items: int = ITEMS, ratings: bool = True, purchases: bool = False
) -> dict[str, list[str]]:
    """Columns of interactions: each user meets two thirds of the items of his colour."""
    rng = np.random.default_rng(0)
    rows = []
    for user in range(users):
        own = [item for item in range(items) if colour(item) == colour(user)]
        for place, item in enumerate(rng.permutation(own)[: max(len(own) * 2 // 3, 1)]):
            rows.append(
                {
                    "user_id": f"u{user}",
                    "item_id": f"i{item}",
                    "timestamp": str(1_700_000_000 + 86_400 * place + 60 * user),
                    "rating": str(1 + (user + int(item)) % 5),
                    "event": EVENTS[(user + place) % 3 == 0],
                }
            )
    left_out = {name for name, kept in (("rating", ratings), ("event", purchases)) if not kept}
    return {name: [row[name] for row in rows] for name in rows[0] if name not in left_out}


def item_table(items: int = ITEMS) -> dict[str, list[str]]:
    """Columns of items: titles tell the colour, ``shade`` does too, ``price`` does not."""
    return {
        "item_id": [f"i{item}" for item in range(items)],
        "title": [f"{TITLES[colour(item)]} {item}" for item in range(items)],
        "shade": [("black", "white|pale")[colour(item)] for item in range(items)],
        "price": [str(item // 2) for item in range(items)],
    }


def write(folder: Path, **settings: bool | int) -> Path:
    """Leaves ``events.csv`` and ``items.csv`` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _csv(folder / "events.csv", events(**settings))
    _csv(folder / "items.csv", item_table(int(settings.get("items", ITEMS))))
    return folder


def arguments(folder: Path, *settings: str, items: bool = True) -> list[str]:
    """``key=value`` settings of a tiny run over the files of a folder, without text."""
    given = [f"data.interactions={folder / 'events.csv'}"]
    given += [f"data.items={folder / 'items.csv'}"] if items else []
    return [*given, "adapt.text=none", *TINY, *settings]


def config(folder: Path, *settings: str, items: bool = True) -> Config:
    """The same as a Config."""
    return Config.load("files", arguments(folder, *settings, items=items))


def dataset(**settings: bool | int) -> Dataset:
    """The prepared checkerboard, in memory."""
    return Dataset.from_columns(events(**settings), item_table(int(settings.get("items", ITEMS))))


def train(out: Path, settings: Config, tasks: Sequence[adapt.Task] = ("retrieval", "ranking")):
    """Prepares and adapts; returns the folder of the run."""
    prepare.run(settings, out)
    for task in tasks:
        adapt.run(settings, out, task)
    return out


_made: dict[Path, Path] = {}


def trained(tmp_path_factory) -> Path:
    """A run that has learned the board and reads texts; for all tests, changed by none.

    Its folder has the raw files and the BERT beside it, in ``files`` and ``bert``.
    """
    session = tmp_path_factory.getbasetemp()
    if session not in _made:
        _made[session] = _trained(tmp_path_factory.mktemp("checkerboard"))
    return _made[session]


def _trained(folder: Path) -> Path:
    write_tiny_bert(folder / "bert")
    learns = (
        f"adapt.text={folder / 'bert'}",
        "adapt.retrieval.epochs=30",
        "adapt.retrieval.validate_every=10",
        "adapt.retrieval.learning_rate=0.01",
        "adapt.retrieval.dropout=0.0",
        "adapt.retrieval.ema=0.9",
        "adapt.ranking.epochs=3",
    )
    return train(folder / "run", config(write(folder / "files"), *learns))


_tuned: dict[tuple[Path, str], Path] = {}


def tuned(tmp_path_factory, method: str) -> Path:
    """A run whose BERT was tuned by a method; for all tests, changed by none.

    Its folder has the raw files and the BERT beside it, in ``files`` and ``bert``.
    """
    key = (tmp_path_factory.getbasetemp(), method)
    if key not in _tuned:
        folder = tmp_path_factory.mktemp(f"tuned-{method}")
        write_tiny_bert(folder / "bert")
        settings = (
            f"adapt.text={folder / 'bert'}",
            f"adapt.tuning.text={method}",
            "adapt.tuning.text_rate=1.0",
            "adapt.retrieval.positions=4",
            "adapt.retrieval.uniform_negatives=8",
            "adapt.retrieval.epochs=1",
            'data.item_text=["title"]',
        )
        made = config(write(folder / "files"), *settings)
        _tuned[key] = train(folder / "run", made, ["retrieval"])
    return _tuned[key]


@contextmanager
def other_bert(run: Path) -> Iterator[TextEncoder]:
    """Within the block the BERT beside a run is another one, which is given."""
    base, kept = run.parent / "bert", run.parent / "kept"
    base.rename(kept)
    try:
        yield TextEncoder.load(write_tiny_bert(base, seed=7), length=16)
    finally:
        shutil.rmtree(base)
        kept.rename(base)


def _csv(path: Path, columns: dict[str, list[str]]) -> None:
    lines = [",".join(columns), *(",".join(row) for row in zip(*columns.values(), strict=True))]
    path.write_text("\n".join(lines) + "\n")
