"""Attributes: what kind a column is, and the texts and features made of it.

A column is judged by all its cells that are not empty:

- numeric, if every one is a number;
- categorical, if its values (cells split at the separator) are short and come again: at most 40
  characters and 4 words on average, and each at least twice on average;
- text otherwise.

``data.categorical`` names columns that are categorical whatever they look like.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import pyarrow as pa

from tfrec.config import DataConfig
from tfrec.data.catalog import FeatureSchema
from tfrec.data.columns import BadCell, numbers, to_number
from tfrec.errors import InputError

Kind = Literal["numeric", "categorical", "text", "empty"]

_SHORT_CHARACTERS = 40
_SHORT_WORDS = 4
_COMES_AGAIN = 2


def kind_of(cells: Sequence[str], separator: str) -> Kind:
    """Judges a column by the rules above; ``empty`` if no cell holds anything."""
    filled = [cell for cell in cells if cell.strip()]
    if not filled:
        return "empty"
    if _is_number(filled[0]) and all(map(_is_number, filled)):
        return "numeric"
    values = [value for cell in filled for value in cell.split(separator) if value]
    if not values:
        return "empty"
    characters = sum(map(len, values)) / len(values)
    words = sum(len(value.split()) for value in values) / len(values)
    again = len(values) / len(set(values))
    short = characters <= _SHORT_CHARACTERS and words <= _SHORT_WORDS
    return "categorical" if short and again >= _COMES_AGAIN else "text"


def kinds_of(columns: Mapping[str, Sequence[str]], settings: DataConfig) -> dict[str, Kind]:
    """Column -> what it is."""
    return {
        name: "categorical" if name in settings.categorical else kind_of(cells, settings.separator)
        for name, cells in columns.items()
    }


def schema_of(
    ids: Sequence[str],
    columns: Mapping[str, Sequence[str]],
    kinds: Mapping[str, Kind],
    settings: DataConfig,
) -> FeatureSchema:
    """How the categorical and numeric ones of the columns become features.

    Vocabularies hold the ``data.max_values`` most frequent values, ties in alphabetical order.
    Numbers are normalised by mean and standard deviation of the cells that are not empty.

    Raises:
      InputError: a numeric column holds NaN or infinity.
    """
    vocabularies: dict[str, tuple[str, ...]] = {}
    numeric: dict[str, tuple[float, float]] = {}
    for name, cells in columns.items():
        if kinds[name] == "categorical":
            vocabularies[name] = _vocabulary(cells, settings.separator, settings.max_values)
        elif kinds[name] == "numeric":
            numeric[name] = _mean_and_deviation(ids, name, cells)
    return FeatureSchema(vocabularies, numeric, settings.separator)


def joined_texts(
    columns: Sequence[Sequence[str]], separator: str, between: str = ". "
) -> tuple[str, ...]:
    """Row by row, the cells that hold something, e.g. ``Toy Story (1995). Animation, Comedy``."""
    return tuple(
        between.join(_readable(cell, separator) for cell in row if cell.strip())
        for row in zip(*columns, strict=True)
    )


def profiles(columns: Mapping[str, Sequence[str]], separator: str, rows: int) -> tuple[str, ...]:
    """A profile text for each user: ``age 24, gender M, occupation technician``.

    Column names and values in the order of the file; empty cells are left out.
    """
    if not columns:
        return ("",) * rows
    names = [name.replace("_", " ") for name in columns]
    return tuple(
        ", ".join(
            f"{name} {_readable(cell, separator)}"
            for name, cell in zip(names, row, strict=True)
            if cell.strip()
        )
        for row in zip(*columns.values(), strict=True)
    )


def _readable(cell: str, separator: str) -> str:
    return ", ".join(value.strip() for value in cell.strip().split(separator) if value.strip())


def _is_number(cell: str) -> bool:
    try:
        to_number(cell)
    except ValueError:
        return False
    return True


def _vocabulary(cells: Sequence[str], separator: str, size: int) -> tuple[str, ...]:
    counts = Counter(value for cell in cells for value in cell.split(separator) if value)
    ranked = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    return tuple(sorted(value for value, _ in ranked[:size]))


def _mean_and_deviation(ids: Sequence[str], name: str, cells: Sequence[str]) -> tuple[float, float]:
    try:
        values = numbers(pa.array(cells, pa.string()))
    except BadCell as bad:
        raise InputError(f"column '{name}' of '{ids[bad.row]}' {bad}") from None
    known = values[~np.isnan(values)]
    deviation = float(known.std())
    return float(known.mean()), deviation if deviation > 0 else 1.0
