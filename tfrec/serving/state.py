"""State: what a server must not forget: events, items that were put, who is forgotten."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from tfrec.errors import InputError, SetupError

Synchronous = Literal["full", "normal"]


@dataclass(frozen=True, slots=True)
class Event:
    """What somebody did with an item.

    Attributes:
      event_id: Its own id; an id that comes again is the same event.
      user_id: Who.
      item_id: With what.
      event: ``view``, ``click``, ``like``, ``dislike``, ``hide``, ``rating``, ``purchase``, or
        another word.
      timestamp: Seconds since 1970 of the event, by its sender; the server's own where he said
        nothing.
      value: A rating, an amount; None: there is none.
    """

    event_id: str
    user_id: str
    item_id: str
    event: str
    timestamp: float
    value: float | None = None


@dataclass(frozen=True, slots=True)
class Item:
    """An item that was put while the server ran.

    Attributes:
      item_id: Its id.
      title: What a person reads.
      text: What the BERT reads.
      attributes: Column -> cell, as in a catalog.
      created: Seconds since 1970 when it was first put.
      deleted: Whether it was taken out, which also takes out an item of the bundle.
    """

    item_id: str
    title: str = ""
    text: str = ""
    attributes: Mapping[str, str] = field(default_factory=dict)
    created: float = 0.0
    deleted: bool = False


class State(Protocol):
    """Keeps events and items; any number of threads may call it.

    What a method that writes was given is on disk, as far as the store promises, when it returns.
    Every method raises :class:`StateError` if the store cannot be reached or written.
    """

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Keeps events, all of them or none; False for each whose ``event_id`` is known already."""

    def history(self, user_id: str) -> list[Event]:
        """A user's events in the order in which they were acknowledged."""

    def histories(self, user_ids: Sequence[str]) -> list[list[Event]]:
        """:meth:`history` of several at once."""

    def forget(self, user_id: str) -> int:
        """Deletes a user's events for good and keeps that he is forgotten; how many there were."""

    def forgotten(self, user_ids: Sequence[str]) -> set[str]:
        """Those whose history in a bundle must not be read any more."""

    def events(self, after: int = 0) -> Iterator[tuple[int, Event]]:
        """Events that came after number ``after``, each with its own number, ascending."""

    def put_items(self, items: Sequence[Item]) -> None:
        """Keeps items in place of what was there under their ids, all of them or none."""

    def items(self, after: int = 0) -> Iterator[tuple[int, Item]]:
        """Items that were put after change number ``after``, with the number of their last change.

        Ascending; each item once, as it is now.
        """

    def vectors(self, key: str, item_ids: Sequence[str]) -> dict[str, bytes]:
        """What :meth:`put_vectors` was given under the same key."""

    def put_vectors(self, key: str, vectors: Mapping[str, bytes]) -> None:
        """Keeps vectors of items: a cache, which an item that is put anew falls out of."""

    def get(self, name: str) -> str:
        """A setting that outlives the server; empty: never set."""

    def set(self, name: str, value: str) -> None:
        """Keeps a setting."""

    def counts(self) -> dict[str, int]:
        """How many ``events``, ``users`` with events and ``items`` not deleted are kept."""

    def durability(self) -> str:
        """What an acknowledged event survives, in one sentence for whoever starts the server."""

    def close(self) -> None:
        """Lets go of files and connections."""


def open_state(where: str, synchronous: Synchronous = "full") -> State:
    """Opens the store of a server's state.

    Args:
      where: A folder, made if it is not there, or ``redis://HOST:PORT/DB``.
      synchronous: Of a folder: ``full`` waits for the disk at each commit, ``normal`` does not. A
        Redis has its own settings.

    Raises:
      StateError: it cannot be reached or written, is damaged, newer than this code, or a folder
        that another server uses.
      ConfigError: the address of a Redis is none.
      SetupError: the package redis is missing.
    """
    if where.startswith(("redis://", "rediss://")):
        try:
            from tfrec.serving.redis_state import RedisState
        except ModuleNotFoundError:
            raise SetupError(
                f"{where.split(':')[0]}:// needs a package; install it with: pip install "
                '"tfrec[serve]", or give a folder as the state'
            ) from None
        return RedisState(where)
    from tfrec.serving.sqlite_state import SqliteState

    return SqliteState(where, synchronous)


def check_events(events: Iterable[Event]) -> None:
    """Refuses what no store could give back as it was.

    Raises:
      InputError: a text is no Unicode, or a number is not finite.
    """
    for event in events:
        check_text("an event", event.event_id + event.user_id + event.item_id + event.event)
        for name, number in (("timestamp", event.timestamp), ("value", event.value)):
            if number is not None and not math.isfinite(number):
                raise InputError(
                    f"the {name} of event {event.event_id!r} is {number}; expected a number"
                )


def check_items(items: Iterable[Item]) -> None:
    """As :func:`check_events`, of items.

    Raises:
      InputError: a text is no Unicode, or the time is not finite.
    """
    for item in items:
        cells = "".join(name + cell for name, cell in item.attributes.items())
        check_text("an item", item.item_id + item.title + item.text + cells)
        if not math.isfinite(item.created):
            raise InputError(f"item {item.item_id!r} was created at {item.created}: no time")


def check_text(whose: str, text: str) -> None:
    """Refuses text that is no Unicode.

    Raises:
      InputError: a character of it is half a one, which UTF-8 cannot say.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{whose} holds {text[error.start]!r}, half a character; send whole ones"
        ) from None
