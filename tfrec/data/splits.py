"""Splits: which events train, which validate, which test."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from tfrec.config import DataConfig
from tfrec.data.interactions import TEST, TRAIN, VALID
from tfrec.errors import InputError

_LABELLED = 77  # a stream of its own, so that no other draw of the same seed is like it
_SHORTEST = 3  # events of a user that leave-one-out divides


def assign(
    user: NDArray[np.int32],
    item: NDArray[np.int32],
    timestamp: NDArray[np.int64],
    settings: DataConfig,
    seed: int = 1,
) -> NDArray[np.int8]:
    """Gives each event its part.

    ============== =================================================================
    leave_one_out  last event of each user: TEST; the one before: VALID; users with
                   fewer than three events are all TRAIN
    time           the latest ``test_fraction`` of all events: TEST; the
                   ``valid_fraction`` before: VALID; equal times are never parted
    item_cold      every event of a random ``test_fraction`` of the items: TEST; of
                   ``valid_fraction``: VALID. Only items with events are drawn
    user_cold      the same with users
    none           all TRAIN
    ============== =================================================================

    Args:
      user: int32 (n,), sorted; within a user the events are in order of time.
      item: int32 (n,).
      timestamp: int64 (n,).
      settings: ``split``, ``valid_fraction`` and ``test_fraction`` are read.
      seed: Of the draw of users or items.

    Returns:
      int8 (n,) of TRAIN, VALID and TEST.

    Raises:
      InputError: there are too few users, items or times to make three parts.
    """
    if settings.split == "leave_one_out":
        return _leave_one_out(user)
    if settings.split == "time":
        return _by_time(timestamp, settings)
    if settings.split == "item_cold":
        return _cold(item, "items", settings, seed)
    if settings.split == "user_cold":
        return _cold(user, "users", settings, seed)
    return np.full(len(user), TRAIN, np.int8)


def labelled(num_users: int, share: float, seed: int) -> NDArray[np.bool_]:
    """Which users' events an adaptation learns from, where it is not all of them.

    Args:
      num_users: How many users there are.
      share: Of them, above 0; at least one is drawn.
      seed: Of the draw; a larger share keeps the users of a smaller one.

    Returns:
      bool (num_users,).
    """
    drawn = np.random.default_rng([seed, _LABELLED]).permutation(num_users)
    chosen = np.zeros(num_users, bool)
    chosen[drawn[: max(1, round(share * num_users))]] = True
    return chosen


def _leave_one_out(user: NDArray[np.int32]) -> NDArray[np.int8]:
    split = np.full(len(user), TRAIN, np.int8)
    _, first, counts = np.unique(user, return_index=True, return_counts=True)
    long = counts >= _SHORTEST
    if not long.any():
        raise InputError(
            f"the leave_one_out split needs at least 1 user with {_SHORTEST} events, and of "
            f"{len(counts)} users the longest history has {counts.max(initial=0)}; give more "
            "events, or set data.split=none"
        )
    last = first[long] + counts[long] - 1
    split[last] = TEST
    split[last - 1] = VALID
    return split


def _by_time(timestamp: NDArray[np.int64], settings: DataConfig) -> NDArray[np.int8]:
    n = len(timestamp)
    ordered = np.sort(timestamp)
    test_from = ordered[min(n - 1, round(n * (1 - settings.test_fraction)))]
    # Counted back from there, since equal times may have made the test part larger than asked.
    test_place = int(np.searchsorted(ordered, test_from))
    valid_from = ordered[max(0, test_place - max(1, round(n * settings.valid_fraction)))]
    if not ordered[0] < valid_from < test_from:
        raise InputError(
            f"the time split needs three spans of time, and {n} events at "
            f"{len(np.unique(ordered))} distinct times do not give them with "
            f"data.valid_fraction={settings.valid_fraction} and "
            f"data.test_fraction={settings.test_fraction}"
        )
    split = np.full(n, TRAIN, np.int8)
    split[timestamp >= valid_from] = VALID
    split[timestamp >= test_from] = TEST
    return split


def _cold(codes: NDArray[np.int32], what: str, settings: DataConfig, seed: int) -> NDArray[np.int8]:
    present = np.unique(codes)
    n = len(present)
    tested = max(1, round(n * settings.test_fraction))
    validated = max(1, round(n * settings.valid_fraction))
    if n < tested + validated + 1:
        raise InputError(
            f"the {settings.split} split needs at least 3 {what} with events, and there are {n}; "
            "give more data, or set data.split=none"
        )
    drawn = np.random.default_rng(seed).permutation(present)
    part = np.full(int(present.max()) + 1, TRAIN, np.int8)
    part[drawn[:tested]] = TEST
    part[drawn[tested : tested + validated]] = VALID
    return part[codes]
