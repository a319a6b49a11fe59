"""Tables to read: CSV, TSV, JSON lines, Parquet and text files, gzip too, and columns in memory.

All are read in batches through pyarrow, so a file may be larger than memory. Where pyarrow gives
up, the file is walked through once more, line by line, to name the line at fault.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import shutil
import tempfile
import zlib
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet
from tqdm import tqdm

from tfrec.errors import InputError

FORMATS = ("csv", "tsv", "parquet", "jsonl", "txt")

_ENDINGS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "txt",
}
_BLOCK = 16 << 20
_SNIFFED_LINES = 1000
_LINES = 1 << 14


class Reader(ABC):
    """A table that can be read column by column, in batches.

    Attributes:
      name: What messages call it: its path, or what it holds.
      columns: Its column names, in order.
    """

    name: str
    columns: tuple[str, ...]

    @abstractmethod
    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields batches that hold exactly these columns, in file order.

        Raises:
          InputError: the file is damaged; the message says where.
        """

    def where(self, row: int) -> str:
        """How a message names a 0-based row, e.g. ``line 17``."""
        return f"row {row + 1}"


def open_table(path: str | Path, setting: str) -> Reader:
    """Opens a table by the ending of its name.

    Args:
      path: File named ``.csv``, ``.tsv``, ``.jsonl``, ``.parquet`` or ``.txt`` (one column
        ``text``, a row for each line), each also with ``.gz``; or a folder of such files with the
        same columns, which are read in the order of their names.
      setting: The configuration key that named it, for messages.

    Raises:
      InputError: it does not exist, is empty, is of no known format or cannot be read, or the
        files of a folder differ in their columns.
    """
    file = Path(path)
    if not file.exists():
        raise InputError(f"there is no file {file} ({setting})")
    if file.is_dir():
        return _Folder(file, [open_table(one, setting) for one in files_of(file)], setting)
    kind = _kind(file)
    if kind is None:
        raise InputError(
            f"{file} ({setting}) ends in '{file.suffix}'; expected one of "
            f"{', '.join('.' + f for f in FORMATS)}, or one of these with .gz"
        )
    if file.stat().st_size == 0:
        raise InputError(f"{file} ({setting}) is empty")
    if kind == "parquet":
        return _ParquetFile(file)
    if kind == "txt":
        return _LinesFile(file)
    return _JsonFile(file) if kind == "jsonl" else _DelimitedFile(file, kind)


def files_of(path: Path) -> list[Path]:
    """The files of a table: itself, or those of a folder that can be read, by name.

    Hidden files, which may be unfinished, are left out.
    """
    if not path.is_dir():
        return [path]
    found = sorted(path.iterdir(), key=lambda file: file.name)
    return [f for f in found if f.is_file() and _kind(f) and not f.name.startswith(".")]


def _kind(file: Path) -> str | None:
    ending = file.with_suffix("").suffix if file.suffix == ".gz" else file.suffix
    return _ENDINGS.get(ending.lower())


class _Folder(Reader):
    def __init__(self, path: Path, readers: Sequence[Reader], setting: str) -> None:
        if not readers:
            raise InputError(
                f"the folder {path} ({setting}) has no file that ends in "
                f"{', '.join('.' + f for f in FORMATS)}, or one of these with .gz"
            )
        self.name, self._readers = str(path), readers
        self.columns = readers[0].columns
        for other in readers[1:]:
            if set(other.columns) != set(self.columns):
                raise InputError(
                    f"{readers[0].name} has the columns {', '.join(self.columns)}, and "
                    f"{other.name} {', '.join(other.columns)}; the files of a folder need the same"
                )
        self._starts: list[int] = []

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        self._starts, rows = [], 0
        for reader in self._readers:
            self._starts.append(rows)
            for batch in reader.batches(columns):
                yield batch
                rows += batch.num_rows

    def where(self, row: int) -> str:
        place = bisect_right(self._starts, row) - 1
        reader = self._readers[place]
        return f"{Path(reader.name).name}, {reader.where(row - self._starts[place])}"


class Columns(Reader):
    """Columns in memory: lists, numpy arrays or pandas series of one length."""

    def __init__(self, name: str, columns: Mapping[str, Any]) -> None:
        self.name = name
        self.columns = tuple(str(column) for column in columns)
        arrays = [_array(name, column, columns[column]) for column in columns]
        lengths = {column: len(a) for column, a in zip(self.columns, arrays, strict=True)}
        if len(set(lengths.values())) > 1:
            raise InputError(f"the columns of {name} differ in length: {lengths}")
        self._table = pa.table(dict(zip(self.columns, arrays, strict=True)))

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yields the columns, at most a million rows at a time."""
        yield from self._table.select(list(columns)).to_batches(max_chunksize=1 << 20)


def _array(name: str, column: Any, values: Any) -> pa.Array:
    try:
        if isinstance(values, (pa.Array, pa.ChunkedArray)):
            return values
        return pa.array(values, from_pandas=True)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        # Values of several types: as text they are at least well defined.
        return pa.array([None if v is None else str(v) for v in values], pa.string())
    except pa.ArrowNotImplementedError as error:
        raise InputError(f"column '{column}' of {name} cannot be read: {error}") from None


class _DelimitedFile(Reader):
    def __init__(self, path: Path, kind: str) -> None:
        self.name, self._path = str(path), path
        self._delimiter = "\t" if kind == "tsv" else ","
        with _damage(path), _text(path) as stream:
            header = next(csv.reader(stream, delimiter=self._delimiter), [])
        if not header:
            raise InputError(f"{path} is empty: it has no line of column names")
        self.columns = tuple(header)
        _check_names(path, header)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        # Everything is read as text, so that the id 007 stays 007.
        options = pa.csv.ConvertOptions(
            column_types={c: pa.string() for c in columns},
            include_columns=list(columns),
            strings_can_be_null=False,
        )
        try:
            with _arrow_stream(self._path) as stream:
                yield from pa.csv.open_csv(
                    stream,
                    read_options=pa.csv.ReadOptions(block_size=_BLOCK),
                    parse_options=pa.csv.ParseOptions(
                        delimiter=self._delimiter, newlines_in_values=True
                    ),
                    convert_options=options,
                )
        except (pa.ArrowInvalid, OSError) as error:
            self._name_the_line(error)

    def _rows(self) -> Iterator[tuple[int, list[str]]]:
        """Yields the first line number and the cells of each row below the header."""
        with _damage(self._path), _text(self._path) as stream:
            reader = csv.reader(stream, delimiter=self._delimiter)
            next(reader)
            start = reader.line_num + 1
            for cells in reader:
                if cells:
                    yield start, cells
                start = reader.line_num + 1

    def _name_the_line(self, error: Exception) -> None:
        with contextlib.suppress(csv.Error):
            for line, cells in self._rows():
                if len(cells) != len(self.columns):
                    raise InputError(
                        f"{self.name}, line {line}: {len(cells)} cells, and the header names "
                        f"{len(self.columns)} columns"
                    ) from None
        raise InputError(f"{self.name} cannot be read: {error}") from None

    def where(self, row: int) -> str:
        with contextlib.suppress(csv.Error):
            for number, (line, _) in enumerate(self._rows()):
                if number == row:
                    return f"line {line}"
        return super().where(row)


class _JsonFile(Reader):
    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        self._schema: dict[str, pa.DataType] = {}
        names: dict[str, None] = {}
        for count, (_, entry) in enumerate(self._entries()):
            if count == _SNIFFED_LINES:
                break
            names.update(dict.fromkeys(entry))
            # Without this, pyarrow turns text that looks like a date into one.
            self._schema.update({k: pa.string() for k, v in entry.items() if isinstance(v, str)})
        if not names:
            raise InputError(f"{path} is empty: it holds no JSON object")
        self.columns = tuple(names)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        schema = pa.schema([(c, self._schema[c]) for c in columns if c in self._schema])
        options = pa.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="infer")
        done = 0
        try:
            with _arrow_stream(self._path) as stream:
                read = pa.json.ReadOptions(block_size=_BLOCK)
                for batch in pa.json.open_json(stream, read_options=read, parse_options=options):
                    yield _with_columns(batch, columns)
                    done += batch.num_rows
        except (pa.ArrowInvalid, OSError):
            # Rare: a column that changes its type, a line that is no JSON. Line by line from here.
            yield from self._slow_batches(columns, done)

    def _slow_batches(self, columns: Sequence[str], skip: int) -> Iterator[pa.RecordBatch]:
        held: list[list[Any]] = []
        for number, (_, entry) in enumerate(self._entries()):
            if number < skip:
                continue
            held.append([entry.get(c) for c in columns])
            if len(held) == 1 << 18:
                yield _mixed_batch(columns, held)
                held = []
        if held:
            yield _mixed_batch(columns, held)

    def _entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        with _damage(self._path), _text(self._path) as stream:
            for line, text in enumerate(stream, start=1):
                if not text.strip():
                    continue
                try:
                    entry = json.loads(text)
                except json.JSONDecodeError as error:
                    raise InputError(f"{self.name}, line {line}: no JSON: {error.msg}") from None
                if not isinstance(entry, dict):
                    raise InputError(
                        f"{self.name}, line {line}: holds {text.strip()[:40]!r}, and a JSON "
                        "object on each line was expected"
                    )
                yield line, entry

    def where(self, row: int) -> str:
        for number, (line, _) in enumerate(self._entries()):
            if number == row:
                return f"line {line}"
        return super().where(row)


def _with_columns(batch: pa.RecordBatch, columns: Sequence[str]) -> pa.RecordBatch:
    names = batch.schema.names
    arrays = [batch.column(c) if c in names else pa.nulls(batch.num_rows) for c in columns]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _mixed_batch(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> pa.RecordBatch:
    cells = zip(*rows, strict=True)
    arrays = [_array("", c, list(values)) for c, values in zip(columns, cells, strict=True)]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


class _LinesFile(Reader):
    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        self.columns = ("text",)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        held: list[str] = []
        with _damage(self._path), _text(self._path) as stream:
            for line in stream:
                held.append(line.rstrip("\r\n"))
                if len(held) == _LINES:
                    yield pa.RecordBatch.from_arrays([pa.array(held)] * len(columns), list(columns))
                    held = []
        if held:
            yield pa.RecordBatch.from_arrays([pa.array(held)] * len(columns), list(columns))

    def where(self, row: int) -> str:
        return f"line {row + 1}"


class _ParquetFile(Reader):
    def __init__(self, path: Path) -> None:
        self.name, self._path = str(path), path
        with self._opened() as file:
            self.columns = tuple(file.schema_arrow.names)
            if file.metadata.num_rows == 0:
                raise InputError(f"{path} is empty: it has no rows")
        _check_names(path, self.columns)

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with self._opened() as file:
            yield from file.iter_batches(batch_size=1 << 16, columns=list(columns))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            source: Any = self._path
            if self._path.suffix == ".gz":  # Parquet is read from its end, and gzip is not
                source = stack.enter_context(tempfile.TemporaryFile())
                with _damage(self._path), gzip.open(self._path) as packed:
                    shutil.copyfileobj(packed, source)
                source.seek(0)
            try:
                yield stack.enter_context(pa.parquet.ParquetFile(source))
            except (pa.ArrowInvalid, OSError) as error:
                raise InputError(f"{self.name} is no whole Parquet file: {error}") from None


def _check_names(path: Path, names: Sequence[str]) -> None:
    twice = [name for place, name in enumerate(names) if name in names[:place]]
    if twice:
        raise InputError(f"{path} has two columns named '{twice[0]}'")


@contextlib.contextmanager
def _arrow_stream(path: Path) -> Iterator[pa.NativeFile]:
    """Opens a file, unpacked if it ends in .gz, with a progress bar if it takes long."""
    with (
        path.open("rb") as raw,
        tqdm.wrapattr(
            raw,
            "read",
            total=path.stat().st_size,
            desc=f"reading {path.name}",
            delay=2,
            disable=None,
        ) as watched,
    ):
        stream = pa.PythonFile(watched, mode="r")
        yield pa.CompressedInputStream(stream, "gzip") if path.suffix == ".gz" else stream


def open_bytes(path: Path) -> IO[bytes]:
    """Opens a file to read, unpacked if its name ends in .gz."""
    opened: Any = gzip.open(path) if path.suffix == ".gz" else path.open("rb")  # noqa: SIM115
    return opened  # type: ignore[no-any-return]


@contextlib.contextmanager
def _text(path: Path) -> Iterator[IO[str]]:
    with io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline="") as stream:
        yield stream


@contextlib.contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Turns what Python says of a damaged file into our one line."""
    try:
        yield
    except UnicodeDecodeError:
        raise InputError(
            f"{path}{_undecodable_line(path)} is not UTF-8; save the file as UTF-8"
        ) from None
    except EOFError:
        raise InputError(f"{path} is cut off: its gzip data ends too early") from None
    except (gzip.BadGzipFile, zlib.error):
        raise InputError(f"{path} ends in .gz and holds no whole gzip data") from None
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def _undecodable_line(path: Path) -> str:
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                return f", line {number}:"
    return ""
