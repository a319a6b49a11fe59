"""Dataset: interactions, catalog and users together, as `prepare` leaves them on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tfrec.artifact import Artifact, write_json, writing
from tfrec.config import DataConfig
from tfrec.data.building import build
from tfrec.data.catalog import Catalog, FeatureSchema, Table, Users
from tfrec.data.interactions import Interactions
from tfrec.data.raw import RawData, RawTable, read_events, read_table
from tfrec.data.tables import Columns
from tfrec.errors import ArtifactError

KIND = "dataset"

_EVENT_COLUMNS = {
    "user": np.int32,
    "item": np.int32,
    "timestamp": np.int64,
    "event": np.int8,
    "rating": np.float32,
    "weight": np.float32,
    "split": np.int8,
}
_ATTRIBUTE = "attribute."


@dataclass(frozen=True, eq=False)
class Dataset:
    """What every later stage reads.

    Attributes:
      interactions: All kept events, with their split.
      catalog: All items, also those without an event.
      users: All users; ``len(users) == interactions.num_users``.
    """

    interactions: Interactions
    catalog: Catalog
    users: Users

    @classmethod
    def from_columns(
        cls,
        interactions: Mapping[str, Any],
        items: Mapping[str, Any] | None = None,
        users: Mapping[str, Any] | None = None,
        config: DataConfig | None = None,
        seed: int = 1,
    ) -> Dataset:
        """Builds a dataset from columns in memory, by the same rules as from files.

        Args:
          interactions: Columns ``user_id``, ``item_id``, ``timestamp`` and, if there are any,
            ``event``, ``rating`` and ``weight``: lists, arrays, or a pandas DataFrame of them.
          items: Columns ``item_id``, ``title`` and any others.
          users: Columns ``user_id`` and any others.
          config: How to clean and split; files that it names are not read.
          seed: Of the cold-start splits.

        Raises:
          InputError: a column is missing or a value cannot be used.
        """
        settings = config or DataConfig()
        events = read_events(
            Columns("the interactions", interactions), settings.columns, settings.timestamp_unit
        )

        def table(name: str, key: str, columns: Mapping[str, Any] | None) -> RawTable | None:
            if columns is None:
                return None
            return read_table(Columns(name, columns), key, settings.columns, settings.separator)

        raw = RawData(
            events, table("the items", "item_id", items), table("the users", "user_id", users)
        )
        built = build(raw, settings, seed)
        return cls(built.interactions, built.catalog, built.users)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Leaves the dataset as an artifact at ``folder``, which :meth:`load` reads.

        Raises:
          SetupError: the disk is full or cannot be written.
        """
        with writing(folder, kind=KIND, config={}) as draft:
            self.write(draft.path)

    def write(self, folder: Path) -> None:
        """Writes the payload: interactions, items and users as Parquet, and dataset.json."""
        events = {name: getattr(self.interactions, name) for name in _EVENT_COLUMNS}
        pq.write_table(pa.table(events), folder / "interactions.parquet", compression="zstd")
        _write_table(self.catalog, folder / "items.parquet")
        _write_table(self.users, folder / "users.parquet")
        description = {
            "event_names": list(self.interactions.event_names),
            "num_users": self.interactions.num_users,
            "items": _plain(self.catalog.schema),
            "users": _plain(self.users.schema),
        }
        write_json(folder / "dataset.json", description)

    @classmethod
    def load(cls, artifact: Artifact | str | os.PathLike[str]) -> Dataset:
        """Reads a prepared dataset back.

        Args:
          artifact: The artifact that ``prepare`` left, or its folder.

        Raises:
          ArtifactError: it is missing, unfinished or damaged.
        """
        path = artifact.path if isinstance(artifact, Artifact) else artifact
        return cls.read(Artifact.load(path, KIND).path)

    @classmethod
    def read(cls, folder: Path) -> Dataset:
        """Reads what :meth:`write` wrote, whose digests somebody else has checked.

        Raises:
          ArtifactError: a file is missing, or is not what it should be.
        """
        try:
            description = json.loads((folder / "dataset.json").read_text("utf-8"))
            events = pq.read_table(folder / "interactions.parquet")
            columns = {
                name: np.array(events[name].to_numpy(), kind)
                for name, kind in _EVENT_COLUMNS.items()
            }
            interactions = Interactions(
                **columns,
                num_users=description["num_users"],
                event_names=tuple(description["event_names"]),
            )
            catalog = Catalog(**_read_table(folder / "items.parquet", description["items"]))
            users = Users(**_read_table(folder / "users.parquet", description["users"]))
        except (OSError, KeyError, ValueError, pa.ArrowException) as error:
            raise ArtifactError(f"{folder} holds no dataset of this version: {error}") from None
        return cls(interactions, catalog, users)


def _write_table(table: Table, path: Path) -> None:
    columns = {"id": table.ids, "title": table.titles, "text": table.texts}
    columns |= {_ATTRIBUTE + name: cells for name, cells in table.attributes.items()}
    arrays = {name: pa.array(cells, pa.string()) for name, cells in columns.items()}
    pq.write_table(pa.table(arrays), path, compression="zstd")


def _cells(column: pa.ChunkedArray) -> tuple[str, ...]:
    """The texts of a column; those that are equal are one object, since many are in some."""
    coded = column.combine_chunks().dictionary_encode()
    words = coded.dictionary.to_pylist()
    return tuple(words[code] for code in coded.indices.to_pylist())


def _read_table(path: Path, schema: Mapping[str, Any]) -> dict[str, Any]:
    table = pq.read_table(path)
    cells = {column: _cells(table[column]) for column in table.column_names}
    return {
        "ids": cells.pop("id"),
        "titles": cells.pop("title"),
        "texts": cells.pop("text"),
        "attributes": {n.removeprefix(_ATTRIBUTE): values for n, values in cells.items()},
        "schema": FeatureSchema(
            {n: tuple(words) for n, words in schema["vocabularies"]},
            {n: (float(mean), float(deviation)) for n, mean, deviation in schema["numeric"]},
            schema["separator"],
        ),
    }


def _plain(schema: FeatureSchema) -> dict[str, Any]:
    # Lists, not objects: the order is that of the features, and sorted keys would lose it.
    return {
        "vocabularies": [[name, list(words)] for name, words in schema.vocabularies.items()],
        "numeric": [[name, *values] for name, values in schema.numeric.items()],
        "separator": schema.separator,
    }
