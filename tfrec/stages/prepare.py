"""prepare: raw files in, a checked dataset out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tfrec.artifact import Artifact, current, write_json, writing
from tfrec.config import FILE, Config
from tfrec.data import sources
from tfrec.data.building import build
from tfrec.data.cleaning import REASONS
from tfrec.data.dataset import KIND, Dataset

FOLDER = "prepare"

_PARTS = ("train", "valid", "test")


def run(config: Config, out: Path, *, force: bool = False) -> Artifact:
    """Reads, cleans and splits the data, and leaves it at ``out/prepare``.

    Nothing is made if the same configuration has already prepared the same input files there.
    The whole configuration is left at ``out/config.json``, where recommend finds its defaults.

    Args:
      config: Its ``[data]`` section is read, and the seed if the split is drawn at random.
      out: The run's folder.
      force: Prepare anew in any case.

    Returns:
      An artifact of the kind ``dataset``; its metrics are the summary of what was dropped and why.

    Raises:
      ConfigError, InputError, SetupError: as :func:`tfrec.data.sources.read`.
    """
    folder = Path(out) / FOLDER
    recipe = _recipe(config)
    found = None if force else current(folder, kind=KIND, config=recipe)
    if found is None:
        built = build(sources.read(config.data), config.data, config.seed)
        with writing(folder, kind=KIND, config=recipe) as draft:
            Dataset(built.interactions, built.catalog, built.users).write(draft.path)
            draft.metrics.update(built.summary)
        found = Artifact.peek(folder, KIND)
    write_json(Path(out) / FILE, config.dump())
    return found


def summary_lines(artifact: Artifact) -> list[str]:
    """The artifact's summary as a small table for people."""
    m = artifact.metrics
    rows: list[tuple[str, int, str]] = [("interactions read", m["rows"], "")]
    dropped = m["dropped"]
    rows += [("  dropped", dropped[why], note) for why, note in REASONS.items() if why in dropped]
    rows.append(("interactions kept", m["interactions"], f"{m['first']} to {m['last']}"))
    if len(m["events"]) > 1:
        rows += [(f"  {name}", count, "") for name, count in m["events"].items()]
    rows += [(f"  {part}", m["split"][part], "") for part in _PARTS if m["split"][part]]
    rows.append(("items", m["items"], f"{m['items_without_events']} without events"))
    if m["unknown_items"]:
        rows.append(
            (
                "  unknown",
                m["unknown_items"],
                f"not in the items file; {m['unknown_item_interactions']:,} interactions",
            )
        )
    rows.append(("users", m["users"], f"{m['users_without_events']} without events"))
    lines = [f"{what:<20}{count:>12,}   {note}".rstrip() for what, count, note in rows]
    for what in ("item", "user"):
        if described := m[f"{what}_attributes"]:
            text = "; ".join(f"{name} ({kind})" for name, kind in described.items())
            lines.append(f"{what} attributes: {text}")
    return lines


def _recipe(config: Config) -> dict[str, Any]:
    drawn = config.data.split in ("item_cold", "user_cold")
    return {
        "data": config.data.model_dump(mode="json"),
        "inputs": sources.input_digests(config.data),
        "seed": config.seed if drawn else None,
    }
