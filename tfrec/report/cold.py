"""Cold: how good the lists are for users with few events, and of items not trained on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tfrec import metrics
from tfrec.data.interactions import TEST, Interactions
from tfrec.index import Ragged

EVENTS = (0, 1, 2, 3, 5, 10, 20)
"""How many of a user's first events a model is given."""

COLD_K = 20
"""Length of the lists in which cold items are looked for."""

_BY_EVENTS = ("ndcg", "hr", "recall")
_OF_COLD_ITEMS = ("recall", "ndcg")


class Lists(Protocol):
    """What recommends for the curve: int32 (U, k) catalog rows, best first."""

    def __call__(
        self,
        history: Interactions,
        users: NDArray[np.int32],
        times: NDArray[np.int64],
        exclude: Ragged,
        profile: bool,
    ) -> NDArray[np.int32]:
        """Lists for users whose events are ``history``, with or without their profiles."""


@dataclass(frozen=True, eq=False)
class FirstEvents:
    """Users who go on after their 20th event, so that each can be asked about with fewer.

    Attributes:
      users: int32 (U,), user rows, ascending.
      targets: The held-out items of each user after his 20th event, those met before left out.
      known: The items of each user's first 20 events.
      times: int64 (U,), seconds, of each user's first target.
    """

    users: NDArray[np.int32]
    targets: Ragged
    known: Ragged
    times: NDArray[np.int64]
    _events: Interactions
    _place: NDArray[np.int64]

    @classmethod
    def of(cls, interactions: Interactions, most: int, seed: int, part: int = TEST) -> FirstEvents:
        """At most ``most`` such users, drawn by the seed.

        Args:
          interactions: All events, with their split.
          most: How many users.
          seed: Of the draw.
          part: Of the split, which has the targets.
        """
        place = np.arange(len(interactions)) - interactions.offsets[interactions.user]
        early = place < EVENTS[-1]
        base = np.int64(interactions.item.max(initial=0)) + 1
        pair = interactions.user * base + interactions.item
        late = ~early & (interactions.split == part) & ~np.isin(pair, pair[early])
        users = np.unique(interactions.user[late])
        if len(users) > most:
            users = np.sort(np.random.default_rng(seed).choice(users, most, replace=False))
        wanted, first = interactions.select(late), interactions.select(early)
        return cls(
            users=users.astype(np.int32),
            targets=Ragged(wanted.offsets, wanted.item).take(users),
            known=Ragged(first.offsets, first.item).take(users),
            times=wanted.timestamp[wanted.offsets[:-1][users]],
            _events=interactions,
            _place=place,
        )

    def history(self, count: int) -> Interactions:
        """The first ``count`` events of these users, and none of anybody else."""
        mine = np.isin(self._events.user, self.users)
        return self._events.select(mine & (self._place < count))


def by_events(
    interactions: Interactions, lists: Lists, k: int, most: int, seed: int, profiles: bool
) -> dict[str, Any] | None:
    """Quality by the number of events that are known; every point has the same users and targets.

    Args:
      interactions: All events, with their split.
      lists: What recommends.
      k: Length of the lists.
      most: Users, drawn by the seed, at most.
      seed: Of the draw.
      profiles: Whether users have attributes or profile texts.

    Returns:
      ``users``, ``targets``, ``k``, ``events`` and ``lines``: line -> metric -> a value for each
      number of events. The line ``history`` reads the events alone, ``both`` the profile too, and
      ``profile``, which is ``both`` at 0, no event. None where no user has enough events.
    """
    first = FirstEvents.of(interactions, most, seed)
    if not len(first.users):
        return None

    def values(count: int, profile: bool) -> dict[str, float]:
        found = lists(first.history(count), first.users, first.times, first.known, profile)
        each = metrics.ranking(found, first.targets.ids, first.targets.offsets, [k])
        return {f"{name}@{k}": float(each[f"{name}@{k}"].mean()) for name in _BY_EVENTS}

    points = {"history": [values(count, False) for count in EVENTS]}
    if profiles:
        both = [values(count, True) for count in EVENTS]
        points = {"both": both, **points, "profile": [both[0]] * len(EVENTS)}
    lines = {
        line: {metric: [point[metric] for point in row] for metric in row[0]}
        for line, row in points.items()
    }
    told = {"users": len(first.users), "targets": len(first.targets.ids), "k": k}
    return {**told, "events": list(EVENTS), "lines": lines}


def of_cold_items(
    lists: Mapping[str, NDArray[np.int32]],
    targets: NDArray[np.int32],
    offsets: NDArray[np.int64],
) -> dict[str, dict[str, float]]:
    """recall@20 and NDCG@20 of lists, averaged over the users.

    Args:
      lists: Where was looked (``among``, ``all``) -> int32 (U, 20 or more), best first.
      targets: int32 (T,), held-out cold items.
      offsets: int64 (U + 1,); user u has ``targets[offsets[u]:offsets[u + 1]]``.
    """
    out = {}
    for where, found in lists.items():
        each = metrics.ranking(found, targets, offsets, [COLD_K])
        names = [f"{name}@{COLD_K}" for name in _OF_COLD_ITEMS]
        out[where] = {name: float(each[name].mean()) for name in names}
    return out
