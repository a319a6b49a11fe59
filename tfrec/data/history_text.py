"""Histories as texts: what somebody bought, liked or saw, in words that a BERT can read."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tfrec.data.interactions import Interactions

MOST = 20
_LIKED = 0.7  # of the way from the lowest rating to the highest
_VERBS = {
    "interaction": "chose",
    "view": "viewed",
    "click": "clicked on",
    "cart": "put into the cart",
    "purchase": "bought",
    "like": "liked",
    "share": "shared",
    "rating": "rated",
    "watch": "watched",
}


def history_texts(
    interactions: Interactions,
    titles: Sequence[str],
    users: NDArray[np.integer],
    stops: NDArray[np.integer],
    most: int = MOST,
) -> list[str]:
    """Describes the first events of users: ``liked: Heat; Fargo. watched: Clue.``

    An event is told by its type, and a rated one by whether it was liked or disliked. What is
    newest comes first, so that a text that is cut loses the oldest.

    Args:
      interactions: The events.
      titles: Title of each row of the catalog.
      users: int (n,), rows of users.
      stops: int (n,), how many of a user's events are known.
      most: So many of the newest of these are told.

    Returns:
      n texts; empty where nothing is known.
    """
    liked = _opinions(interactions)
    offsets = interactions.offsets
    out = []
    for user, stop in zip(users, stops, strict=True):
        last = int(offsets[user] + stop)
        told: dict[str, list[str]] = {}
        for event in range(last - 1, max(int(offsets[user]), last - most) - 1, -1):
            title = titles[interactions.item[event]]
            if title:
                told.setdefault(_verb(interactions, liked, event), []).append(title)
        out.append(". ".join(f"{verb}: {'; '.join(names)}" for verb, names in told.items()))
    return out


def _opinions(interactions: Interactions) -> NDArray[np.float32]:
    """float32 (events,): 1 liked, -1 disliked, 0 neither or not rated."""
    rating = interactions.rating
    rated = rating[np.isfinite(rating)]
    if not len(rated) or rated.min() == rated.max():
        return np.zeros(len(rating), np.float32)
    place = (rating - rated.min()) / (rated.max() - rated.min())
    opinion: NDArray[np.float32] = np.select(
        [place >= _LIKED, place <= 1 - _LIKED], [np.float32(1), np.float32(-1)], np.float32(0)
    )
    return opinion


def _verb(interactions: Interactions, liked: NDArray[np.float32], event: int) -> str:
    if liked[event]:
        return "liked" if liked[event] > 0 else "disliked"
    name = interactions.event_names[int(interactions.event[event])]
    return _VERBS.get(name, name)
