"""Recent: histories of users who were asked for lately, in memory, always as they are on disk."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tfrec.errors import InputError
from tfrec.serving.state import Event


@dataclass(slots=True)
class _Known:
    events: list[Event]
    last: int


class Recent:
    """Histories in memory, bounded; right if every committed write is told to it.

    A history that is read from disk while its user's events are committed is given to who asked
    and not kept: it may be older than those events. One that is read between a commit and being
    told of it has these events already, which their numbers tell.
    """

    def __init__(self, capacity: int) -> None:
        """Makes an empty one.

        Args:
          capacity: Events it holds at most; a user counts as one more.

        Raises:
          InputError: the capacity is negative.
        """
        if capacity < 0:
            raise InputError(f"a cache of {capacity} events; expected 0 or more")
        self._capacity, self._held = capacity, 0
        self._histories: OrderedDict[str, _Known] = OrderedDict()
        self._read: dict[str, object] = {}
        self._lock = threading.Lock()

    def get(self, user_id: str, read: Callable[[str], tuple[list[Event], int]]) -> list[Event]:
        """A user's history, by ``read`` if it is not here: events and the last one's number."""
        with self._lock:
            if (known := self._histories.get(user_id)) is not None:
                self._histories.move_to_end(user_id)
                return known.events.copy()
            token = self._read[user_id] = object()
        try:
            found, last = read(user_id)
        except BaseException:
            with self._lock:
                self._still_right(user_id, token)
            raise
        with self._lock:
            if self._still_right(user_id, token) and len(found) < self._capacity:
                self._histories[user_id] = _Known(found.copy(), last)
                self._held += len(found) + 1
                self._shrink()
        return found

    def add(self, events: Iterable[tuple[int, Event]]) -> None:
        """Events that were committed, in their order, each with its number."""
        with self._lock:
            for number, event in events:
                self._read.pop(event.user_id, None)
                known = self._histories.get(event.user_id)
                if known is not None and number > known.last:
                    known.events.append(event)
                    known.last = number
                    self._held += 1
            self._shrink()

    def drop(self, user_id: str) -> None:
        """A user whose events were deleted."""
        with self._lock:
            self._read.pop(user_id, None)
            if (known := self._histories.pop(user_id, None)) is not None:
                self._held -= len(known.events) + 1

    def _still_right(self, user_id: str, token: object) -> bool:
        """Whether nothing was committed for the user since ``token`` was left, which it takes."""
        if self._read.get(user_id) is not token:
            return False
        self._read.pop(user_id, None)
        return True

    def _shrink(self) -> None:
        while self._held > self._capacity:
            _, known = self._histories.popitem(last=False)
            self._held -= len(known.events) + 1
