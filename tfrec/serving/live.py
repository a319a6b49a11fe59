"""Live: a bundle's recommender to which items are added, and taken from, as it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from tfrec.data.attributes import joined_texts
from tfrec.data.catalog import LiveCatalog
from tfrec.data.interactions import Interactions
from tfrec.errors import InputError
from tfrec.recommender import Recommender
from tfrec.rows import Growing, GrowingRows, growing
from tfrec.serving.state import Item

Floats = NDArray[np.float32]

_SHOWN = 10_000  # items whose attributes are kept as answers have them


class LiveRecommender(Recommender):
    """A recommender whose items change; one thread at a time may use it.

    Attributes:
      created: Catalog row -> seconds since 1970 when the item was put, for those that were.
      deleted: Catalog rows of the items that were taken out.
      marks: Called with each stage of the chain that is done.
    """

    catalog: LiveCatalog
    created: dict[int, float]
    deleted: set[int]
    marks: Callable[[str], None] | None

    @classmethod
    def of(cls, base: Recommender) -> Self:
        """The same recommender, which from now on may change; ``base`` must not be used again."""
        live = cls.__new__(cls)
        live.__dict__.update(base.__dict__)
        live.catalog = LiveCatalog(base.catalog)
        live.interactions = _slim(base.interactions)
        live._vectors = growing(base.vectors)
        live._grown = {
            name: Growing(np.asarray(getattr(base, name), np.float32))
            for name in ("text", "popularity", "described")
        }
        live._take_grown()
        live.created, live.deleted, live.marks = {}, set(), None
        live._attributes = {}
        return live

    _attributes: dict[int, dict[str, list[str]]]
    _vectors: Growing | GrowingRows
    _grown: dict[str, Growing]

    def _take_grown(self) -> None:
        self.vectors = self._vectors.array
        self.text, self.popularity, described = (grown.array for grown in self._grown.values())
        self.__dict__["described"] = described

    def mark(self, stage: str) -> None:
        """See :meth:`Recommender.mark`."""
        if self.marks is not None:
            self.marks(stage)

    def attributes_of(self, row: int) -> dict[str, list[str]]:
        """Attribute -> values of an item, not to be written to: they are kept for the next time."""
        found = self._attributes.get(row)
        if found is None:
            if len(self._attributes) >= _SHOWN:
                self._attributes.clear()
            found = self._attributes[row] = self.catalog.cells(row)
        return found

    def text_of(self, item: Item) -> str:
        """What the BERT reads of an item: its text, else what `prepare` makes of the columns."""
        if item.text.strip():
            return item.text
        schema = self.catalog.schema
        words = (name for name in self.catalog.attributes if name not in schema.numeric)
        columns = [[item.title], *([item.attributes.get(name, "")] for name in words)]
        return joined_texts(columns, schema.separator)[0]

    def put(
        self, items: Sequence[Item], vectors: Mapping[str, bytes] | None = None
    ) -> dict[str, bytes]:
        """Adds items, or replaces what is known of them, so that the next answer can hold them.

        Args:
          items: None of them deleted.
          vectors: Vectors of their texts that were made before, float32 as bytes.

        Returns:
          The vectors of their texts that were made now.

        Raises:
          InputError: an attribute is wrong, or the models read neither texts nor attributes. Then
            nothing has changed.
        """
        if not items:
            return {}
        if not all(item.item_id for item in items):
            raise InputError("an item's id is empty; give it one")
        schema, n = self.catalog.schema, len(items)
        told = {c: [item.attributes.get(c, "") for item in items] for c in self.catalog.attributes}
        features = schema.encode(told, n)
        texts = [self.text_of(item) for item in items]
        text, made = self._texts(items, texts, vectors or {})
        candidates = self.engine.encode_candidate(text, features, np.zeros(n, np.int32))
        rows = np.array(
            [
                self.catalog.put(item.item_id, item.title, read, item.attributes)
                for item, read in zip(items, texts, strict=True)
            ],
            np.int32,
        )
        described, events = self.read(text), self._grown["popularity"]
        for place, (item, row) in enumerate(zip(items, rows.tolist(), strict=True)):
            met = events.array[row] if row < len(events.array) else 0
            for name, value in zip(
                self._grown,
                (text[place], np.float32(met), described[place]),
                strict=True,
            ):
                self._grown[name].put(row, np.asarray(value, np.float32))
            self._vectors.put(row, candidates[place])
            self._attributes.pop(row, None)
            self.created[row] = item.created or time.time()
            self.deleted.discard(row)
        self._take_grown()
        last = {int(row): place for place, row in enumerate(rows)}  # the same id may come twice
        rows, places = np.array(list(last), np.int32), np.array(list(last.values()))
        self.index.upsert(candidates[places], rows)
        if self.text.shape[1]:
            self.text_index.upsert(text[places], rows)
        self._added = np.concatenate([self._added[~np.isin(self._added, rows)], rows])
        self._changed()
        return made

    def remove(self, item_id: str) -> bool:
        """Takes an item out, so that no further answer holds it; False: it is not there."""
        row = self.catalog.row(item_id)
        if not row or row in self.deleted:
            return False
        gone = np.array([row], np.int32)
        self.index.remove(gone)
        if self.text.shape[1]:
            self.text_index.remove(gone)
        self._added = self._added[self._added != row]
        self.deleted.add(row)
        self._changed()
        return True

    def titled(self, words: str, most: int = 20) -> NDArray[np.int32]:
        """int32 (n,), rows of the items whose title holds the words, the popular ones first."""
        wanted = words.casefold().strip()
        if "titles" not in self.__dict__:
            self.__dict__["titles"] = [title.casefold() for title in self.catalog.titles]
        titles = self.__dict__["titles"]
        rows = [r for r, title in enumerate(titles) if wanted in title and r not in self.deleted]
        found = np.array(rows if wanted else [], np.int32)
        return found[np.argsort(-self.popularity[found], kind="stable")[:most]]

    def _changed(self) -> None:
        self.__dict__.pop("titles", None)
        self.__dict__.pop("_by_popularity", None)

    def _texts(
        self, items: Sequence[Item], texts: Sequence[str], kept: Mapping[str, bytes]
    ) -> tuple[Floats, dict[str, bytes]]:
        width = self.text.shape[1]
        if not width:
            return np.zeros((len(items), 0), np.float32), {}
        found = {
            key: np.frombuffer(raw, np.float32)
            for key, raw in kept.items()
            if len(raw) == 4 * width
        }
        new = [place for place, item in enumerate(items) if item.item_id not in found]
        made: dict[str, bytes] = {}
        if new:
            read = self.engine.encode_text([texts[place] for place in new])
            for place, vector in zip(new, np.asarray(read, np.float32), strict=True):
                found[items[place].item_id] = vector
                made[items[place].item_id] = vector.tobytes()
        vectors = np.stack([found[item.item_id] for item in items])
        vectors[[not text.strip() for text in texts]] = 0
        return vectors, made


def _slim(known: Interactions) -> Interactions:
    """The same events, without what only training reads: weights and splits take no memory."""
    n = len(known)
    weight, split = np.broadcast_to(np.float32(1), n), np.broadcast_to(np.int8(0), n)
    return replace(known, weight=weight, split=split)
