"""Building: raw events, items and users become Interactions, Catalog and Users."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.config import DataConfig
from tfrec.data.attributes import joined_texts, kinds_of, profiles, schema_of
from tfrec.data.catalog import Catalog, Users
from tfrec.data.cleaning import clean, sort_events, weigh
from tfrec.data.interactions import TEST, TRAIN, VALID, Interactions
from tfrec.data.raw import RawData, RawEvents, RawTable
from tfrec.data.splits import assign
from tfrec.errors import InputError

_MICROSECONDS = 1_000_000


@dataclass(frozen=True, eq=False)
class Built:
    """Interactions, Catalog and Users that belong together, and how they came about.

    Attributes:
      summary: What was read, dropped (and why) and kept, as plain values.
    """

    interactions: Interactions
    catalog: Catalog
    users: Users
    summary: dict[str, Any]


def build(raw: RawData, settings: DataConfig, seed: int = 1) -> Built:
    """Cleans, numbers and splits raw data.

    Items are numbered from 1 in the order of the items file, then by first appearance in the
    events; users from 0 likewise. Rows of the files stay even if they have no event, unless
    ``min_user_events``, ``min_item_events`` or ``k_core`` ask for events.

    Raises:
      InputError: nothing is left, or the split needs more.
    """
    item_ids, item_row = _numbering(raw.items, raw.events.item_ids)
    user_ids, user_row = _numbering(raw.users, raw.events.user_ids)
    listed_items = len(raw.items.ids) if raw.items else len(item_ids)
    events, dropped = clean(sort_events(raw.events), item_row < listed_items, settings)
    events = weigh(events, settings.event_weights)
    # From here on rows are those of the final tables.
    items_kept = _kept(item_row[events.item], len(item_ids), raw.items, settings, "item")
    users_kept = _kept(user_row[events.user], len(user_ids), raw.users, settings, "user")
    interactions = _interactions(events, user_row, item_row, users_kept, items_kept, settings, seed)
    catalog = _catalog(raw.items, [item_ids[i] for i in items_kept], items_kept, settings)
    users = _users(raw.users, [user_ids[i] for i in users_kept], users_kept, settings)
    summary = _summary(raw, interactions, catalog, users, dropped)
    unknown = item_row[events.item] >= listed_items
    summary["unknown_items"] = int(np.count_nonzero(items_kept >= listed_items))
    summary["unknown_item_interactions"] = int(np.count_nonzero(unknown))
    return Built(interactions, catalog, users, summary)


def _numbering(
    table: RawTable | None, found: Sequence[str]
) -> tuple[tuple[str, ...], NDArray[np.int32]]:
    """All ids, those of the table first, and for each id found among events its number."""
    place = {} if table is None else {key: row for row, key in enumerate(table.ids)}
    rows = np.fromiter((place.setdefault(key, len(place)) for key in found), np.int32, len(found))
    return tuple(place), rows


def _kept(
    rows: NDArray[np.int32], total: int, table: RawTable | None, settings: DataConfig, what: str
) -> NDArray[np.intp]:
    """Which rows the final table holds, ascending."""
    kept = np.zeros(total, np.bool_)
    kept[rows] = True
    least = settings.min_item_events if what == "item" else settings.min_user_events
    if table is not None and max(least, settings.k_core) <= 1:
        kept[: len(table.ids)] = True
    return np.flatnonzero(kept)


def _interactions(
    events: RawEvents,
    user_row: NDArray[np.int32],
    item_row: NDArray[np.int32],
    users_kept: NDArray[np.intp],
    items_kept: NDArray[np.intp],
    settings: DataConfig,
    seed: int,
) -> Interactions:
    user = _renumbered(user_row, users_kept)[events.user]
    item = _renumbered(item_row, items_kept)[events.item] + np.int32(1)
    if (np.diff(user) < 0).any():  # the users' file has another order than the events
        order = np.argsort(user, kind="stable")
        user, item, events = user[order], item[order], events.take(order)
    timestamp = events.time // _MICROSECONDS
    return Interactions(
        user=user,
        item=item,
        timestamp=timestamp,
        event=events.event,
        rating=events.rating,
        weight=events.weight,
        split=assign(user, item, timestamp, settings, seed),
        num_users=len(users_kept),
        event_names=events.event_names,
    )


def _renumbered(rows: NDArray[np.int32], kept: NDArray[np.intp]) -> NDArray[np.int32]:
    """For each id found among events its place among the rows kept."""
    place = np.full(int(max(rows.max(initial=0), kept.max(initial=0))) + 1, -1, np.int32)
    place[kept] = np.arange(len(kept), dtype=np.int32)
    return place[rows]


def _chosen(
    table: RawTable | None, names: Sequence[str], kept: NDArray[np.intp]
) -> dict[str, tuple[str, ...]]:
    """Columns of a table for the rows kept; empty cells for rows that it does not have."""
    if table is None:
        return {}
    listed = kept[kept < len(table.ids)]
    missing = ("",) * (len(kept) - len(listed))
    return {name: tuple(table.columns[name][i] for i in listed) + missing for name in names}


def _catalog(
    table: RawTable | None, ids: Sequence[str], kept: NDArray[np.intp], settings: DataConfig
) -> Catalog:
    columns = _chosen(table, list(table.columns) if table else (), kept)
    _check_columns(table, "item_text", settings.item_text)
    _check_columns(table, "item_attributes", settings.item_attributes)
    given = columns.get("title", ids)
    titles = [title.strip() or key for title, key in zip(given, ids, strict=True)]
    kinds = kinds_of({n: c for n, c in columns.items() if n != "title"}, settings)
    readable = [name for name, kind in kinds.items() if kind in ("text", "categorical")]
    texts = settings.item_text or [*(["title"] if "title" in columns else []), *readable]
    attributes = settings.item_attributes or [n for n, k in kinds.items() if k != "text"]
    kinds = {n: "categorical" if kinds.get(n, "text") == "text" else kinds[n] for n in attributes}
    cells = {name: columns[name] for name in attributes if kinds[name] != "empty"}
    return Catalog(
        ids=("", *ids),
        titles=("", *titles),
        texts=("", *_texts([columns[n] for n in texts], settings.separator, len(ids))),
        attributes={n: ("", *c) for n, c in cells.items()},
        schema=schema_of(ids, cells, kinds, settings),
    )


def _texts(columns: Sequence[Sequence[str]], separator: str, rows: int) -> tuple[str, ...]:
    return joined_texts(columns, separator) if columns else ("",) * rows


def _users(
    table: RawTable | None, ids: Sequence[str], kept: NDArray[np.intp], settings: DataConfig
) -> Users:
    columns = _chosen(table, list(table.columns) if table else (), kept)
    kinds = kinds_of(columns, settings)
    cells = {name: columns[name] for name, kind in kinds.items() if kind in _FEATURES}
    return Users(
        ids=tuple(ids),
        titles=tuple(ids),
        texts=profiles(columns, settings.separator, len(ids)),
        attributes=cells,
        schema=schema_of(ids, cells, kinds, settings),
    )


_FEATURES = ("numeric", "categorical")


def _check_columns(table: RawTable | None, setting: str, names: Sequence[str]) -> None:
    known: Mapping[str, Any] = table.columns if table else {}
    for name in names:
        if name not in known:
            raise InputError(
                f"data.{setting} names the column '{name}', and the items have "
                f"{', '.join(known) or 'no columns, since no items file is given'}"
            )


def _summary(
    raw: RawData,
    interactions: Interactions,
    catalog: Catalog,
    users: Users,
    dropped: Mapping[str, int],
) -> dict[str, Any]:
    names = interactions.event_names
    events = np.bincount(interactions.event, minlength=len(names))
    with_events = len(np.unique(interactions.item)), len(np.unique(interactions.user))
    return {
        "rows": len(raw.events),
        "dropped": {why: count for why, count in dropped.items() if count},
        "interactions": len(interactions),
        "items": catalog.num_items,
        "items_without_events": catalog.num_items - with_events[0],
        "users": len(users),
        "users_without_events": len(users) - with_events[1],
        "events": {name: int(n) for name, n in zip(names, events, strict=True)},
        "first": _day(interactions.timestamp.min()),
        "last": _day(interactions.timestamp.max()),
        "split": {
            name: int(np.count_nonzero(interactions.split == part))
            for name, part in (("train", TRAIN), ("valid", VALID), ("test", TEST))
        },
        "item_attributes": _described(catalog),
        "user_attributes": _described(users),
    }


def _described(table: Catalog | Users) -> dict[str, str]:
    words = {n: f"categorical, {len(v)} values" for n, v in table.schema.vocabularies.items()}
    return words | dict.fromkeys(table.schema.numeric, "numeric")


def _day(timestamp: np.int64) -> str:
    try:
        return datetime.fromtimestamp(int(timestamp), UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):
        return str(timestamp)
