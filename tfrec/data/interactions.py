"""Interactions: who did what, when. Frozen, and built only through checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import InputError

TRAIN, VALID, TEST = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Interactions:
    """Events in the order (user, timestamp, order in the file), which never changes.

    Attributes:
      user: int32 (n,), row of the user, 0-based.
      item: int32 (n,), row of the item in the Catalog; 0 is the unknown item.
      timestamp: int64 (n,), seconds since 1970.
      event: int8 (n,), index into ``event_names``.
      rating: float32 (n,), NaN where the event has none.
      weight: float32 (n,), weight of the event in training, not negative.
      split: int8 (n,), TRAIN, VALID or TEST.
      num_users: How many users there are; some may have no event.
      event_names: The event types.
    """

    user: NDArray[np.int32]
    item: NDArray[np.int32]
    timestamp: NDArray[np.int64]
    event: NDArray[np.int8]
    rating: NDArray[np.float32]
    weight: NDArray[np.float32]
    split: NDArray[np.int8]
    num_users: int
    event_names: tuple[str, ...] = ("interaction",)

    def __post_init__(self) -> None:
        columns = ("item", "timestamp", "event", "rating", "weight", "split")
        for name in columns:
            if len(getattr(self, name)) != len(self.user):
                raise InputError(
                    f"interactions have {len(self.user)} users and {len(getattr(self, name))} "
                    f"values of '{name}'"
                )
        if len(self.user) and (self.user.min() < 0 or self.user.max() >= self.num_users):
            raise InputError(f"an interaction's user row is outside 0..{self.num_users - 1}")
        if (np.diff(self.user) < 0).any():
            raise InputError("interactions must be sorted by user, then by time")
        same_user = np.diff(self.user) == 0
        if (np.diff(self.timestamp)[same_user] < 0).any():
            raise InputError("the interactions of each user must be in order of time")
        if not np.isfinite(self.weight).all() or (self.weight < 0).any():
            raise InputError("interaction weights must be finite and not negative")
        for name in ("user", *columns):
            getattr(self, name).setflags(write=False)

    def __len__(self) -> int:
        return len(self.user)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """int64 (num_users + 1,): the events of user u are ``offsets[u]:offsets[u + 1]``."""
        counts = np.bincount(self.user, minlength=self.num_users)
        return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    def select(self, mask: NDArray[np.bool_]) -> Interactions:
        """The events where ``mask`` is true; user rows keep their meaning."""
        return Interactions(
            user=self.user[mask],
            item=self.item[mask],
            timestamp=self.timestamp[mask],
            event=self.event[mask],
            rating=self.rating[mask],
            weight=self.weight[mask],
            split=self.split[mask],
            num_users=self.num_users,
            event_names=self.event_names,
        )

    def part(self, *splits: int) -> Interactions:
        """The events of the given splits, e.g. ``part(TRAIN, VALID)``."""
        return self.select(np.isin(self.split, splits))

    def histories(self, users: NDArray[np.int32] | Sequence[int]) -> list[NDArray[np.int32]]:
        """Item rows of each given user's events, oldest first."""
        return [self.item[self.offsets[u] : self.offsets[u + 1]] for u in users]
