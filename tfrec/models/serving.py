"""SavedModels for TensorFlow Serving: ids and words in, recommendations out.

What happens on the host before a model in Python — looking ids up, cutting histories, encoding
attributes, leaving out what was seen — is part of the graph here, so that a server needs nothing of
tfrec, and sees what training saw. The operations are stock, but for the models in :data:`NEEDS`.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tfrec.bundle import ARRAYS, DEFAULT
from tfrec.data.catalog import FeatureSchema, Table
from tfrec.data.sequences import GAP_BUCKETS, RATING_BUCKETS
from tfrec.data.tokens import Role
from tfrec.errors import ArtifactError, InputError, SetupError
from tfrec.golden import Golden, cosines, difference, overlap
from tfrec.models import keras_bridge, litert, scann_graph
from tfrec.models.engine import TensorFlowEngine
from tfrec.models.keras_bridge import tf
from tfrec.models.scann_graph import ScannGraph
from tfrec.models.stored_int8 import StoredInt8
from tfrec.models.wordpiece import WordPieces
from tfrec.recommender import SCALARS, Recommender, Request
from tfrec.terminal import quiet

Specs = Mapping[str, Any]
Call = Callable[..., Mapping[str, Any]]
Ask = Callable[[str, str, Mapping[str, Any]], Mapping[str, Any]]
"""Model, signature and inputs -> outputs, all NumPy arrays."""

NEEDS = {"retrieve_scann": ("scann",), "encode_text_strings": ("tensorflow-text",)}
"""Model -> packages whose operations it needs beside TensorFlow's."""

_READ = 2000  # texts whose tokens are compared
_AT_ONCE = 8  # requests; comparing the events of each with one another takes memory
_K = 10
_DOUBLINGS = tuple(1 << power for power in range(1, GAP_BUCKETS - 2))


class Saved(NamedTuple):
    """What was written.

    Attributes:
      models: Model -> ``inputs`` and ``outputs`` of each signature, and ``needs``: the packages
        whose operations it needs beside TensorFlow's.
      left_out: Model -> why it was not written.
    """

    models: dict[str, dict[str, Any]]
    left_out: dict[str, str]


def save(recommender: Recommender, folder: Path, int8: bool = True) -> Saved:
    """Writes ``folder/<model>`` for every model that the recommender has.

    Args:
      recommender: One whose engine is a :class:`TensorFlowEngine`.
      folder: Made if it is not there.
      int8: Whether there are text encoders whose weights are stored in int8.
    """
    graph = Graph(recommender, int8)
    out: dict[str, dict[str, Any]] = {}
    for name, signatures in graph.models().items():
        functions = {key: _function(call, specs) for key, (call, specs) in signatures.items()}
        traced = {key: function.get_concrete_function() for key, function in functions.items()}
        module = tf.Module()
        # What the functions use, and no more: a model without the BERT shall not hold it.
        captured = {id(outer) for f in traced.values() for outer, _ in f.graph.captures}
        module.used = [v for v in graph.variables if id(v.handle) in captured]
        module.tables = graph.tables
        with quiet():
            tf.saved_model.save(module, str(folder / name), signatures=traced)
        out[name] = {
            "signatures": {key: _told(functions[key], traced[key]) for key in traced},
            "needs": list(NEEDS.get(name, ())),
        }
    return Saved(out, graph.left_out)


class Graph:
    """The recommendation chain of a recommender as functions of tensors.

    Args:
      recommender: One whose engine is a :class:`TensorFlowEngine`.
      int8: Whether there are text encoders whose weights are stored in int8.

    Attributes:
      left_out: Model -> why there is none.
    """

    def __init__(self, recommender: Recommender, int8: bool = True) -> None:
        engine = recommender.engine
        assert isinstance(engine, TensorFlowEngine)
        self._two_tower, self._ranker = engine.two_tower, engine.ranker
        self._encoder = engine.text_encoder if recommender.text.shape[1] else None
        catalog = recommender.catalog
        self._policy, self._coding = recommender.policy, recommender.coding
        self._items, self._users = Columns("item", catalog), Columns("user", recommender.users)
        self._rows = _table(catalog.ids[1:], np.arange(1, len(catalog)), 0)
        names = self._coding.event_names
        self._events = _table(names, np.arange(2, 2 + len(names)), 1)
        self._ids = tf.Variable(list(catalog.ids), trainable=False, name="ids")
        self._vectors = _kept(recommender.vectors, "vectors")
        self._text = _kept(recommender.text, "text")
        self._features = _kept(catalog.features, "features")
        self._described = _kept(recommender.described, "described")
        # Items that no event taught anything stand in the catalog without their id.
        rows = np.arange(len(catalog), dtype=np.int32)
        plain = engine.encode_candidate(recommender.text, catalog.features, rows * 0)
        taught = (np.abs(plain - recommender.vectors[:]) > 1e-5).any(axis=1) & (rows > 0)
        self._id_rows = tf.Variable(np.where(taught, rows, 0), trainable=False, name="id_rows")
        self._log_popularity = _kept(np.log1p(recommender.popularity), "log_popularity")
        linear = recommender.linear
        self._linear = None if linear is None else _kept(linear.weights, "linear")
        found = recommender.directions
        self._directions = (
            None if found is None else (_kept(found.mean, "mean"), _kept(found.matrix, "matrix"))
        )
        self.left_out: dict[str, str] = {}
        self._stored, self._pieces = None, None
        if self._encoder is not None:
            if int8:
                self._stored = StoredInt8(self._encoder)
            else:
                self.left_out["encode_text_int8"] = "the text encoder was to stay float32"
            try:
                self._pieces = self._word_pieces(catalog.texts)
            except (InputError, SetupError) as error:
                self.left_out["encode_text_strings"] = str(error)
        self._scann = None
        try:
            scann_graph.operations()
            with quiet():
                self._scann = ScannGraph(self._vectors, recommender.queries(recommender.typical()))
        except SetupError as error:
            self.left_out["retrieve_scann"] = str(error)

    @property
    def variables(self) -> list[Any]:
        """The variables that the functions use."""
        models = (self._two_tower, self._ranker, self._encoder, self._stored, self._scann)
        own = [value for value in vars(self).values() if isinstance(value, tf.Variable)]
        found = [*own, *(self._directions or ()), *(v for m in models if m for v in m.variables)]
        return list({id(variable): variable for variable in found}.values())

    @property
    def tables(self) -> list[Any]:
        """The look-up tables that the functions use."""
        columns = (*self._items.words.values(), *self._users.words.values())
        return [self._rows, self._events, *columns]

    def models(self) -> dict[str, dict[str, tuple[Call, Specs]]]:
        """Model -> signature -> what it computes, and of what."""
        history = {"history": _strings(2)}
        full = {**history, **self._event_specs(), **self._profile_specs()}
        rows = {"history_rows": _whole_numbers(2)}
        limits = {"exclude": _strings(2), "k": _whole_numbers(1)}
        candidates = {"candidates": _strings(2)}
        out: dict[str, dict[str, tuple[Call, Specs]]] = {
            "encode_query": {
                DEFAULT: (self.encode_query, history),
                "full": (self.encode_query, full),
                "rows": (self.encode_query, rows),
                ARRAYS: litert.query_function(self._two_tower),
            },
            "retrieve": {
                DEFAULT: (self.retrieve, {**history, **limits}),
                "full": (self.retrieve, {**full, **limits}),
            },
        }
        if self._scann is not None:
            found = ((key, specs) for key, (_, specs) in out["retrieve"].items())
            out["retrieve_scann"] = {key: (self.retrieve_scann, specs) for key, specs in found}
        if self._encoder is not None:
            tokens = dict.fromkeys(("token_ids", "padding_mask"), _whole_numbers(2))
            out["encode_text"] = {DEFAULT: (self.encode_text, tokens)}
        if self._stored is not None:
            out["encode_text_int8"] = {DEFAULT: (self.encode_text_int8, tokens)}
        if self._pieces is not None:
            text = {"text": _strings(1)}
            out["encode_text_strings"] = {
                DEFAULT: (self.encode_passages, text),
                "query": (self.encode_words, text),
            }
        given: dict[str, Any] = {"item_id": _strings(1)}
        if self._text.shape[1]:
            given["text"] = tf.TensorSpec([None, self._text.shape[1]])
        out["encode_candidate"] = {
            DEFAULT: (self.encode_candidate, {**given, **self._items.specs()})
        }
        new = litert.candidate_function(
            self._two_tower, self._text.shape[1], self._features.shape[1]
        )
        if new is not None:
            out["encode_candidate"][ARRAYS] = new
        if self._ranker is not None:
            out["rank"] = {
                DEFAULT: (self.rank, {**history, **candidates}),
                "full": (self.rank, {**full, **candidates}),
                ARRAYS: litert.rank_function(self._ranker),
            }
        return out

    # --- what the signatures compute ---

    def encode_text(self, token_ids: Any, padding_mask: Any) -> dict[str, Any]:
        """``vector`` float32 (b, text width) of tokens int32 (b, t)."""
        assert self._encoder is not None
        return {"vector": self._encoder._vectors(token_ids, padding_mask)}

    def encode_text_int8(self, token_ids: Any, padding_mask: Any) -> dict[str, Any]:
        """The same by weights that are stored in int8."""
        assert self._stored is not None
        return {"vector": self._stored(token_ids, padding_mask)}

    def encode_passages(self, text: Any) -> dict[str, Any]:
        """``vector`` float32 (n, text width) of what is looked for, string (n,)."""
        return self._encoded(text, "passage")

    def encode_words(self, text: Any) -> dict[str, Any]:
        """The same of what somebody looks for, which matters to a BERT with prompts."""
        return self._encoded(text, "query")

    def encode_candidate(self, item_id: Any, text: Any = None, **attributes: Any) -> dict[str, Any]:
        """``vector`` float32 (n, d) of items; an ``item_id`` (n,) that is not known has none."""
        count = tf.shape(item_id)[0]
        text = tf.zeros([count, 0]) if text is None else text
        features = self._items.encode(attributes, count)
        rows = tf.gather(self._id_rows, self._rows.lookup(item_id))
        return {"vector": self._two_tower.candidate_tower(text, features, rows)}

    def encode_query(self, **asked: Any) -> dict[str, Any]:
        """``query`` float32 (b, d)."""
        _, arrays, _ = self._asked(asked)
        return {"query": self._two_tower(arrays, training=False)}

    def retrieve(self, exclude: Any, k: Any, **asked: Any) -> dict[str, Any]:
        """The ``k`` (b,) best items: ``item_id`` string and ``score`` float32 (b, largest k).

        What is in the history or in ``exclude`` string (b, e) does not come. Where there are fewer
        than k items, the id is empty and the score the lowest that there is.
        """
        query, left_out = self._wanted(exclude, asked)
        return self._named(*self._best(query, left_out, _most(k)), k)

    def retrieve_scann(self, exclude: Any, k: Any, **asked: Any) -> dict[str, Any]:
        """As :meth:`retrieve`, by ScaNN; where somebody would get fewer than k, all exactly."""
        assert self._scann is not None
        query, left_out = self._wanted(exclude, asked)
        wanted = _most(k)
        listed = tf.reduce_max(tf.concat([tf.math.count_nonzero(left_out, 1), [0]], axis=0))
        # One more for row 0, which is among the vectors and may be found.
        found, scores = self._scann.search(query, wanted + tf.cast(listed, tf.int32) + 1)
        scores = tf.where(_is_listed(found, left_out), scores.dtype.min, scores)
        best, place = tf.math.top_k(scores, tf.minimum(wanted, tf.shape(scores)[1]))
        counts = tf.reduce_sum(tf.cast(best > scores.dtype.min, tf.int32), axis=1)
        best, found = tf.cond(
            tf.reduce_all(counts >= k),
            lambda: (best, tf.gather(found, place, batch_dims=1)),
            lambda: self._best(query, left_out, wanted),
        )
        return self._named(best, found, k)

    def rank(self, candidates: Any, **asked: Any) -> dict[str, Any]:
        """What the ranker's tasks say of ``candidates`` string (b, c): float32 (b, c) each.

        ``score`` is the weighted sum by which the recommender orders candidates: -inf, that is the
        lowest number, for those that are not known.
        """
        history, arrays, people = self._asked(asked)
        policy, ranker = self._policy, self._ranker
        rows = self._rows.lookup(candidates)
        query = self._two_tower(arrays, training=False)
        vectors = tf.gather(self._vectors, rows)
        retrieval = tf.einsum("bd,bcd->bc", query, vectors)
        popularity = tf.gather(self._log_popularity, rows)
        parts = {"retrieval": retrieval, "popularity": popularity}
        parts["linear"] = self._linear_scores(history, rows)
        if policy.uses("text") and self._text.shape[1]:
            parts["text"] = self._text_scores(history, rows)
        last, mask = _newest(history, policy.history)
        scalars = {
            "retrieval": retrieval,
            "linear": parts["linear"],
            "log_popularity": popularity,
        }
        assert ranker is not None
        inputs = {
            "query": query,
            "history": tf.gather(self._vectors, last) * mask[:, :, None],
            "history_mask": mask,
            "candidates": vectors,
            "attributes": tf.gather(self._features, rows),
            "user_attributes": people["attributes"],
            "text": tf.gather(self._described, rows),
            "profile": self._read(people["profile"]),
            "scalars": tf.stack([scalars[name] for name in SCALARS], axis=-1),
        }
        tasks = ranker(inputs, training=False)
        parts |= tasks
        score = tf.zeros_like(retrieval)
        for name, weight in policy.score.items():
            if weight and name in parts:
                score += weight * parts[name]
        events = tf.reduce_sum(tf.cast(history > 0, tf.float32), axis=1)
        share = tf.exp(-events / policy.fade)
        prior = tf.where(share > 0.01, policy.newcomer * share, 0.0)
        score += prior[:, None] * popularity
        return {**tasks, "score": tf.where(rows > 0, score, score.dtype.min)}

    # --- texts and items ---

    def _word_pieces(self, texts: Sequence[str]) -> WordPieces:
        """Raises InputError where the graph's tokens would not be those of the tokenizer."""
        assert self._encoder is not None
        pieces = WordPieces(self._encoder.tokenizer, self._encoder.settings)
        read = texts[:: max(len(texts) // _READ, 1)]
        differing = pieces.differing(read, "passage")
        if differing:
            raise InputError(f"{len(differing)} of {len(read)} texts get other tokens in a graph")
        return pieces

    def _encoded(self, text: Any, role: Role) -> dict[str, Any]:
        assert self._encoder is not None
        assert self._pieces is not None
        encode = self._stored or self._encoder._vectors
        return {"vector": encode(*self._pieces(text, role))}

    def _wanted(self, exclude: Any, asked: Mapping[str, Any]) -> tuple[Any, Any]:
        """Queries float32 (b, d), and the rows int32 (b, e) that must not come."""
        rows, arrays, _ = self._asked(asked)
        # Row 0 stands for what is not known, and is no item.
        nothing = tf.zeros([tf.shape(rows)[0], 1], tf.int32)
        left_out = tf.concat([rows, self._rows.lookup(exclude), nothing], axis=1)
        return self._two_tower(arrays, training=False), left_out

    def _best(self, query: Any, left_out: Any, wanted: Any) -> tuple[Any, Any]:
        """Scores and rows (b, wanted at most), compared with every item."""
        scores = _without(tf.matmul(query, self._vectors, transpose_b=True), left_out)
        best, rows = tf.math.top_k(scores, tf.minimum(wanted, tf.shape(scores)[1]))
        return best, rows

    def _named(self, best: Any, rows: Any, k: Any) -> dict[str, Any]:
        """The ids and scores (b, largest k) of rows, of each user as many as he wants."""
        most = tf.shape(best)[1]
        there = (best > best.dtype.min) & (tf.range(most)[None] < k[:, None])
        ids = tf.gather(self._ids, rows)
        missing = [[0, 0], [0, _most(k) - most]]
        return {
            "item_id": tf.pad(tf.where(there, ids, tf.fill(tf.shape(ids), "")), missing),
            "score": tf.pad(
                tf.where(there, best, best.dtype.min), missing, constant_values=best.dtype.min
            ),
        }

    # --- histories and people ---

    def _event_specs(self) -> dict[str, Any]:
        tables = self._two_tower.query_tower.tables
        out: dict[str, Any] = {}
        if "rating" in tables:
            out |= {"event": _strings(2), "rating": tf.TensorSpec([None, None])}
        if {"gap", "next_gap"} & set(tables):
            out["timestamp"] = tf.TensorSpec([None, None], tf.int64)
        if "next_gap" in tables:
            out["request_time"] = tf.TensorSpec([None], tf.int64)
        return out

    def _profile_specs(self) -> dict[str, Any]:
        width = self._two_tower.widths[0]
        profile = {"profile": tf.TensorSpec([None, width])} if width else {}
        return {**profile, **self._users.specs()}

    def _asked(self, asked: Mapping[str, Any]) -> tuple[Any, dict[str, Any], dict[str, Any]]:
        """Rows of the history int32 (b, h), the query tower's inputs, and who asks."""
        rows = asked.get("history_rows")
        rows = self._rows.lookup(asked["history"]) if rows is None else rows
        count = tf.shape(rows)[0]
        width, attributes_width = self._two_tower.widths
        profile = asked.get("profile")
        profile = tf.zeros([count, width]) if profile is None else profile
        given = {n: v for n, v in asked.items() if n in self._users.specs()}
        attributes = self._users.encode(given, count)[:, :attributes_width]
        arrays = self._arrays(rows, asked)
        arrays |= {"profile": profile[:, None], "attributes": attributes[:, None]}
        return rows, arrays, {"profile": profile, "attributes": attributes}

    def _arrays(self, rows: Any, asked: Mapping[str, Any]) -> dict[str, Any]:
        """As :func:`tfrec.data.sequences.query_inputs`, from rows int32 (b, h); 0 is nothing."""
        length, kept = self._two_tower.config.history, rows > 0
        event = asked.get("event")
        if event is None:
            codes = tf.fill(tf.shape(rows), self._coding.events(self._coding.event_names[:1])[0])
        else:
            codes = self._events.lookup(event)
        ratings = asked.get("rating")
        buckets = tf.zeros_like(rows) if ratings is None else self._rating_buckets(ratings)
        times = asked.get("timestamp")
        times = tf.zeros(tf.shape(rows), tf.int64) if times is None else times
        ragged = {
            name: tf.ragged.boolean_mask(values, kept)
            for name, values in {"item": rows, "event": codes, "rating": buckets}.items()
        }
        when = tf.ragged.boolean_mask(times, kept)
        ragged["gap"] = when.with_flat_values(_gaps(when))
        counts = ragged["item"].row_lengths()
        start = tf.cast(counts < length, tf.int64)
        first = tf.RaggedTensor.from_row_lengths(
            tf.zeros([tf.reduce_sum(start)], tf.int32), start, validate=False
        )
        out = {
            name: tf.concat([first, values[:, -length:]], axis=1).to_tensor(shape=[None, length])
            for name, values in ragged.items()
        }
        tokens = tf.cast(tf.minimum(counts, length) + start, tf.int32)
        grid = tf.range(length)[None]
        inside = grid < tokens[:, None]
        out["position"] = tf.where(inside, grid, 0)
        out["segment"] = tf.cast(inside, tf.int32)
        out["last"] = tokens - 1
        out["next_gap"] = self._next_gaps(out, when, counts, asked.get("request_time"))
        out["vectors"] = tf.gather(self._vectors, out["item"])
        return out

    def _next_gaps(self, arrays: Mapping[str, Any], when: Any, counts: Any, now: Any) -> Any:
        segment, gap = arrays["segment"], arrays["gap"]
        later = tf.where(segment[:, 1:] > 0, gap[:, 1:], 0)
        out = tf.pad(later, [[0, 0], [0, 1]])
        newest = tf.squeeze(when[:, -1:].to_tensor(shape=[None, 1]), axis=1)
        passed = _buckets((newest if now is None else now) - newest)
        told = tf.where(counts > 0, passed, 0)
        here = tf.range(tf.shape(out)[1])[None] == arrays["last"][:, None]
        return tf.where(here, told[:, None], out)

    def _rating_buckets(self, ratings: Any) -> Any:
        low, high = self._coding.rating_min, self._coding.rating_max
        known = tf.math.is_finite(ratings)
        scaled = (tf.where(known, ratings, low) - low) / max(high - low, 1e-9)
        bucket = 1 + tf.floor(tf.clip_by_value(scaled, 0, 1) * (RATING_BUCKETS - 2))
        return tf.where(known, tf.cast(bucket, tf.int32), 0)

    # --- parts of the score ---

    def _linear_scores(self, history: Any, rows: Any) -> Any:
        if self._linear is None:
            return tf.zeros(tf.shape(rows))
        width = self._linear.shape[0]
        places = tf.range(tf.shape(history)[1])
        before = (history[:, :, None] == history[:, None, :]) & (places[:, None] > places[None, :])
        counts = (history > 0) & (history < width) & ~tf.reduce_any(before, axis=2)
        known = (rows > 0) & (rows < width)
        met, wanted = tf.where(counts, history, 0)[:, :, None], tf.where(known, rows, 0)[:, None]
        cells = tf.stack([met + wanted * 0, wanted + met * 0], axis=-1)
        found = tf.gather_nd(self._linear, cells) * tf.cast(counts, tf.float32)[:, :, None]
        return tf.where(known, tf.reduce_sum(found, axis=1), 0.0)

    def _text_scores(self, history: Any, rows: Any) -> Any:
        length = self._policy.history
        last, mask = _newest(history, length)
        weight = mask * (self._policy.text_decay ** np.arange(length)[::-1]).astype(np.float32)
        mixed = tf.einsum("bh,bhd->bd", weight, tf.gather(self._text, last))
        words = mixed / tf.maximum(tf.norm(mixed, axis=1, keepdims=True), 1e-9)
        return tf.einsum("bd,bcd->bc", words, tf.gather(self._text, rows))

    def _read(self, vectors: Any) -> Any:
        if self._directions is None or not vectors.shape[1]:
            return vectors[:, :0]
        mean, matrix = self._directions
        told = tf.reduce_any(vectors != 0, axis=1, keepdims=True)
        return tf.matmul(vectors - mean, matrix) * tf.cast(told, tf.float32)


class Columns:
    """Attributes by name, in a graph.

    Args:
      whose: ``item`` or ``user``: what the names of the inputs begin with.
      table: Whose attributes.
    """

    def __init__(self, whose: str, table: Table) -> None:
        self.schema: FeatureSchema = table.schema
        self.inputs = {
            column: re.sub(r"\W", "_", f"{whose}_{column}")
            for column in (*self.schema.vocabularies, *self.schema.numeric)
        }
        self.words = {
            column: _table(words, np.arange(len(words)), -1)
            for column, words in self.schema.vocabularies.items()
            if words
        }

    def specs(self) -> dict[str, Any]:
        """Input -> string (n,): a cell, as it stands in the catalog."""
        return {name: _strings(1) for name in self.inputs.values()}

    def encode(self, cells: Mapping[str, Any], count: Any) -> Any:
        """float32 (n, width), as :meth:`FeatureSchema.encode`; inputs that are not there: empty."""
        out = [tf.zeros([count, 0])]
        nothing = tf.fill([count], "")
        for column, words in self.schema.vocabularies.items():
            given = cells.get(self.inputs[column], nothing)
            out.append(self._marks(column, given, len(words)))
        for column, (mean, deviation) in self.schema.numeric.items():
            given = cells.get(self.inputs[column], nothing)
            told = given != ""
            value = tf.strings.to_number(tf.where(told, given, "0"))
            out.append(tf.where(told, (value - mean) / deviation, 0.0)[:, None])
        return tf.concat(out, axis=1)

    def _marks(self, column: str, cells: Any, width: int) -> Any:
        if not width:
            return tf.zeros([tf.shape(cells)[0], 0])
        words = tf.strings.split(cells, self.schema.separator)
        found = words.with_flat_values(self.words[column].lookup(words.flat_values))
        dense = found.to_tensor(-1)
        marks = tf.reduce_max(
            tf.concat([tf.one_hot(dense, width), tf.zeros([tf.shape(cells)[0], 1, width])], axis=1),
            axis=1,
        )
        known = tf.reduce_sum(marks, axis=1, keepdims=True)
        return marks * tf.math.rsqrt(tf.maximum(known, 1.0))


def _function(call: Call, specs: Specs) -> Any:
    names = tuple(specs)
    signature = [tf.TensorSpec(s.shape, s.dtype, name=name) for name, s in specs.items()]

    def run(*values: Any) -> Any:
        return call(**dict(zip(names, values, strict=True)))

    return tf.function(run, input_signature=signature, autograph=False)


def _told(function: Any, traced: Any) -> dict[str, Any]:
    def plain(spec: Any) -> dict[str, Any]:
        shape = [-1 if size is None else int(size) for size in spec.shape]
        return {"shape": shape, "dtype": spec.dtype.name}

    return {
        "inputs": {spec.name: plain(spec) for spec in function.input_signature},
        "outputs": {name: plain(value) for name, value in traced.structured_outputs.items()},
    }


def _strings(rank: int) -> Any:
    return tf.TensorSpec([None] * rank, tf.string)


def _whole_numbers(rank: int) -> Any:
    return tf.TensorSpec([None] * rank, tf.int32)


def _kept(array: Any, name: str) -> Any:
    """A variable, since a constant of a large catalog would not fit into a graph's file."""
    return tf.Variable(np.asarray(array, np.float32), trainable=False, name=name)


def _table(keys: Any, values: Any, default: int) -> Any:
    initial = tf.lookup.KeyValueTensorInitializer(
        tf.constant(list(keys), tf.string), tf.constant(values, tf.int32)
    )
    return tf.lookup.StaticHashTable(initial, default)


def _without(scores: Any, rows: Any) -> Any:
    """The scores (b, n), the lowest number in the columns int32 (b, e)."""
    shape = tf.shape(rows)
    user = tf.repeat(tf.range(shape[0]), shape[1])
    cells = tf.stack([user, tf.reshape(rows, [-1])], axis=1)
    lowest = tf.fill([shape[0] * shape[1]], scores.dtype.min)
    return tf.tensor_scatter_nd_update(scores, cells, lowest)


def _most(k: Any) -> Any:
    """The largest of int32 (b,), 0 at least."""
    return tf.reduce_max(tf.concat([k, [0]], axis=0))


def _is_listed(rows: Any, lists: Any) -> Any:
    """bool (b, n): which of the rows int32 (b, n) are in the lists int32 (b, e), e above 0."""
    lists = tf.sort(lists, axis=1)
    place = tf.searchsorted(lists, rows)
    near = tf.gather(lists, tf.minimum(place, tf.shape(lists)[1] - 1), batch_dims=1)
    return near == rows


def _newest(rows: Any, length: int) -> tuple[Any, Any]:
    """The last events of rows int32 (b, h), the newest in the last place: (b, length) and mask."""
    kept = tf.ragged.boolean_mask(rows, rows > 0)[:, -length:]
    turned = kept[:, ::-1].to_tensor(shape=[None, length])
    last = tf.reverse(turned, axis=[1])
    return last, tf.cast(last > 0, tf.float32)


def _gaps(when: Any) -> Any:
    """int32 buckets of the time since the event before; 0 for the first of a row."""
    flat = when.flat_values
    seconds = flat - tf.concat([flat[:1], flat[:-1]], axis=0)
    place = tf.range(tf.size(flat, tf.int64)) - tf.gather(when.row_starts(), when.value_rowids())
    return tf.where(place > 0, _buckets(seconds), 0)


def _buckets(seconds: Any) -> Any:
    """As :func:`tfrec.data.sequences.gap_bucket`."""
    bounds = tf.constant(_DOUBLINGS, tf.int64)
    doubling = tf.searchsorted(bounds, tf.reshape(seconds, [-1]), side="right")
    bucket = tf.minimum(2 + doubling, GAP_BUCKETS - 1)
    return tf.where(tf.reshape(seconds, [-1]) <= 0, 1, bucket)


# --- for the server ---


def questions(recommender: Recommender, models: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Model -> inputs of its ``serving_default`` as NumPy arrays: two plausible requests."""
    catalog = recommender.catalog
    rows = [(i % catalog.num_items) + 1 for i in range(6)]
    ids = [catalog.ids[row] for row in rows]
    history = np.array([ids[:3], [*ids[:1], "", ""]], object)
    out: dict[str, dict[str, Any]] = {
        "encode_query": {"history": history},
        "retrieve": {
            "history": history,
            "exclude": np.array([[ids[3]], [""]], object),
            "k": np.array([5, 5], np.int32),
        },
        "rank": {"history": history, "candidates": np.array([ids[3:], ids[3:]], object)},
        "encode_candidate": {
            "item_id": np.array([ids[0], ""], object),
            "text": recommender.text[rows[:2]],
            **{
                name: np.array([catalog.attributes[column][row] for row in rows[:2]], object)
                for column, name in Columns("item", catalog).inputs.items()
            },
        },
    }
    out["retrieve_scann"] = out["retrieve"]
    if "encode_text" in models:
        assert isinstance(recommender.engine, TensorFlowEngine)
        texts = [catalog.texts[row] for row in rows[:2]]
        tokens, mask = recommender.engine.text_encoder.tokenize(texts, role="passage")
        out["encode_text"] = {"token_ids": tokens, "padding_mask": mask}
        out["encode_text_int8"] = out["encode_text"]
        out["encode_text_strings"] = {"text": np.array(texts, object)}
    wanted = {name: set(told["signatures"][DEFAULT]["inputs"]) for name, told in models.items()}
    return {
        name: {key: array for key, array in out[name].items() if key in inputs}
        for name, inputs in wanted.items()
    }


def request_of(
    name: str, inputs: Mapping[str, Any], signature: str = DEFAULT, version: int | None = None
) -> Any:
    """A PredictRequest for a signature of a model, of the newest version if none is given."""
    from tensorflow_serving.apis import predict_pb2

    request = predict_pb2.PredictRequest()
    request.model_spec.name, request.model_spec.signature_name = name, signature
    if version is not None:
        request.model_spec.version.value = version
    for key, array in inputs.items():
        request.inputs[key].CopyFrom(tf.make_tensor_proto(array))
    return request


def warm_up(
    folder: Path, name: str, inputs: Mapping[str, Any], arrays: Mapping[str, Any] | None = None
) -> None:
    """Leaves requests where TensorFlow Serving looks for what to run before it serves a model.

    Args:
      folder: Of the SavedModel.
      name: Of the model.
      inputs: Of its ``serving_default``.
      arrays: Of its signature ``arrays``; None: it has none.
    """
    from tensorflow_serving.apis import prediction_log_pb2

    place = folder / "assets.extra"
    place.mkdir(exist_ok=True)
    asked = {DEFAULT: inputs, **({} if arrays is None else {ARRAYS: arrays})}
    with tf.io.TFRecordWriter(str(place / "tf_serving_warmup_requests")) as writer:
        for signature, given in asked.items():
            log = prediction_log_pb2.PredictionLog()
            log.predict_log.request.CopyFrom(request_of(name, given, signature))
            writer.write(log.SerializeToString(deterministic=True))


def blank(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Zeros for the inputs of a signature, as :class:`Saved` tells of them; one of what is free."""
    return {
        name: np.zeros([1 if size < 0 else size for size in told["shape"]], told["dtype"])
        for name, told in inputs.items()
    }


def ready(needs: Sequence[str]) -> None:
    """Loads the operations of packages that a model needs.

    Raises:
      SetupError: they cannot be loaded.
    """
    if "scann" in needs:
        scann_graph.operations()
    if "tensorflow-text" in needs:
        _ = keras_bridge.tf_text  # importing it registers them


def answers(folder: Path, inputs: Mapping[str, Any], needs: Sequence[str] = ()) -> dict[str, Any]:
    """What the SavedModel in a folder answers.

    Args:
      folder: Of the SavedModel.
      inputs: Of its ``serving_default``.
      needs: The packages whose operations it needs.

    Returns:
      Output -> NumPy array.

    Raises:
      ArtifactError: there is none, or it is damaged.
      SetupError: operations that it needs cannot be loaded.
    """
    return load(folder, needs)(DEFAULT, inputs)


def load(
    folder: Path, needs: Sequence[str] = ()
) -> Callable[[str, Mapping[str, Any]], dict[str, Any]]:
    """The SavedModel in a folder: signature and inputs -> outputs. See :func:`answers`."""
    ready(needs)
    try:
        model = tf.saved_model.load(str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ArtifactError(f"{folder} holds no SavedModel that loads: {reason}") from None

    def ask(signature: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        given = {key: tf.constant(array) for key, array in inputs.items()}
        return {name: value.numpy() for name, value in model.signatures[signature](**given).items()}

    return ask


class NotServedError(SetupError):
    """A server does not have a model, or not the version."""


@contextlib.contextmanager
def over_grpc(address: str, version: int, seconds: float = 10.0) -> Iterator[Ask]:
    """Asks a version of the models of a TensorFlow Serving at ``host:port`` by its gRPC service.

    Raises, when it is used:
      NotServedError: the server does not have the model, or not this version.
      SetupError: there is no answer, or it is an error.
    """
    import grpc
    from tensorflow_serving.apis import prediction_service_pb2_grpc

    with grpc.insecure_channel(address) as channel:
        service = prediction_service_pb2_grpc.PredictionServiceStub(channel)

        def ask(name: str, signature: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
            request = request_of(name, inputs, signature, version)
            try:
                found = service.Predict(request, timeout=seconds)
                return {key: tf.make_ndarray(tensor) for key, tensor in found.outputs.items()}
            except grpc.RpcError as error:
                reason = str(error.details()).partition("\n")[0]
                missing = error.code() == grpc.StatusCode.NOT_FOUND
                raise (NotServedError if missing else SetupError)(
                    f"{address} does not answer for version {version} of '{name}' by gRPC: "
                    f"{error.code().name}, {reason}"
                ) from None
            except (ValueError, TypeError) as error:
                raise SetupError(
                    f"the answer of {address} for '{name}' by gRPC cannot be read: {error}"
                ) from None

        yield ask


@contextlib.contextmanager
def over_rest(address: str, version: int, seconds: float = 10.0) -> Iterator[Ask]:
    """The same by its REST API.

    Raises, when it is used:
      NotServedError: the server does not have the model, or not this version.
      SetupError: there is no answer, or it is an error.
    """
    import http.client

    host, _, port = address.rpartition(":")

    def ask(name: str, signature: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        failed = f"{address} does not answer for version {version} of '{name}' by REST"
        body = json.dumps({"signature_name": signature, "inputs": as_rest(inputs)})
        connection = http.client.HTTPConnection(host, int(port), timeout=seconds)
        try:
            connection.request("POST", f"/v1/models/{name}/versions/{version}:predict", body)
            answer = connection.getresponse()
            told = json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise SetupError(f"{failed}: {type(error).__name__} {error}") from None
        finally:
            connection.close()
        told = told if isinstance(told, dict) else {}
        if answer.status != http.client.OK:
            reason = str(told.get("error", answer.status)).partition("\n")[0]
            missing = answer.status == http.client.NOT_FOUND
            raise (NotServedError if missing else SetupError)(f"{failed}: {reason}")
        if "outputs" not in told:
            raise SetupError(f"{failed}: what it sends has no 'outputs'")
        outputs = told["outputs"]
        # A model with one output is answered without its name.
        return outputs if isinstance(outputs, dict) else {"": outputs}

    yield ask


def as_told(ask: Ask, models: Mapping[str, Any], whom: str) -> Ask:
    """The same, whose outputs are arrays of the names, types and shapes that are told of them.

    Args:
      ask: Is asked.
      models: Model -> what :class:`Saved` tells of it.
      whom: Who that is, for people.

    Raises, when it is used:
      SetupError: an output is missing, or is something else.
    """

    def asked(name: str, signature: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
        found = ask(name, signature, inputs)
        told = models[name]["signatures"][signature]["outputs"]
        if len(told) == 1 and set(found) == {""}:
            found = dict.fromkeys(told, found[""])
        rows = len(next(iter(inputs.values())))
        out = {}
        for output, spec in told.items():
            try:
                out[output] = _array(found[output], spec["dtype"], [rows, *spec["shape"][1:]])
            except KeyError:
                raise SetupError(
                    f"{name}, {whom}: the answer has no '{output}'; is it another model?"
                ) from None
            except (ValueError, TypeError) as error:
                reason = str(error).partition("\n")[0]
                raise SetupError(
                    f"{name}, {whom}: '{output}' is not what the bundle says: {reason}"
                ) from None
        return out

    return asked


def _array(values: Any, dtype: str, shape: Sequence[int]) -> Any:
    """Raises ValueError or TypeError if the values are of another type or shape (-1: any size)."""
    array = np.array(values, object if dtype == "string" else dtype)
    sizes = zip(array.shape, shape, strict=False)
    if array.ndim != len(shape) or any(want not in (-1, size) for size, want in sizes):
        raise ValueError(f"it has the shape {array.shape}, not {tuple(shape)}")
    if dtype == "string" and not all(isinstance(value, str | bytes) for value in array.flat):
        raise ValueError("it holds what is no string")
    return array


def compared(
    name: str,
    signature: str,
    inputs: Collection[str],
    ask: Ask,
    golden: Golden,
    recommender: Recommender,
    tokenize: Callable[[Sequence[str]], Any],
) -> dict[str, float]:
    """How far a SavedModel is from the stored answers, in the words of :meth:`Golden.compare`.

    ``score_difference`` is how far the ranker's score is from what the stored predictions and the
    recommender's other parts give.

    Args:
      name: Which of the models.
      signature: Which of its signatures, but :data:`~tfrec.bundle.ARRAYS`.
      inputs: The names of what it takes.
      ask: Asks it, here or elsewhere.
      golden: The stored answers.
      recommender: Knows the catalog, and the answers that ``golden`` does not hold.
      tokenize: Texts -> token ids and padding mask, int32 (n, t).

    Raises:
      ArtifactError: the model does not load.
      SetupError: it does not answer.
    """

    def answer(**given: Any) -> Mapping[str, Any]:
        return ask(name, signature, {key: given[key] for key in given if key in inputs})

    if name == "encode_text_strings":
        found = answer(text=np.array(golden.texts, object))
        return cosines(_read_as(signature, golden, recommender), _only(found))
    if name in ("encode_text", "encode_text_int8"):
        tokens, mask = tokenize(golden.texts)
        return cosines(golden.text, _only(answer(token_ids=tokens, padding_mask=mask)))
    catalog = recommender.catalog
    if name == "encode_candidate":
        rows = slice(1, 1 + len(golden.candidate))
        cells = {
            key: np.array(catalog.attributes[column][rows], object)
            for column, key in Columns("item", catalog).inputs.items()
        }
        new = np.full(len(golden.candidate), "", object)
        found = answer(item_id=new, text=recommender.text[rows], **cells)
        return cosines(golden.candidate, _only(found))
    if name not in ("encode_query", "retrieve", "retrieve_scann", "rank"):
        return {}
    # Without ``full`` nothing is told of a user but his history.
    everyone = range(len(golden.requests))
    plain = [i for i in everyone if not golden.requests[i].user_id]
    asked = list(everyone) if signature == "full" else plain
    batches = []
    for start in range(0, len(asked), _AT_ONCE):
        some = asked[start : start + _AT_ONCE]
        ids = [[catalog.ids[row] for row in golden.candidates[i]] for i in some]
        found = answer(
            **_full(recommender, [golden.requests[i] for i in some]),
            exclude=np.full((len(some), 1), "", object),
            k=np.full(len(some), _K, np.int32),
            candidates=np.array(ids, object),
        )
        batches.append(found)
    found = {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    if name == "encode_query":
        return cosines(golden.query[asked], _only(found))
    people, seen = recommender.asked([golden.requests[i] for i in asked])
    if name == "rank":
        tasks, at = recommender.policy.tasks, golden.candidates[asked]
        told = np.stack([found[task] for task in tasks], axis=-1)
        parts = recommender.parts(people, golden.query[asked], at)
        parts |= {task: golden.tasks[asked, :, place] for place, task in enumerate(tasks)}
        score = recommender.policy.total(parts)
        score += recommender.policy.prior(people.events)[:, None] * recommender.popular(at)
        apart = difference(score[at > 0], found["score"][at > 0])
        return {
            **difference(golden.tasks[asked], told),
            "score_difference": apart["max_difference"],
        }
    expected = recommender.index.search(recommender.queries(people), _K, seen).ids
    mine = [[catalog.ids[row] for row in rows if row] for rows in expected]
    its = [[_text(i) for i in ids if len(i)] for ids in found["item_id"]]
    return {"overlap": overlap(mine, its)}


def _full(recommender: Recommender, requests: Sequence[Request]) -> dict[str, Any]:
    """All that is known of those who ask, for the signature ``full``; ``history_rows`` too."""
    asked, _ = recommender.asked(requests)
    events, coding = asked.histories, recommender.coding
    places = np.arange(max(events.lengths.max(initial=0), 1)) < events.lengths[:, None]

    def wide(values: Any, fill: Any) -> Any:
        out = np.full(places.shape, fill, values.dtype)
        out[places] = values
        return out

    # No name for what the models do not know, and a rating in the middle of its bucket.
    names = np.array(["", "", *coding.event_names], object)
    span = coding.rating_max - coding.rating_min
    ratings = coding.rating_min + (events.rating - 0.5) / (RATING_BUCKETS - 2) * span
    times = wide(events.timestamp, np.int64(0))
    newest = np.maximum(events.lengths - 1, 0)
    users, columns = recommender.users, Columns("user", recommender.users).inputs
    rows = [users.row(request.user_id) for request in requests]
    return {
        "history": wide(np.array([recommender.catalog.ids[i] for i in events.item], object), ""),
        "history_rows": wide(events.item, 0),
        "event": wide(names[events.event], ""),
        "rating": wide(np.where(events.rating > 0, ratings, np.nan).astype(np.float32), np.nan),
        "timestamp": times,
        "request_time": np.take_along_axis(times, newest[:, None], axis=1)[:, 0],
        "profile": asked.profile,
        **{key: _cells(users.attributes[column], rows) for column, key in columns.items()},
    }


def _cells(column: Sequence[str], rows: Sequence[int]) -> Any:
    """string (n,); empty for rows below 0."""
    return np.array([column[row] if row >= 0 else "" for row in rows], object)


def _read_as(signature: str, golden: Golden, recommender: Recommender) -> Any:
    """float32 (texts, width), what a text encoder must make of the stored texts."""
    engine = recommender.engine
    if signature == DEFAULT:
        return golden.text
    # What the trained model said is stored of texts of items, which may be read otherwise.
    words = engine.encode_text(golden.texts, query=True)
    return golden.text if np.array_equal(words, engine.encode_text(golden.texts)) else words


def _only(outputs: Mapping[str, Any]) -> Any:
    (values,) = outputs.values()
    return np.asarray(values, np.float32)


def as_rest(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Arrays as TensorFlow Serving's REST API writes them, column by column."""
    return {
        name: np.vectorize(_text, otypes=[object])(array).tolist()
        if array.dtype == object
        else array.tolist()
        for name, array in arrays.items()
    }


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
