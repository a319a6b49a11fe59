"""Calls: what is sent for each thing that can be asked, and how its answer is read."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypedDict, TypeVar
from urllib.parse import quote

from tfrec.client import answers
from tfrec.client.answers import (
    Accepted,
    Event,
    Forgotten,
    Imported,
    Item,
    NewItem,
    Recommendations,
    Shelves,
    User,
    Version,
)

T = TypeVar("T")

AT_ONCE = 1000  # events or items of a request
EVENT_BYTES, ITEM_BYTES = 1 << 19, 1 << 22  # of a request, below what a server takes by default

PastEvent = str | Mapping[str, Any]
"""An item id, or ``{"item_id", "event", "value", "timestamp"}``."""


class Ask(TypedDict, total=False):
    """What can be said when asking for recommendations; all of it may be left out.

    Keys:
      user_id: Whose history counts.
      history: A history that is brought along, oldest first.
      profile: What the person likes, in words.
      context: ``{"time": ..., "device": ..., "place": ...}``.
      k: How many items.
      exclude: Item ids that must not come.
      include: The only item ids that may come.
      filters: Column -> values, one of which an item must have.
      diversity: 0 (focused) to 1 (diverse); left out: as the bundle says.
      explain: Whether each item comes with an explanation.
    """

    user_id: str
    history: Sequence[PastEvent]
    profile: str
    context: Mapping[str, Any]
    k: int
    exclude: Sequence[str]
    include: Sequence[str]
    filters: Mapping[str, Sequence[str]]
    diversity: float
    explain: bool


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A request, which may be sent again without harm, and how to read its answer.

    Attributes:
      method: HTTP's.
      path: Below the server's address.
      read: Makes the result of the answer's JSON.
      query: The part after the question mark.
      body: What is sent; None: nothing.
      kind: Its media type.
      if_gone: The result if a second attempt finds nothing there, since the first one did it.
    """

    method: str
    path: str
    read: Callable[[Mapping[str, Any]], T]
    query: Mapping[str, str | int] = field(default_factory=dict)
    body: bytes | None = None
    kind: str = "application/json"
    if_gone: T | None = None


def recommend(ask: Ask) -> Call[Recommendations]:
    """The best items for one person."""
    return Call("POST", "/v1/recommend", answers.recommendations, body=_json(ask))


def shelves(which: Sequence[str] | None, ask: Ask) -> Call[Shelves]:
    """Several lists for one person; None: all that there are."""
    told = {**ask} if which is None else {**ask, "shelves": list(which)}
    return Call("POST", "/v1/shelves", answers.shelves, body=_json(told))


def look(path: str, k: int, user_id: str | None, **query: str) -> Call[Recommendations]:
    """A list that is asked for by GET."""
    wanted: dict[str, str | int] = {**query, "k": k}
    if user_id is not None:
        wanted["user_id"] = user_id
    return Call("GET", path, answers.recommendations, wanted)


def events(given: Event | Iterable[Event]) -> Iterator[Call[Accepted]]:
    """Takes events in, some at a time."""
    found = [given] if isinstance(given, Event) else given
    for some in _chunks((_json(_without_none(asdict(event))) for event in found), EVENT_BYTES):
        yield Call("POST", "/v1/events", _accepted, body=b"[" + b",".join(some) + b"]")


def item(item_id: str) -> Call[Item]:
    """What is known about an item."""
    return Call("GET", at("items", item_id), _item)


def put_item(
    item_id: str, title: str, text: str, attributes: Mapping[str, str | Sequence[str]] | None
) -> Call[Item]:
    """Adds or changes an item."""
    told = {"title": title, "text": text, "attributes": dict(attributes or {})}
    return Call("PUT", at("items", item_id), _item, body=_json(told))


def delete_item(item_id: str) -> Call[bool]:
    """Takes an item out."""
    return Call("DELETE", at("items", item_id), lambda tree: True, if_gone=True)


def import_items(items: Iterable[NewItem | Mapping[str, Any]]) -> Iterator[Call[Imported]]:
    """Adds or changes many items, some at a time."""
    before = 0
    told = (_json(asdict(one) if isinstance(one, NewItem) else dict(one)) for one in items)
    for lines in _chunks(told, ITEM_BYTES):

        def read(tree: Mapping[str, Any], before: int = before) -> Imported:
            return answers.imported(tree, before)

        body = b"\n".join(lines)
        yield Call("POST", "/v1/items:import", read, body=body, kind="application/x-ndjson")
        before += len(lines)


def user(user_id: str) -> Call[User]:
    """What is known about somebody."""
    return Call("GET", at("users", user_id), answers.user)


def forget(user_id: str) -> Call[Forgotten]:
    """Forgets somebody for good."""
    return Call("DELETE", at("users", user_id), lambda tree: answers.made(Forgotten, tree))


def models() -> Call[list[Version]]:
    """The versions of the bundle."""
    return Call("GET", "/v1/models", answers.versions)


def activate(version: str, share: float) -> Call[list[Version]]:
    """Gives a version a share of the users."""
    path = f"/v1/models/{_quoted(version)}:activate"
    return Call("POST", path, answers.versions, body=_json({"share": share}))


def plain(path: str) -> Call[dict[str, Any]]:
    """An answer as it is."""
    return Call("GET", path, dict)


def at(kind: str, identity: str) -> str:
    """The path of an item or a user, whatever characters its id has."""
    return f"/v1/{kind}/{_quoted(identity)}"


def summed_events(parts: Iterable[Accepted]) -> Accepted:
    """What came of several calls, as one."""
    found = list(parts)
    return Accepted(sum(one.accepted for one in found), sum(one.known for one in found))


def summed_imports(parts: Iterable[Imported]) -> Imported:
    """What came of several calls, as one."""
    found = list(parts)
    errors = [error for one in found for error in one.errors]
    return Imported(sum(one.imported for one in found), tuple(errors))


def _quoted(identity: str) -> str:
    # Dots too: "." and ".." are steps in a path, and would be taken out of it.
    return quote(identity, safe="").replace(".", "%2E")


def _json(tree: Any) -> bytes:
    return json.dumps(tree, ensure_ascii=False, allow_nan=False, default=list).encode()


def _without_none(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in tree.items() if value is not None}


def _accepted(tree: Mapping[str, Any]) -> Accepted:
    return answers.made(Accepted, tree)


def _item(tree: Mapping[str, Any]) -> Item:
    return answers.made(Item, tree)


def _chunks(parts: Iterable[bytes], most: int) -> Iterator[list[bytes]]:
    """Lists of parts that are neither long nor, together, larger than ``most`` bytes."""
    some: list[bytes] = []
    size = 0
    for part in parts:
        if some and (len(some) == AT_ONCE or size + len(part) > most):
            yield some
            some, size = [], 0
        some.append(part)
        size += len(part) + 1
    if some:
        yield some
