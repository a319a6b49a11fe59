"""Cleaning: which events stay, and why the others go."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tfrec.config import DataConfig
from tfrec.data.raw import RawEvents
from tfrec.errors import InputError

_DAY = 86_400_000_000

REASONS = {
    "no_user_id": "without a user id",
    "no_item_id": "without an item id",
    "unknown_item": "of items that are not in the items file",
    "robot": "of users above data.max_events_per_day",
    "low_rating": "rated below data.positive_rating",
    "duplicate": "of a user and item that another event has (data.duplicates)",
    "rare_item": "of items with fewer than data.min_item_events",
    "rare_user": "of users with fewer than data.min_user_events",
    "k_core": "outside the core of data.k_core",
}


def sort_events(events: RawEvents) -> RawEvents:
    """Orders events by (user, time, place in the file)."""
    order = np.argsort(events.time, kind="stable")
    order = order[np.argsort(events.user[order], kind="stable")]
    return events.take(order)


def clean(
    events: RawEvents, known_item: NDArray[np.bool_], settings: DataConfig
) -> tuple[RawEvents, dict[str, int]]:
    """Drops what the settings say, in the order of :data:`REASONS`.

    Args:
      events: Sorted events.
      known_item: bool (len(events.item_ids),), whether the items file has the item.
      settings: What to drop.

    Returns:
      The events that stay, and reason -> how many events went for it.

    Raises:
      InputError: no event stays, or there are unknown items and they are an error.
    """
    dropped: dict[str, int] = {}

    def keep(reason: str, mask: NDArray[np.bool_]) -> None:
        nonlocal events
        dropped[reason] = int(len(mask) - np.count_nonzero(mask))
        if dropped[reason]:
            events = events.take(mask)

    keep("no_user_id", events.user >= 0)
    keep("no_item_id", events.item >= 0)
    if settings.unknown_items != "keep":
        known = known_item[events.item]
        if settings.unknown_items == "error" and not known.all():
            _refuse_unknown(events, known)
        keep("unknown_item", known)
    if settings.max_events_per_day:
        keep("robot", ~robots(events, settings.max_events_per_day)[events.user])
    if settings.positive_rating is not None:
        keep("low_rating", ~(events.rating < settings.positive_rating))
    if settings.duplicates != "all":
        keep("duplicate", _one_of_each(events, settings.duplicates))
    if settings.min_item_events > 1:
        keep("rare_item", _counts(events.item)[events.item] >= settings.min_item_events)
    if settings.min_user_events > 1:
        keep("rare_user", _counts(events.user)[events.user] >= settings.min_user_events)
    if settings.k_core > 1:
        keep("k_core", _core(events, settings.k_core))
    if not len(events):
        causes = ", ".join(f"{n} {REASONS[why]}" for why, n in dropped.items() if n)
        raise InputError(f"cleaning left no interaction; dropped were {causes}")
    return events, dropped


def weigh(events: RawEvents, weights: dict[str, float]) -> RawEvents:
    """Multiplies each event's weight by that of its type.

    Raises:
      InputError: a weight is given for a type that no event has.
    """
    for name in weights:
        if name not in events.event_names:
            raise InputError(
                f"data.event_weights names the event '{name}', and the events are "
                f"{', '.join(events.event_names)}"
            )
    factors = np.array([weights.get(name, 1.0) for name in events.event_names], np.float32)
    return replace(events, weight=events.weight * factors[events.event])


def robots(events: RawEvents, limit: int) -> NDArray[np.bool_]:
    """bool (len(events.user_ids),): users with more than ``limit`` events on one day (UTC)."""
    found = np.zeros(len(events.user_ids), np.bool_)
    day = events.time // _DAY
    new = np.flatnonzero((np.diff(events.user) != 0) | (np.diff(day) != 0)) + 1
    starts = np.concatenate([[0], new]) if len(day) else new
    lengths = np.diff(np.append(starts, len(day)))
    found[events.user[starts[lengths > limit]]] = True
    return found


def _refuse_unknown(events: RawEvents, known: NDArray[np.bool_]) -> None:
    count = int(len(known) - np.count_nonzero(known))
    example = events.item_ids[events.item[int(np.argmin(known))]]
    raise InputError(
        f"{count} interactions are with items that the items file lacks, such as '{example}'; add "
        "the items, or set data.unknown_items to keep or drop"
    )


def _one_of_each(events: RawEvents, which: str) -> NDArray[np.bool_]:
    pair = events.user.astype(np.int64) * len(events.item_ids) + events.item
    keep = np.zeros(len(pair), np.bool_)
    if which == "first":
        keep[np.unique(pair, return_index=True)[1]] = True
    else:
        keep[len(pair) - 1 - np.unique(pair[::-1], return_index=True)[1]] = True
    return keep


def _counts(codes: NDArray[np.int32]) -> NDArray[np.intp]:
    return np.bincount(codes) if len(codes) else np.zeros(0, np.intp)


def _core(events: RawEvents, k: int) -> NDArray[np.bool_]:
    """Drops rare users and items until none is left; each round reads only what stayed."""
    place = np.arange(len(events))
    while True:
        user, item = events.user[place], events.item[place]
        enough = (_counts(user)[user] >= k) & (_counts(item)[item] >= k)
        if enough.all():
            break
        place = place[enough]
    keep = np.zeros(len(events), np.bool_)
    keep[place] = True
    return keep
