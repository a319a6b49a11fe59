"""MovieLens: its raw forms, brought into one.

Every set gives films with a title such as ``Toy Story (1995)`` and ``genres`` such as
``Animation|Children's|Comedy``; ml-100k and ml-1m also give users with ``age``, ``gender`` and
``occupation`` (no zip codes). The order of rows is that of the publisher's files.
"""

from __future__ import annotations

import gzip
import io
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv

from tfrec.config import DataConfig
from tfrec.data.raw import RawData, RawTable, read_events, read_table
from tfrec.data.tables import Columns, open_table
from tfrec.errors import InputError

RECBOLE_ITEMS = "ml-100k.item"

_EVENTS = ("user_id", "item_id", "rating", "timestamp")
_GENRES = (
    "unknown",
    "Action",
    "Adventure",
    "Animation",
    "Children's",
    "Comedy",
    "Crime",
    "Documentary",
    "Drama",
    "Fantasy",
    "Film-Noir",
    "Horror",
    "Musical",
    "Mystery",
    "Romance",
    "Sci-Fi",
    "Thriller",
    "War",
    "Western",
)
# From the README of ml-1m.
_AGES = {
    "1": "under 18",
    "18": "18-24",
    "25": "25-34",
    "35": "35-44",
    "45": "45-49",
    "50": "50-55",
    "56": "56 and over",
}
_OCCUPATIONS = (
    "other",
    "academic/educator",
    "artist",
    "clerical/admin",
    "college/grad student",
    "customer service",
    "doctor/health care",
    "executive/managerial",
    "farmer",
    "homemaker",
    "K-12 student",
    "lawyer",
    "programmer",
    "retired",
    "sales/marketing",
    "scientist",
    "self-employed",
    "technician/engineer",
    "tradesman/craftsman",
    "unemployed",
    "writer",
)
_LATEST_SMALL_ROWS = {"ratings": 100_836, "users": 610, "movies": 9_742}


def read_100k(folder: Path, _: DataConfig) -> RawData:
    """Reads ml-100k: the publisher's files, or those made by :func:`unpack_recbole`."""
    events = _events(_content(folder, "u.data"), "u.data")
    recbole = folder / RECBOLE_ITEMS
    items = _recbole_films(recbole) if recbole.exists() else _films(_content(folder, "u.item"))
    rows = [line.split("|") for line in _content(folder, "u.user").decode("latin-1").splitlines()]
    ids, ages, genders, occupations, _zip_codes = zip(*rows, strict=True)
    attributes = {"age": ages, "gender": genders, "occupation": occupations}
    return RawData(events, items, RawTable("u.user", ids, attributes))


def read_1m(folder: Path, _: DataConfig) -> RawData:
    """Reads ml-1m; ages and occupations get the words that its README gives their codes."""
    events = _events(_content(folder, "ratings.dat").replace(b"::", b"\t"), "ratings.dat")
    films = _double_colons(_content(folder, "movies.dat"))
    ids, titles, genres = zip(*films, strict=True)
    items = RawTable("movies.dat", ids, {"title": titles, "genres": genres})
    users = _double_colons(_content(folder, "users.dat"))
    keys, genders, ages, occupations, _zip_codes = zip(*users, strict=True)
    attributes = {
        "age": tuple(_AGES[code] for code in ages),
        "gender": genders,
        "occupation": tuple(_OCCUPATIONS[int(code)] for code in occupations),
    }
    return RawData(events, items, RawTable("users.dat", keys, attributes))


def read_latest_small(folder: Path, config: DataConfig) -> RawData:
    """Reads ml-latest-small and checks it by the row counts that its README states.

    No digest is known here, since this machine-made snapshot has no fixed release.

    Raises:
      InputError: it has other row counts.
    """
    names = {"user_id": "userId", "item_id": "movieId"}
    events = read_events(_open(folder, "ratings.csv"), names)
    films = read_table(_open(folder, "movies.csv"), "item_id", names)
    genres = ["" if g == "(no genres listed)" else g for g in films.columns["genres"]]
    columns = {"title": films.columns["title"], "genres": tuple(genres)}
    found = {"ratings": len(events), "users": len(events.user_ids), "movies": len(films.ids)}
    if found != _LATEST_SMALL_ROWS:
        raise InputError(
            f"{folder} holds {found}, and ml-latest-small of 2018 has {_LATEST_SMALL_ROWS}; read "
            "another release as `files` with data.columns"
        )
    return RawData(events, RawTable(films.name, films.ids, columns))


def unpack_recbole(wheel: zipfile.ZipFile, folder: Path) -> None:
    """Writes the copy of ml-100k that recbole's wheel carries.

    Events and users become the publisher's own files again, byte for byte. The films keep
    recbole's form: the publisher's has columns that recbole dropped.
    """
    prefix = "recbole/dataset_example/ml-100k/ml-100k"
    events = wheel.read(f"{prefix}.inter").split(b"\n", 1)[1]
    users = wheel.read(f"{prefix}.user").split(b"\n", 1)[1]
    (folder / "u.data").write_bytes(events)
    (folder / "u.user").write_bytes(users.replace(b"\t", b"|"))
    (folder / RECBOLE_ITEMS).write_bytes(wheel.read(f"{prefix}.item"))


def _content(folder: Path, member: str) -> bytes:
    plain = folder / member
    return (
        plain.read_bytes() if plain.exists() else gzip.decompress(Path(f"{plain}.gz").read_bytes())
    )


def _open(folder: Path, member: str) -> Any:
    plain = folder / member
    return open_table(plain if plain.exists() else Path(f"{plain}.gz"), "data.data_dir")


def _events(content: bytes, name: str) -> Any:
    table = pa.csv.read_csv(
        io.BytesIO(content),
        read_options=pa.csv.ReadOptions(column_names=list(_EVENTS)),
        parse_options=pa.csv.ParseOptions(delimiter="\t"),
    )
    return read_events(Columns(name, dict(zip(_EVENTS, table.columns, strict=True))), {}, "s")


def _films(content: bytes) -> RawTable:
    # splitlines() would also split at control characters that latin-1 text may hold.
    rows = [line.split("|") for line in content.decode("latin-1").split("\n") if line]
    ids = tuple(row[0] for row in rows)
    titles = tuple(row[1].strip() for row in rows)
    flags = [row[5 : 5 + len(_GENRES)] for row in rows]
    return RawTable("u.item", ids, {"title": titles, "genres": tuple(map(_flagged, flags))})


def _flagged(flags: Sequence[str]) -> str:
    return "|".join(g for g, flag in zip(_GENRES, flags, strict=True) if flag == "1")


def _recbole_films(path: Path) -> RawTable:
    rows = [line.split("\t") for line in path.read_text("utf-8").split("\n")[1:] if line]
    ids, titles, years, genres = zip(*rows, strict=True)
    # Film 267 is the data set's own placeholder, titled "unknown" and without a year.
    titled = tuple(
        "unknown" if year == "unkonwn" else f"{title} ({year})"
        for title, year in zip(titles, years, strict=True)
    )
    joined = tuple(genre.replace(" ", "|") for genre in genres)
    return RawTable(RECBOLE_ITEMS, ids, {"title": titled, "genres": joined})


def _double_colons(content: bytes) -> list[list[str]]:
    return [line.split("::") for line in content.decode("latin-1").split("\n") if line]
