"""Answers: what a server tells, and the little it is told, as plain frozen values."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

T = TypeVar("T")
Tree = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """What somebody did with an item.

    It has an id from the start, so that it counts once however often it is sent.

    Attributes:
      user_id: Who.
      item_id: With what.
      event: ``view``, ``click``, ``like``, ``dislike``, ``hide``, ``rating`` or ``purchase``.
      timestamp: Seconds since 1970; None: when the server gets it.
      value: A rating, which needs one, or an amount.
      event_id: Its own id.
    """

    user_id: str
    item_id: str
    event: str
    timestamp: float | None = None
    value: float | None = None
    event_id: str = field(default_factory=lambda: str(uuid.uuid4()))


@dataclass(frozen=True, slots=True)
class NewItem:
    """An item to import.

    Attributes:
      item_id: Its id.
      title: What a person reads.
      text: What the model reads beside the title.
      attributes: Column -> value or values, of the columns that the catalog has.
    """

    item_id: str
    title: str
    text: str = ""
    attributes: Mapping[str, str | Sequence[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Near:
    """An item of the history that speaks for a recommendation."""

    item_id: str
    title: str
    similarity: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """How a recommendation came to be.

    Attributes:
      sentence_key: Names the sentence that says it, such as ``because_of``.
      because: What of the history is near it, nearest first.
      sources: Every source that proposed it.
      rank_before: Its place before the list was ordered anew, from 1.
      moved: What moved it since, such as ``diversity``; None: nothing.
    """

    sentence_key: str
    because: tuple[Near, ...] = ()
    sources: tuple[str, ...] = ()
    rank_before: int | None = None
    moved: str | None = None


@dataclass(frozen=True, slots=True)
class Scored:
    """A recommended item.

    Attributes:
      item_id: Its id.
      title: What a person reads.
      score: Higher is better.
      source: Where it is from: ``behaviour``, ``text``, ``popular``, ``new``, ``exploration``.
      attributes: Column -> values.
      parts: What the score is the sum of.
      propensity: Chance that it stood in this place, where chance took part.
      explanation: Where one was asked for.
    """

    item_id: str
    title: str
    score: float
    source: str
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    parts: Mapping[str, float] = field(default_factory=dict)
    propensity: float = 1.0
    explanation: Explanation | None = None


@dataclass(frozen=True, slots=True)
class Recommendations:
    """Items, best first, with the version of the bundle that chose them."""

    items: tuple[Scored, ...]
    model_version: str
    request_id: str

    @property
    def ids(self) -> list[str]:
        """The items' ids alone."""
        return [item.item_id for item in self.items]


@dataclass(frozen=True, slots=True)
class Shelf:
    """One of several lists: its key, the liked item it is about if it is about one, its items."""

    key: str
    about: Mapping[str, str] | None
    items: tuple[Scored, ...]


@dataclass(frozen=True, slots=True)
class Shelves:
    """Several lists for one person."""

    shelves: tuple[Shelf, ...]
    model_version: str
    request_id: str


@dataclass(frozen=True, slots=True)
class Accepted:
    """How many events were new to the server, and how many it had already."""

    accepted: int
    known: int


@dataclass(frozen=True, slots=True)
class Item:
    """An item as the server knows it.

    Attributes:
      item_id: Its id.
      title: What a person reads.
      text: What the model reads.
      attributes: Column -> values.
      created: Seconds since 1970 when it was put; None: it is from the bundle.
      origin: ``bundle`` or ``live``.
    """

    item_id: str
    title: str
    text: str = ""
    attributes: Mapping[str, Sequence[str]] = field(default_factory=dict)
    created: float | None = None
    origin: str = "bundle"


@dataclass(frozen=True, slots=True)
class LineError:
    """An item that was not imported: which one it was, from 1, and why."""

    line: int
    message: str


@dataclass(frozen=True, slots=True)
class Imported:
    """How many items were imported, and which were not."""

    imported: int
    errors: tuple[LineError, ...] = ()


@dataclass(frozen=True, slots=True)
class Done:
    """Something a user did, as the server tells it; ``event_id`` is empty for what is older."""

    item_id: str
    event: str
    timestamp: float
    value: float | None = None
    title: str = ""
    event_id: str = ""


@dataclass(frozen=True, slots=True)
class User:
    """What is known about a user.

    Attributes:
      user_id: Who.
      known: Whether there is anything.
      profile: In words.
      history: His events since the server runs, in the order in which they were acknowledged.
      earlier: What the bundle knows of him, oldest first.
    """

    user_id: str
    known: bool = True
    profile: str = ""
    history: tuple[Done, ...] = ()
    earlier: tuple[Done, ...] = ()


@dataclass(frozen=True, slots=True)
class Forgotten:
    """A user who is forgotten, and how many events of his there were."""

    user_id: str
    events: int


@dataclass(frozen=True, slots=True)
class Version:
    """A version of the bundle.

    Attributes:
      version: Its name.
      state: ``active``, ``loaded``, ``available``, ``loading`` or ``failed``.
      share: Of the users, whom it answers.
      created: When it was made.
      metrics: What its export measured.
      error: Why it failed; None: it did not.
    """

    version: str
    state: str
    share: float = 0.0
    created: str | None = None
    metrics: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None


# --- JSON in, values out. A key that is not known is of a newer server, and left out. ------------


def made(cls: type[T], tree: Tree, **inner: Any) -> T:
    """A value of a dataclass from a tree of JSON, with some of its fields made already."""
    known = {f.name: tree[f.name] for f in fields(cls) if f.name in tree}  # type: ignore[arg-type]
    return cls(**{**known, **inner})


def scored(tree: Tree) -> Scored:
    """A recommended item."""
    told = tree.get("explanation")
    return made(Scored, tree, explanation=None if told is None else _explanation(told))


def recommendations(tree: Tree) -> Recommendations:
    """A list of recommended items."""
    return made(Recommendations, tree, items=tuple(map(scored, tree["items"])))


def shelves(tree: Tree) -> Shelves:
    """Several lists of them."""
    found = [made(Shelf, one, items=tuple(map(scored, one["items"]))) for one in tree["shelves"]]
    return made(Shelves, tree, shelves=tuple(found))


def imported(tree: Tree, before: int) -> Imported:
    """What came of an import, the lines counted on from those sent before."""
    errors = (LineError(one["line"] + before, one["message"]) for one in tree["errors"])
    return Imported(tree["imported"], tuple(errors))


def user(tree: Tree) -> User:
    """What is known about somebody."""
    lists = {
        name: tuple(made(Done, one) for one in tree.get(name, ()))
        for name in ("history", "earlier")
    }
    return made(User, tree, **lists)


def versions(tree: Tree) -> list[Version]:
    """The versions of the bundle."""
    return [made(Version, one) for one in tree["versions"]]


def _explanation(tree: Tree) -> Explanation:
    because = tuple(made(Near, one) for one in tree.get("because", ()))
    return made(Explanation, tree, because=because, sources=tuple(tree.get("sources", ())))
