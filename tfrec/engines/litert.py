"""LiteRT: an engine without TensorFlow in the process, the models of a bundle run by LiteRT."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tfrec.bundle import Bundle, holds_codes, load_codes, load_rows, load_vectors
from tfrec.data.dataset import Dataset
from tfrec.data.sequences import EventCoding, Histories, query_inputs
from tfrec.data.tokens import Coverage, Role, TextSettings, TextTokenizer, packed, read_json
from tfrec.engines.breaker import Status
from tfrec.errors import ArtifactError, InputError, SetupError
from tfrec.index import Index, load_index, make_index
from tfrec.index.exact import cores
from tfrec.recommender import Floats, LinearItems, Policy, Recommender, Rows, TextDirections
from tfrec.rows import Vectors
from tfrec.terminal import quiet

Model = Callable[[Mapping[str, NDArray[Any]]], Floats]
"""Arrays by name -> one array; arrays that it has no input for are left."""

_TOKENS = 128
"""Tokens of a batch of texts. More make the products hardly faster, and attention dearer."""
_QUERIES = 4
_AT_ONCE = 64  # of them, whose inputs are made together
_PLACES = 16  # of a row of the query tower, of which it reads a multiple
_CELLS = 1 << 14  # numbers of candidates' vectors that the ranker is given at a time
"""A batch is cut so small that what its layers give each other stays in the processor's cache."""
_HALVED = 128  # candidates of one user from which on two copies of the ranker share them
_OF_USERS = frozenset({"last", "profile", "attributes"})
_OF_CANDIDATES = frozenset({"candidates", "attributes", "text", "scalars"})


class LiteRTModel:
    """A LiteRT model with arrays by name in and one array out; threads take turns.

    Args:
      path: The flatbuffer.
      threads: How many threads compute; 0: one for each core that this process may use.

    Raises:
      ArtifactError: the file is damaged.
      SetupError: LiteRT is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], threads: int = 0) -> None:
        try:
            from ai_edge_litert.interpreter import Interpreter
        except ImportError:
            raise SetupError(
                "ai-edge-litert is not installed; install it with: pip install ai-edge-litert"
            ) from None
        try:
            # Mapped, so that processes share the weights.
            with quiet():
                self._interpreter = Interpreter(
                    model_path=os.fspath(path), num_threads=threads or cores()
                )
                self._interpreter.allocate_tensors()
            inputs = self._interpreter.get_input_details()
        except (ValueError, RuntimeError) as error:
            raise ArtifactError(f"{path} is not a LiteRT model: {error}") from None
        self._place = {detail["name"]: detail["index"] for detail in inputs}
        self.shapes = {d["name"]: tuple(d["shape_signature"].tolist()) for d in inputs}
        self._out = self._interpreter.get_output_details()[0]["index"]
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._lock = threading.Lock()

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Floats:
        """float32, what the model makes of the arrays; those that it has no input for are left."""
        arrays = {name: np.ascontiguousarray(inputs[name]) for name in self._place}
        shapes = {name: array.shape for name, array in arrays.items()}
        with self._lock:
            if shapes != self._shapes:
                self._shapes = {}
                for name, shape in shapes.items():
                    self._interpreter.resize_tensor_input(self._place[name], shape)
                self._interpreter.allocate_tensors()
                self._shapes = shapes
            for name, array in arrays.items():
                self._interpreter.set_tensor(self._place[name], array)
            self._interpreter.invoke()
            out: Floats = self._interpreter.get_tensor(self._out)
        return out


class Copies:
    """A small model several times, so that parts of a batch are computed side by side.

    Splitting what one model computes among threads costs more than it saves where that is little.

    Args:
      path: The flatbuffer; its weights are in memory once.
      copies: How many, each with a thread of its own.

    Raises:
      ArtifactError: the file is damaged.
      SetupError: LiteRT is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], copies: int) -> None:
        self.models = [LiteRTModel(path, 1) for _ in range(copies)]
        self.shapes = self.models[0].shapes
        self._pool = ThreadPoolExecutor(copies - 1, "model") if copies > 1 else None

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Floats:
        """See :class:`LiteRTModel`."""
        return self.models[0](inputs)

    def each(self, parts: Sequence[Mapping[str, NDArray[Any]]]) -> list[Floats]:
        """The model of each part, in their order."""
        n = len(self.models)
        if self._pool is None or len(parts) == 1:
            return [self(part) for part in parts]

        def share(number: int) -> list[Floats]:
            return [self.models[number](part) for part in parts[number::n]]

        others = [self._pool.submit(share, number) for number in range(1, min(n, len(parts)))]
        found = [share(0), *(other.result() for other in others)]
        return [found[place % n][place // n] for place in range(len(parts))]


def _each(model: Model, parts: Sequence[Mapping[str, NDArray[Any]]]) -> list[Floats]:
    return model.each(parts) if isinstance(model, Copies) else [model(part) for part in parts]


class TextModel:
    """Strings -> vectors: a folder's ``model.tflite`` and tokenizer.

    Texts lie one behind another in one row of tokens, which no padding stretches; a mask keeps
    them apart.

    Args:
      folder: Also holds the settings in the files of sentence-transformers.
      threads: See :class:`LiteRTModel`.

    Raises:
      ArtifactError: the model is damaged.
      InputError: the tokenizer or the settings cannot be read.
    """

    def __init__(self, folder: str | os.PathLike[str], threads: int = 0) -> None:
        source = Path(folder)
        self.settings = TextSettings.read(source)
        length = read_json(source / "sentence_bert_config.json").get("max_seq_length", 256)
        self.tokenizer = TextTokenizer.load(source, length)
        pooling = read_json(source / "1_Pooling" / "config.json")
        self.width = int(pooling.get("word_embedding_dimension", 0))
        self._model = LiteRTModel(source / "model.tflite", threads)

    def encode(self, texts: Sequence[str], role: Role = "") -> Floats:
        """float32 (n, width), in the order of ``texts``; equal texts are read once."""
        place: dict[str, int] = {}
        index = [place.setdefault(text, len(place)) for text in texts]
        rows = list(self.tokenizer.ids(self.settings.prepared(place, role)))
        found: list[Floats] = [np.zeros(0, np.float32)] * len(rows)
        for batch, arrays in packed(rows, _TOKENS):
            ends = np.cumsum([len(rows[row]) for row in batch])
            parts = np.split(self._model(arrays), ends[:-1])
            for row, part in zip(batch, parts, strict=True):
                found[row] = self._pooled(part)
        return (
            np.stack([found[i] for i in index]) if index else np.zeros((0, self.width), np.float32)
        )

    def _pooled(self, hidden: Floats) -> Floats:
        pooling = self.settings.pooling
        if pooling == "cls":
            vector = hidden[0]
        else:
            vector = hidden.max(axis=0) if pooling == "max" else hidden.mean(axis=0)
        if self.settings.normalize:
            vector = vector / max(float(np.linalg.norm(vector)), 1e-12)
        return np.asarray(vector, np.float32)


class Models(NamedTuple):
    """What an engine runs.

    Attributes:
      query: The inputs of :func:`~tfrec.data.sequences.query_inputs` -> float32 (b, d).
      candidate: ``text`` and ``attributes`` of new items -> float32 (n, d); None: it knows none.
      rank: The inputs of :meth:`tfrec.recommender.Engine.rank` -> float32 (b, c, tasks); None:
        there is no ranker.
      text: Reads texts; None: the model reads none.
    """

    query: Model
    candidate: Model | None
    rank: Model | None
    text: TextModel | None


class ModelsEngine:
    """Models of arrays, as :class:`tfrec.recommender.Engine` wants them, whatever runs them.

    Args:
      models: The models.
      history: Places of a row that the query tower reads.
      tasks: What the ranker predicts, in its order; empty: there is none.
      step: The query tower reads a multiple of so many places, or ``history``.
    """

    def __init__(
        self, models: Models, history: int, tasks: Sequence[str] = (), step: int = _PLACES
    ) -> None:
        self.models, self.history, self.tasks = models, history, tuple(tasks)
        self.step = step

    def check(self) -> str:
        """One line on whether the server is there that runs them; empty: they need none."""
        return ""

    def status(self) -> Status:
        """How that server does; ``ok`` without a call where they need none."""
        return Status()

    def encode_text(self, texts: Sequence[str], query: bool = False) -> Floats:
        """See :class:`tfrec.recommender.Engine`.

        Raises:
          InputError: the model reads no texts.
        """
        return self._text_model().encode(texts, "query" if query else "passage")

    def coverage(self, texts: Sequence[str]) -> Coverage:
        """See :class:`tfrec.recommender.Engine`.

        Raises:
          InputError: the model reads no texts.
        """
        return self._text_model().tokenizer.coverage(texts)

    def tokenize(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Token ids and padding mask of texts of items, each int32 (n, t).

        Raises:
          InputError: the model reads no texts.
        """
        reader = self._text_model()
        return reader.tokenizer.tokenize(reader.settings.prepared(texts, "passage"))

    def encode_candidate(self, text: Floats, attributes: Floats, rows: Rows) -> Floats:
        """See :class:`tfrec.recommender.Engine`; every item is taken for new.

        Raises:
          InputError: an item of the catalog is asked for, whose vector is part of the bundle.
        """
        if rows.any():
            raise InputError("a bundle encodes new items alone: those it knows have their vectors")
        if self.models.candidate is None:
            raise InputError("this model reads neither texts nor attributes: it knows no new items")
        return self.models.candidate({"text": text, "attributes": attributes})

    def encode_query(
        self,
        histories: Histories,
        vectors: Vectors,
        profile: Floats,
        attributes: Floats,
        request_time: NDArray[np.int64] | None = None,
    ) -> Floats:
        """See :class:`tfrec.recommender.Engine`."""
        if len(histories) == 0:
            return np.zeros((0, vectors.shape[1]), np.float32)
        found: list[Floats] = []
        for start in range(0, len(histories), _QUERIES * _AT_ONCE):
            rows = np.arange(start, min(start + _QUERIES * _AT_ONCE, len(histories)))
            times = None if request_time is None else request_time[rows]
            read = histories.take(rows)
            # A place more than there are events: the start of a history.
            places = read.lengths + 1
            arrays = query_inputs(
                read, self._length(places), vectors, profile[rows], attributes[rows], times
            )
            parts = []
            for i in range(0, len(rows), _QUERIES):
                part = slice(i, i + _QUERIES)
                length = self._length(places[part])
                parts.append(
                    {
                        name: values[part] if name in _OF_USERS else values[part, :length]
                        for name, values in arrays.items()
                    }
                )
            found += _each(self.models.query, parts)
        return np.concatenate(found)

    def rank(self, inputs: Mapping[str, Floats]) -> dict[str, Floats]:
        """See :class:`tfrec.recommender.Engine`."""
        rank = self.models.rank
        if rank is None:
            return {}
        users, candidates, width = inputs["candidates"].shape
        if users == 1 and candidates >= _HALVED and isinstance(rank, Copies):
            told = np.concatenate(rank.each(_halves(inputs, candidates)), axis=1)
            return {task: told[:, :, place] for place, task in enumerate(self.tasks)}
        size = max(1, _CELLS // max(candidates * width, 1))
        parts = [
            {name: values[i : i + size] for name, values in inputs.items()}
            for i in range(0, users, size)
        ]
        none = np.zeros((0, candidates, len(self.tasks)), np.float32)
        told = np.concatenate([*_each(rank, parts), none])
        return {task: told[:, :, place] for place, task in enumerate(self.tasks)}

    def _length(self, places: NDArray[np.int64]) -> int:
        """Places of the shortest row that has room for all of these, or of the longest."""
        return min(self.history, -(-int(places.max()) // self.step) * self.step)

    def _text_model(self) -> TextModel:
        if self.models.text is None:
            raise InputError("this model reads no texts, so words cannot be looked for")
        return self.models.text


def _halves(inputs: Mapping[str, Floats], candidates: int) -> list[dict[str, Floats]]:
    """What the ranker reads of one user, for the first half of the candidates and the second."""
    middle = candidates // 2
    return [
        {
            name: values[:, part] if name in _OF_CANDIDATES else values
            for name, values in inputs.items()
        }
        for part in (slice(0, middle), slice(middle, None))
    ]


class LiteRTEngine(ModelsEngine):
    """The models of a bundle, run by LiteRT.

    Args:
      folder: Holds ``query.tflite``, and ``text/``, ``candidate.tflite`` and ``rank.tflite`` where
        there are such models.
      history: Places of a row that the query tower reads.
      tasks: What the ranker predicts, in its order; empty: there is none.
      threads: See :class:`LiteRTModel`.
      copies: Of the towers and the ranker, with a thread each (:class:`Copies`); 0: one of each,
        with as many threads as the others.

    Raises:
      ArtifactError: a model is missing or damaged.
      SetupError: LiteRT is not installed.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        history: int,
        tasks: Sequence[str] = (),
        threads: int = 0,
        copies: int = 0,
    ) -> None:
        source = Path(folder)

        def model(name: str) -> Copies | LiteRTModel | None:
            path = source / f"{name}.tflite"
            if not path.is_file():
                return None
            return Copies(path, copies) if copies else LiteRTModel(path, threads)

        query, candidate, rank = model("query"), model("candidate"), model("rank")
        if query is None:
            raise ArtifactError(f"{source} has no query.tflite; export the model again")
        if tasks and rank is None:
            raise ArtifactError(f"{source} has no rank.tflite; export the model again")
        text = TextModel(source / "text", threads) if (source / "text").is_dir() else None
        free = query.shapes["segment"][1] < 0  # that of an older bundle reads whole rows only
        models = Models(query, candidate, rank, text)
        super().__init__(models, history, tasks, _PLACES if free else history)


def recommender_of(bundle: Bundle, threads: int = 0, copies: int = 0) -> Recommender:
    """The recommender of a bundle, by LiteRT.

    Args:
      bundle: As :meth:`tfrec.bundle.Bundle.load` gives it.
      threads: See :class:`LiteRTModel`.
      copies: See :class:`LiteRTEngine`.

    Raises:
      ArtifactError: a file is missing or is not what it should be.
      SetupError: LiteRT is not installed.
    """
    folder, told = bundle.folder, bundle.content
    dataset = Dataset.read(folder / "catalog")
    policy = Policy.parse(told["policy"])
    engine = LiteRTEngine(folder / "litert", told["history"], policy.tasks, threads, copies)
    arrays = folder / "arrays"
    vectors = load_vectors(arrays / "vectors.npy")
    text, profile, popularity = (
        load_rows(arrays / f"{name}.npy") for name in ("text", "profile", "popularity")
    )
    directions = None
    if "arrays/directions.npy" in bundle.artifact.files:
        mean, *matrix = load_rows(arrays / "directions.npy")
        directions = TextDirections(mean, np.stack(matrix, axis=1))
    index = _index(folder / "index", vectors)
    if any(not (folder / name).is_file() for name in bundle.artifact.files):
        raise ArtifactError(f"{folder} was removed while it was read; read the newest version")
    return Recommender(
        engine,
        dataset.catalog,
        dataset.users,
        dataset.interactions,
        EventCoding.parse(told["coding"]),
        vectors,
        text,
        profile,
        policy,
        _linear(bundle),
        index,
        directions,
        popularity,
    )


def _linear(bundle: Bundle) -> LinearItems | None:
    """The linear model, in whichever form it is there; None: there is none."""
    path = bundle.folder / "arrays" / "linear.npy"
    if not any(name.startswith("arrays/linear.") for name in bundle.artifact.files):
        return None
    codes, scales = load_codes(path) if holds_codes(path) else (load_rows(path), None)
    if codes.shape != 2 * codes.shape[:1] or (scales is not None and len(scales) != len(codes)):
        raise ArtifactError(f"{path} cannot be read: its weights are of shape {codes.shape}")
    return LinearItems(codes, scales)


def _index(folder: Path, vectors: Vectors) -> Index:
    """The index that was tuned for the vectors, or an exact one."""
    with contextlib.suppress(SetupError):  # there is no ScaNN for this machine
        if folder.is_dir():
            return load_index(folder, mapped=True)
    return make_index(vectors[1:], np.arange(1, len(vectors), dtype=np.int32), "exact")
