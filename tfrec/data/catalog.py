"""Catalog and Users: what can be recommended, and to whom.

The Catalog is the only owner of item id <-> row. Row 0 is the unknown item, and adding an item
never renumbers another.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import InputError
from tfrec.rows import Growing


@dataclass(frozen=True)
class FeatureSchema:
    """How attributes become a dense vector: one-hot words, then scaled numbers.

    Attributes:
      vocabularies: Categorical column -> its known values, in the order of their one-hot places.
      numeric: Numeric column -> (mean, standard deviation) by which it is normalised.
      separator: Splits several values in one categorical cell.
    """

    vocabularies: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    numeric: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    separator: str = "|"

    @property
    def width(self) -> int:
        """Length of the vector."""
        return sum(len(v) for v in self.vocabularies.values()) + len(self.numeric)

    @property
    def names(self) -> tuple[str, ...]:
        """What each place of the vector stands for: ``column=word``, or a numeric ``column``."""
        words = [
            f"{column}={word}" for column, known in self.vocabularies.items() for word in known
        ]
        return (*words, *self.numeric)

    def encode(self, attributes: Mapping[str, Sequence[str]], rows: int) -> NDArray[np.float32]:
        """Encodes columns of text cells; missing columns, empty cells and new words give zeros.

        Args:
          attributes: Column -> one cell for each row, as strings.
          rows: How many rows there are.

        Returns:
          float32 (rows, width). A cell of m known values has 1 / sqrt(m) in each place.

        Raises:
          InputError: a numeric cell is not a finite number.
        """
        out = np.zeros((rows, self.width), np.float32)
        start = 0
        for name, vocabulary in self.vocabularies.items():
            _mark(out, start, vocabulary, attributes.get(name, ()), self.separator)
            start += len(vocabulary)
        for name, (mean, deviation) in self.numeric.items():
            for row, cell in enumerate(attributes.get(name, ())):
                if cell != "":
                    out[row, start] = (_number(name, cell) - mean) / deviation
            start += 1
        return out


def _mark(
    out: NDArray[np.float32],
    start: int,
    vocabulary: Sequence[str],
    cells: Sequence[str],
    separator: str,
) -> None:
    place = {word: start + i for i, word in enumerate(vocabulary)}
    places_of: dict[str, list[int]] = {"": []}  # cells repeat, so each is split once
    at_row: list[int] = []
    at_place: list[int] = []
    values: list[float] = []
    for row, cell in enumerate(cells):
        hits = places_of.get(cell)
        if hits is None:
            hits = sorted({place[w] for w in cell.split(separator) if w in place})
            places_of[cell] = hits
        at_row += [row] * len(hits)
        at_place += hits
        values += [max(len(hits), 1) ** -0.5] * len(hits)
    out[at_row, at_place] = values


def _number(column: str, cell: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise InputError(f"column '{column}' holds '{cell}', which is not a finite number")
    return value


@dataclass(frozen=True, eq=False)
class Table:
    """Ids with titles, texts and attributes; row i of everything belongs to ``ids[i]``.

    Attributes:
      ids: Opaque strings, unique.
      titles: What a person reads. Users have none and repeat their id.
      texts: What the BERT reads; may be empty.
      attributes: Column -> one cell for each row, as strings; empty where unknown.
      schema: How the attributes become features.
    """

    ids: tuple[str, ...]
    titles: tuple[str, ...]
    texts: tuple[str, ...]
    attributes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    schema: FeatureSchema = field(default_factory=FeatureSchema)

    def __post_init__(self) -> None:
        columns = {"titles": self.titles, "texts": self.texts, **self.attributes}
        for name, values in columns.items():
            if len(values) != len(self.ids):
                raise InputError(
                    f"'{name}' has {len(values)} rows and there are {len(self.ids)} ids"
                )
        if len(set(self.ids)) != len(self.ids):
            raise InputError(f"{self._what} id '{_first_duplicate(self.ids)}' stands there twice")

    _what = "row"

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def _row_of(self) -> dict[str, int]:
        return {key: row for row, key in enumerate(self.ids)}

    @cached_property
    def features(self) -> NDArray[np.float32]:
        """float32 (len(self), schema.width)."""
        return self.schema.encode(self.attributes, len(self))


class Catalog(Table):
    """The items. Row 0 is the unknown item: its id, title and text are empty."""

    _what = "item"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.ids or self.ids[0] != "":
            raise InputError("row 0 of a catalog is the unknown item, whose id is empty")

    @property
    def num_items(self) -> int:
        """Items without the unknown one."""
        return len(self.ids) - 1

    def row(self, item_id: str) -> int:
        """Row of an item; 0 if it is not known."""
        return self._row_of.get(item_id, 0)

    def rows(self, item_ids: Iterable[str]) -> NDArray[np.int32]:
        """int32 rows of the given ids; 0 for those not known."""
        get = self._row_of.get
        return np.array([get(item_id, 0) for item_id in item_ids], np.int32)

    def having(self, column: str, values: Iterable[str]) -> NDArray[np.int32]:
        """int32 rows, ascending, of the items that have one of the values in an attribute.

        Raises:
          InputError: items have no such attribute.
        """
        found = [
            self._facet(column)[value] for value in set(values) if value in self._facet(column)
        ]
        return np.unique(np.concatenate([np.zeros(0, np.int32), *found]))

    def values(self, column: str) -> list[str]:
        """The values of an attribute, the most frequent first.

        Raises:
          InputError: items have no such attribute.
        """
        facet = self._facet(column)
        there = [value for value, rows in facet.items() if len(rows)]
        return sorted(there, key=lambda value: (-len(facet[value]), value))

    def cells(self, row: int) -> dict[str, list[str]]:
        """Attribute -> values of an item; attributes without one are left out."""
        split = {name: cells[row] for name, cells in self.attributes.items() if cells[row]}
        return {name: cell.split(self.schema.separator) for name, cell in split.items()}

    @cached_property
    def _facets(self) -> dict[str, dict[str, NDArray[np.int32]]]:
        return {}

    def _facet(self, column: str) -> dict[str, NDArray[np.int32]]:
        """Value -> rows, made when a column is first asked for."""
        if column not in self._facets:
            cells = self.attributes.get(column)
            if cells is None:
                known = ", ".join(self.attributes) or "none"
                raise InputError(
                    f"items have no attribute '{column}' to filter by; they have: {known}"
                )
            rows: dict[str, list[int]] = {}
            for row, cell in enumerate(cells):
                for value in dict.fromkeys(cell.split(self.schema.separator)) if cell else ():
                    rows.setdefault(value, []).append(row)
            self._facets[column] = {v: np.array(r, np.int32) for v, r in rows.items()}
        return self._facets[column]

    def digest(self, rows: int | None = None) -> str:
        """SHA-256, as hex, of the ids, titles and texts of the first rows; None: of all."""
        hashed = hashlib.sha256()
        for row in zip(self.ids[:rows], self.titles[:rows], self.texts[:rows], strict=True):
            hashed.update(json.dumps(row).encode())
        return hashed.hexdigest()

    def added(self, other: Catalog) -> Catalog:
        """This catalog with the items of ``other`` after its own; no row moves.

        Raises:
          InputError: an id of ``other`` is here already.
        """
        return Catalog(
            ids=self.ids + other.ids[1:],
            titles=self.titles + other.titles[1:],
            texts=self.texts + other.texts[1:],
            attributes={
                name: cells + tuple(other.attributes.get(name, ("",) * len(other)))[1:]
                for name, cells in self.attributes.items()
            },
            schema=self.schema,
        )


class LiveCatalog(Catalog):
    """A catalog to which items are added and whose items change; one thread at a time may do so.

    Args:
      base: What it begins as.
    """

    _grown: Growing

    def __init__(self, base: Catalog) -> None:
        columns = {name: list(cells) for name, cells in base.attributes.items()}
        for name, value in (
            ("ids", list(base.ids)),
            ("titles", list(base.titles)),
            ("texts", list(base.texts)),
            ("attributes", columns),
            ("schema", base.schema),
            ("_grown", Growing(base.features)),
        ):
            object.__setattr__(self, name, value)

    @property
    def features(self) -> NDArray[np.float32]:
        """float32 (len(self), schema.width)."""
        return self._grown.array

    def put(self, item_id: str, title: str, text: str, attributes: Mapping[str, str]) -> int:
        """Adds an item, or replaces what is known of it; its row, which it keeps.

        Columns that the catalog does not have are left out.

        Raises:
          InputError: the id is empty, or a numeric attribute is not a finite number.
        """
        if not item_id:
            raise InputError("an item's id is empty; give it one")
        told = {name: attributes.get(name, "") for name in self.attributes}
        features = self.schema.encode({name: (cell,) for name, cell in told.items()}, 1)
        row = self.row(item_id)
        cells: dict[str, list[str]] = self.attributes  # type: ignore[assignment]
        if row:
            self._unlist(row)
            self.titles[row], self.texts[row] = title, text  # type: ignore[index]
            for name, cell in told.items():
                cells[name][row] = cell
        else:
            row = len(self.ids)
            for column, value in ((self.titles, title), (self.texts, text), (self.ids, item_id)):
                column.append(value)  # type: ignore[attr-defined]
            for name, cell in told.items():
                cells[name].append(cell)
            self._row_of[item_id] = row
        self._grown.put(row, features[0])
        self._list(row)
        return row

    def _unlist(self, row: int) -> None:
        for column, facet in self._facets.items():
            for value in self.cells(row).get(column, ()):
                facet[value] = facet[value][facet[value] != row]

    def _list(self, row: int) -> None:
        for column, facet in self._facets.items():
            for value in dict.fromkeys(self.cells(row).get(column, ())):
                facet[value] = np.append(facet.get(value, np.zeros(0, np.int32)), np.int32(row))


class Users(Table):
    """The users; ``texts`` are their profiles."""

    _what = "user"

    def row(self, user_id: str) -> int:
        """Row of a user; -1 if he is not known."""
        return self._row_of.get(user_id, -1)


def _first_duplicate(values: Sequence[str]) -> str:
    seen: set[str] = set()
    for value in values:
        if value in seen:
            return value
        seen.add(value)
    return ""
