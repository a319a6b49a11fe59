"""encode: a finished run in, a Parquet file of vectors of items, users or texts out."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

import tfrec
from tfrec.artifact import MANIFEST, Artifact, disk_errors, file_digest, locked, write_json
from tfrec.data.columns import strings
from tfrec.data.raw import located
from tfrec.data.tables import Reader, open_table
from tfrec.errors import ArtifactError, InputError
from tfrec.models.encoder import KIND, PretrainedEncoder
from tfrec.models.engine import (
    RetrievalCard,
    TensorFlowEngine,
    load_pretrained,
    load_recommender,
    read_json,
)
from tfrec.models.text import TextEncoder
from tfrec.recommender import Floats, Recommender

What = Literal["items", "users", "texts"]
Space = Literal["towers", "text"]
Role = Literal["query", "passage"]

IDS = ("item_id", "user_id", "id")
"""Columns that are taken as the ids of texts, the first that is there."""

BLOCK = 8192  # rows encoded together and kept together: what an interrupt costs at most
_CHARACTERS = 1 << 22  # of a block of texts: it ends earlier where texts are long
_PREFIX = "tfrec."
_SAMPLE = 2000  # texts that are judged by whether the BERT knows their words
_UNIT = 1e-3  # a vector this near to length 1 has length 1

Block = tuple[list[str] | None, Floats]


@dataclass(frozen=True)
class _Rows:
    """What is to be encoded.

    Attributes:
      id_column: Name of the column of ids; "": there is none.
      count: Rows in all.
      width: Length of a vector.
      recipe: All that decides about the vectors; becomes the file's metadata.
      blocks: The ids and vectors, float32 (n, width), of all rows but so many, block by block.
    """

    id_column: str
    count: int
    width: int
    recipe: Mapping[str, str]
    blocks: Callable[[int], Iterator[Block]]


def run(
    folder: str | os.PathLike[str],
    what: What,
    *,
    texts: str | os.PathLike[str] | None = None,
    column: str = "text",
    id_column: str | None = None,
    space: Space | None = None,
    role: Role = "passage",
    cut: str = "final",
    out: str | os.PathLike[str] | None = None,
    force: bool = False,
) -> Path:
    """Writes vectors to a Parquet file: a column of ids, and ``vector``, lists of float32.

    Rows are encoded in blocks, and finished ones are kept beside the file: the same call continues
    after an interrupt. The file appears under its name when it is whole.

    Args:
      folder: A run's folder, or its ``adapt/retrieval``; or its ``pretrain``, for the vectors of
        the pretrained encoder.
      what: ``items`` and ``users`` of the run, or ``texts`` of a file.
      texts: That file; one row of vectors for each of its rows, zeros where the text is empty.
      column: Its column of texts.
      id_column: Its column of ids; None: the first of :data:`IDS` that is there, if any.
      space: ``towers``: candidate vectors of items and query vectors of users, whose inner product
        is the score of retrieval; ``text``: the BERT's vectors. None: ``text`` of texts, else
        ``towers``.
      role: What texts of a file are: looked for (``passage``) or what looks (``query``).
      cut: Which weights: ``final``, ``test`` or ``select``.
      out: The file; None: ``encode/<what>-<space>.parquet`` in the run's folder, ``<what>`` being
        the file's name where texts are encoded.
      force: Replace a file that holds something else.

    Returns:
      Path of the file.

    Raises:
      ArtifactError: there is no finished run or encoder.
      InputError: the texts cannot be read, or ``out`` exists and holds something else.
      SetupError: the disk is full or cannot be written.
    """
    if (what == "texts") != (texts is not None):
        raise InputError("--what texts and --texts FILE belong together: give both or neither")
    if what == "texts" and space == "towers":
        raise InputError("texts have no vectors in the space of the towers; leave out --space")
    space = space or ("text" if what == "texts" else "towers")
    base, pretrained = _run_folder(Path(folder))
    name = f"{_name(what, texts)}-{space}{'-pretrained' if pretrained else ''}.parquet"
    target = Path(out) if out else base / "encode" / name
    if target.suffix != ".parquet" or target.is_dir():
        raise InputError(f"--out {target} is not the name of a .parquet file")
    reader = None if texts is None else _opened(texts, column, id_column)
    if reader is None:
        if pretrained and space == "towers":
            _check_towers(Path(folder), what)
        recommender, recipe = _pretrained(Path(folder), cut) if pretrained else _loaded(base, cut)
        rows = _of_run(recommender, what, space, cut, recipe)
    else:
        ids = id_column or next((name for name in IDS if name in reader.columns), "")
        # A published encoder has no run around it, and needs none to read texts.
        encoder = (
            PretrainedEncoder.load(folder).text_encoder()
            if pretrained
            else _encoder(_loaded(base, cut)[0])
        )
        rows = _of_texts(reader, column, ids, role, encoder)
    with disk_errors(target):
        _write(rows, target, force)
    return target


def _name(what: What, texts: str | os.PathLike[str] | None) -> str:
    return what if texts is None else Path(texts).name.partition(".")[0]


# --- what makes the vectors ---


def _run_folder(folder: Path) -> tuple[Path, bool]:
    """The folder of a run, given it or a model of it; and whether that is its encoder."""
    if not (folder / MANIFEST).is_file():
        return folder, False
    artifact = Artifact.peek(folder)
    if artifact.kind == KIND:
        return folder.resolve().parent, True
    if artifact.kind != "retrieval":
        raise ArtifactError(
            f"{folder} is a {artifact.kind} artifact; give the run's folder, its adapt/retrieval, "
            "or its pretrain"
        )
    return folder.resolve().parent.parent, False


def _pretrained(folder: Path, cut: str) -> tuple[Recommender, dict[str, str]]:
    """A pretrained encoder, and what the recipe says of it."""
    return load_pretrained(folder, cut), {"model": Artifact.peek(folder, KIND).digest, "cut": cut}


def _check_towers(folder: Path, what: What) -> None:
    """Refuses vectors of towers that the objectives did not train."""
    weights = PretrainedEncoder.load(folder).weights
    tower = "candidate_tower." if what == "items" else "query_tower."
    if not any(name.startswith(tower) for name in weights):
        raise InputError(
            f"the objectives of the encoder {folder} trained no tower that makes vectors of "
            f"{what}; take --space text"
        )


def _loaded(folder: Path, cut: str) -> tuple[Recommender, dict[str, str]]:
    """The models of a run, and what the recipe says of them."""
    recommender = load_recommender(folder, cut)
    artifact = Artifact.peek(folder / "adapt" / "retrieval", "retrieval")
    cuts = RetrievalCard.parse(read_json(artifact.file("model.json"))).cuts
    return recommender, {"model": artifact.digest, "cut": cut if cut in cuts else "select"}


def _encoder(recommender: Recommender) -> TextEncoder:
    if not recommender.text.shape[1] and not recommender.profile.shape[1]:
        raise InputError("this run reads no texts (adapt.text), so that it has no vectors of texts")
    assert isinstance(recommender.engine, TensorFlowEngine)
    return recommender.engine.text_encoder


# --- items and users ---


def _of_run(
    recommender: Recommender, what: What, space: Space, cut: str, recipe: dict[str, str]
) -> _Rows:
    """The items or users of a run."""
    recipe |= {"what": what, "space": space}
    if what == "users" and space == "towers":
        recipe["cut"] = cut  # of the events, where one cut's weights serve all of them
    ids = recommender.catalog.ids[1:] if what == "items" else recommender.users.ids
    if space == "text":
        table = recommender.text[1:] if what == "items" else recommender.profile
        if not table.shape[1]:
            raise InputError(f"the {what} of this run have no vectors of texts (adapt.text)")
    else:
        table = recommender.vectors[1:]

    def vectors(start: int, stop: int) -> Floats:
        if what == "items" or space == "text":
            return table[start:stop]
        rows = np.arange(start, stop, dtype=np.int32)
        return recommender.queries(recommender.who(recommender.interactions, rows))

    def blocks(skip: int) -> Iterator[Block]:
        for start in range(skip, len(ids), BLOCK):
            stop = min(start + BLOCK, len(ids))
            yield list(ids[start:stop]), vectors(start, stop)

    column = "item_id" if what == "items" else "user_id"
    return _Rows(column, len(ids), table.shape[1], recipe, blocks)


# --- texts of a file ---


def _opened(texts: str | os.PathLike[str], column: str, id_column: str | None) -> Reader:
    reader = open_table(Path(texts), "--texts")
    for option, name in (("--column", column), ("--id", id_column)):
        if name is not None and name not in reader.columns:
            raise InputError(
                f"{reader.name} has no column '{name}'; it has {', '.join(reader.columns)}; name "
                f"yours with {option} NAME"
            )
    return reader


def _of_texts(
    reader: Reader,
    column: str,
    id_column: str,
    role: Role,
    encoder: TextEncoder,
) -> _Rows:
    """The texts of a file, after a look at all of it: what is wrong with it is said at once."""
    count = _checked(reader, column, encoder)
    recipe = {
        "what": "texts",
        "space": "text",
        "model": encoder.digest(),  # the same for every run that reads with this BERT
        "role": role,
        "texts": file_digest(reader.name),
        "column": column,
        "id": id_column,
    }
    columns = list(dict.fromkeys([column, *([id_column] if id_column else [])]))

    def blocks(skip: int) -> Iterator[Block]:
        for held in _text_blocks(reader, columns, skip):
            words = [cells[0] for cells in held]
            ids = [cells[-1] for cells in held] if id_column else None
            yield ids, _vectors(encoder, words, role)

    return _Rows(id_column, count, encoder.width, recipe, blocks)


def _checked(reader: Reader, column: str, encoder: TextEncoder) -> int:
    """The number of rows.

    Raises:
      InputError: there is no row, no row has a text, or the file is damaged.
    """
    count = empty = 0
    sample: list[str] = []
    for batch in reader.batches([column]):
        with located(reader, column, count):
            cells = pc.utf8_trim_whitespace(strings(batch.column(column)))
        count += len(cells)
        empty += pc.sum(pc.equal(cells, "")).as_py()
        if len(sample) < _SAMPLE:
            sample += filter(None, cells.slice(0, _SAMPLE - len(sample)).to_pylist())
    if empty == count:
        what = f"no text in column '{column}'" if count else "no rows"
        raise InputError(f"{reader.name} is empty: it has {what}")
    if empty:
        _say(f"{empty:,} of {count:,} rows have no text; their vectors are zeros")
    cover = encoder.tokenizer.coverage(sample)
    if cover.unknown > 0.5:
        _say(
            f"{cover.unknown:.0%} of the characters of {reader.name} are outside the vocabulary of "
            'this BERT; a run with adapt.text = "multilingual-e5-small" reads about 100 languages'
        )
    return count


def _text_blocks(reader: Reader, columns: Sequence[str], skip: int) -> Iterator[list[list[str]]]:
    """The cells of the rows after ``skip``, as many together as a block may hold."""
    held: list[list[str]] = []
    characters = rows = 0
    for batch in reader.batches(columns):
        before = max(skip - rows, 0)
        rows += batch.num_rows
        for start in range(before, batch.num_rows, 1024):
            piece = batch.slice(start, 1024)
            cells = [strings(piece.column(name)).to_pylist() for name in columns]
            for row in zip(*cells, strict=True):
                held.append(list(row))
                characters += len(row[0])
                if len(held) == BLOCK or characters > _CHARACTERS:
                    yield held
                    held, characters = [], 0
    if held:
        yield held


def _vectors(encoder: TextEncoder, texts: Sequence[str], role: Role) -> Floats:
    """float32 (n, width); zeros where there is no text."""
    out = np.zeros((len(texts), encoder.width), np.float32)
    rows = [row for row, text in enumerate(texts) if text.strip()]
    out[rows] = encoder.encode([texts[row] for row in rows], role=role)
    return out


# --- the file ---


def _write(rows: _Rows, target: Path, force: bool) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = _Draft(target, rows)
    if target.exists() and not force:
        if _metadata(target) == rows.recipe:
            draft.discard()
            _say(f"{target} holds these vectors already")
            return
        raise InputError(
            f"{target} exists and holds something else: {_difference(target, rows.recipe)}; take "
            "another --out, or replace it with --force"
        )
    with draft.alone():
        done = draft.open()
        if done:
            _say(f"going on after {done:,} of {rows.count:,} rows")
        with tqdm(total=rows.count, initial=done, desc="encoding", disable=None) as bar:
            for ids, vectors in rows.blocks(done):
                draft.add(ids, vectors)
                bar.update(len(vectors))
        draft.publish()


def _metadata(path: Path) -> dict[str, str]:
    """What a file's metadata says of its recipe; nothing if it is none of ours."""
    try:
        told = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return {}
    pairs = {key.decode(): value.decode("utf-8", "replace") for key, value in told.items()}
    ours = {key[len(_PREFIX) :]: value for key, value in pairs.items() if key.startswith(_PREFIX)}
    return {key: value for key, value in ours.items() if key not in ("normalized", "version")}


def _difference(path: Path, recipe: Mapping[str, str]) -> str:
    found = _metadata(path)
    if not found:
        return "it was not written by tfrec encode"
    other = [key for key in {**recipe, **found} if found.get(key) != recipe.get(key)]
    return f"its {' and '.join(other)} {'is' if len(other) == 1 else 'are'} not the same"


class _Draft:
    """The finished blocks of a file that is not whole yet, in a hidden folder beside it."""

    def __init__(self, target: Path, rows: _Rows) -> None:
        self._target, self._recipe = target, dict(rows.recipe)
        self._folder = target.with_name(f".{target.name}.partial")
        vector = pa.list_(pa.float32(), rows.width)
        names = [(rows.id_column, pa.string())] if rows.id_column else []
        self._schema = pa.schema([*names, ("vector", vector)])
        self._parts: list[Path] = []
        self._unit = True  # whether every vector so far has length 1, or is zero

    def alone(self) -> AbstractContextManager[None]:
        """Within it no other process makes the same file.

        Raises:
          SetupError: another one does.
        """
        self._folder.mkdir(exist_ok=True)
        return locked(self._folder, self._target)

    def open(self) -> int:
        """Takes up what an interrupted call of the same recipe left; returns its rows."""
        told = self._folder / "recipe.json"
        if not told.is_file() or json.loads(told.read_text("utf-8")) != self._recipe:
            for left in self._folder.iterdir():
                left.unlink()
            write_json(told, self._recipe)
        done = 0
        for part in sorted(self._folder.glob("*.part")):
            found = pq.ParquetFile(part)
            done += found.metadata.num_rows
            self._unit &= found.schema_arrow.metadata[b"unit"] == b"True"
            self._parts.append(part)
        return done

    def add(self, ids: Sequence[str] | None, vectors: Floats) -> None:
        """Keeps a block."""
        cells = pa.array(np.ascontiguousarray(vectors).reshape(-1), pa.float32())
        column = pa.FixedSizeListArray.from_arrays(cells, vectors.shape[1])
        arrays = [*([pa.array(ids, pa.string())] if ids is not None else []), column]
        length = np.linalg.norm(vectors, axis=1)
        unit = bool(((np.abs(length - 1) < _UNIT) | (length == 0)).all())
        self._unit &= unit
        schema = self._schema.with_metadata({"unit": str(unit)})
        part = self._folder / f"{len(self._parts):06d}.part"
        self._file(part, schema, [pa.Table.from_arrays(arrays, schema=schema)])
        self._parts.append(part)

    def publish(self) -> None:
        """Puts the blocks together, each as a row group, under the file's name."""
        told = {f"{_PREFIX}{key}": value for key, value in self._recipe.items()}
        told[f"{_PREFIX}normalized"] = json.dumps(self._unit)
        told[f"{_PREFIX}version"] = tfrec.__version__
        tables = (pq.read_table(part) for part in self._parts)
        self._file(self._target, self._schema.with_metadata(told), tables)
        self.discard()

    def discard(self) -> None:
        """Removes the blocks."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._parts = []

    def _file(self, path: Path, schema: pa.Schema, tables: Iterable[pa.Table]) -> None:
        """Writes a file that appears under its name when it is whole."""
        unfinished = self._folder / "unfinished"
        with open(unfinished, "wb") as stream:
            with pq.ParquetWriter(stream, schema, use_dictionary=False) as writer:
                for table in tables:
                    writer.write_table(table.replace_schema_metadata(schema.metadata))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(unfinished, path)


def _say(line: str) -> None:
    print(f"tfrec: {line}", file=sys.stderr)
