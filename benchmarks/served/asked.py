"""Asked: requests out of what a bundle knows, as the load generator reads them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

HISTORY, K = 50, 10


def write_requests(bundle: Path, folder: Path, kinds: Sequence[str]) -> None:
    """A file of requests of each kind, out of what a bundle knows."""
    from tfrec.bundle import Bundle
    from tfrec.data.dataset import Dataset

    dataset = Dataset.read(Bundle.load(bundle, check=False).folder / "catalog")
    known, ids, titles = dataset.interactions, dataset.catalog.ids, dataset.catalog.titles
    rng = np.random.default_rng(0)
    counts = np.diff(known.offsets)
    users = rng.permutation(np.flatnonzero(counts >= HISTORY))
    genres = dataset.catalog.values("genres") if "genres" in dataset.catalog.attributes else ["any"]

    def history(number: int) -> list[str]:
        user = users[number % len(users)]
        first = known.offsets[user] + rng.integers(counts[user] - HISTORY + 1)
        return [ids[row] for row in known.item[first : first + HISTORY].tolist()]

    def words() -> str:
        one, other = (titles[row] for row in rng.integers(1, len(ids), 2).tolist())
        kind = genres[int(rng.integers(len(genres)))]
        return f"I like {kind.lower()} films such as {one}, and lately {other}"

    def asked(kind: str, number: int) -> str:
        user = dataset.users.ids[int(users[number % len(users)])]
        if kind == "history" or (kind == "soak" and number % 10 < 5):
            return json.dumps({"history": history(number), "k": K})
        if kind == "text":
            return json.dumps({"history": history(number), "profile": words(), "k": K})
        if kind == "user" or number % 10 < 9:
            return json.dumps({"user_id": user, "k": K})
        item = ids[int(rng.integers(1, len(ids)))]
        event = {"event_id": "soak-########", "user_id": user, "item_id": item, "event": "view"}
        return f"/v1/events\t{json.dumps(event)}"

    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        lines = [asked(kind, number) for number in range(4000)]
        (folder / f"{kind}.jsonl").write_text("\n".join(lines) + "\n")
