"""Shards: a catalog larger than memory, as several indexes that are built one after another."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import ArtifactError, InputError
from tfrec.index import disk, scann
from tfrec.index.exact import ExactIndex, StoredIndex, refuse
from tfrec.index.results import Floats, Ids, Ragged, TopK, merged
from tfrec.index.scann import ScannIndex
from tfrec.index.store import Metric, Precision, checked_ids, one_of, whole_numbers


class ShardedIndex:
    """Searches each shard and merges. Building takes the memory of one shard.

    Args:
      folders: Where the shards are.
      resident: How many shards are in memory at once; None: all, which changing the index needs.
        Where it is fewer, each search reads the others from disk: ask many queries at a time.

    A shard in memory takes the vectors of ScaNN and its codes; our copy of the vectors stays on
    disk until it is needed: in bfloat16 and int8 for the k hits of each query, which are scored
    again by it.

    When a shard is first read, its files are compared with their digests: about a second for a
    gigabyte, once in the life of this object.
    """

    kind = "sharded"

    def __init__(self, folders: Sequence[Path], resident: int | None = None) -> None:
        if resident is not None and resident < 1:
            raise InputError(f"resident is how many shards are in memory, and got {resident}")
        self._folders, self._resident = list(folders), resident
        self._open: dict[int, StoredIndex] = {}
        self._checked: set[int] = set()
        self._opening, self._changing = threading.Lock(), threading.RLock()

    @classmethod
    def build(
        cls,
        vectors: Iterable[Floats] | str | os.PathLike[str],
        folder: str | os.PathLike[str],
        ids: NDArray[np.integer] | None = None,
        *,
        kind: Literal["exact", "scann"] = "scann",
        shard_rows: int = 2_000_000,
        metric: Metric = "dot",
        precision: Precision = "float32",
        recall: float = 0.95,
        queries: Floats | None = None,
        resident: int | None = None,
    ) -> Self:
        """Builds and saves one shard after another, and opens the result.

        Args:
          vectors: float32 blocks (m, dim) of any length, one after another, or the path of a .npy
            file of float32 (n, dim), which is read in pieces.
          folder: Where the index is written; one that is there is replaced at the end.
          ids: int32 (n,), unique over all shards, all above 0; None: 1 to n.
          kind: Of each shard; one too small for ScaNN is exact.
          shard_rows: Vectors in a shard.
          metric: See :meth:`ScannIndex.build`.
          precision: See :meth:`ScannIndex.build`.
          recall: Of each shard, see :meth:`ScannIndex.build`.
          queries: See :meth:`ScannIndex.build`.
          resident: See :class:`ShardedIndex`.

        Raises:
          InputError: a block, the ids or the kind do not fit, or there is no vector.
          SetupError: ScaNN is not installed, or the disk is full.
        """
        if shard_rows < 1:
            raise InputError(f"shard_rows is at least 1, and got {shard_rows}")
        one_of("kind", kind, ("exact", "scann"))
        given = None if ids is None else checked_ids(ids)
        blocks, total = _blocks(vectors, shard_rows)
        if given is not None and total is not None:
            _one_for_each(total, given)
        names: list[str] = []

        def files(data: Path) -> None:
            start = 0
            for part in _parts(blocks, shard_rows):
                stop = start + len(part)
                own = np.arange(start + 1, stop + 1, dtype=np.int32)
                if given is not None:
                    if stop > len(given) or len(part) < shard_rows:  # too many, or the last
                        _one_for_each(stop, given)
                    own = given[start:stop]
                made: StoredIndex
                if kind == "scann" and len(part) >= scann.LEAST:
                    made = ScannIndex.build(
                        part, own, metric=metric, precision=precision, recall=recall,
                        queries=queries,
                    )  # fmt: skip
                else:
                    made = ExactIndex.build(part, own, metric=metric, precision=precision)
                names.append(f"shard-{len(names):05d}")
                made.save(data / names[-1])
                start = stop
            if not names:
                raise InputError("a sharded index takes at least one vector, and got none")
            if given is not None:
                _one_for_each(start, given)

        disk.write(folder, {"kind": cls.kind, "shards": names}, files)
        return cls.load(folder, resident=resident)

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, resident: int | None = None) -> Self:
        """Opens what :meth:`build` or :meth:`save` wrote. Shards are read when first searched.

        Raises:
          ArtifactError: there is none, or a shard is missing, cut short or another; one whose bytes
            changed is so when it is first searched.
        """
        about, data = disk.read(folder)
        disk.expect(folder, about, cls.kind)
        folders = [data / Path(name).name for name in about["shards"]]
        for one in folders:
            disk.read(one, check=False)
        return cls(folders, resident)

    @property
    def ids(self) -> Ids:
        """int32 (n,): the ids held, ascending."""
        return np.sort(np.concatenate([shard.ids for shard in self._shards()]))

    def search(
        self,
        queries: Floats,
        k: int,
        exclude: Ragged | None = None,
        allow: NDArray[np.integer] | None = None,
    ) -> TopK:
        """See :meth:`Index.search`."""
        best: TopK | None = None
        for shard in self._shards():
            some = None if allow is None else allow[shard.holds(allow)]
            if some is None or len(some):
                found = shard.search(queries, k, exclude, some)
                best = found if best is None else merged([best, found], k)
        if best is None:
            count = 0 if allow is None else len(allow)
            raise InputError(f"none of the {count} ids that the filter allows is in the index")
        return best

    def add(self, vectors: Floats, ids: Ids) -> None:
        """See :meth:`Index.add`. New items go to the shard that holds fewest."""
        with self._changing:
            refuse(ids[self._homes(ids) >= 0], "is in the index already; use update or upsert")
            shards = self._changeable()
            min(shards, key=lambda shard: len(shard.ids)).add(vectors, ids)

    def update(self, vectors: Floats, ids: Ids) -> None:
        """See :meth:`Index.update`."""
        with self._changing:
            homes = self._homes(ids)
            refuse(ids[homes < 0], "is not in the index; use add or upsert")
            shards = self._changeable()
            shards[0].check(vectors, ids)
            for home in np.unique(homes):
                shards[home].update(vectors[homes == home], ids[homes == home])

    def upsert(self, vectors: Floats, ids: Ids) -> None:
        """See :meth:`Index.upsert`."""
        with self._changing:
            held = self._homes(ids) >= 0
            self._changeable()[0].check(vectors, ids)
            self.update(vectors[held], ids[held])
            self.add(vectors[~held], ids[~held])

    def remove(self, ids: Ids) -> None:
        """See :meth:`Index.remove`."""
        with self._changing:
            homes = self._homes(ids)
            refuse(ids[homes < 0], "is not in the index; nothing was removed")
            for home in np.unique(homes):
                self._changeable()[home].remove(ids[homes == home])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """See :meth:`Index.save`."""
        names = [f"shard-{i:05d}" for i in range(len(self._folders))]

        def files(data: Path) -> None:
            for name, shard in zip(names, self._shards(), strict=True):
                shard.save(data / name)

        def written(data: Path) -> None:
            with self._opening:  # what is read from now on is not what will be deleted
                self._folders = [data / name for name in names]

        about = {"kind": self.kind, "shards": names}
        with self._changing:
            here = self._folders and self._folders[0].parent.parent.resolve()
            if here == Path(folder).resolve():
                disk.write(folder, about, files, written)
            else:
                disk.write(folder, about, files)

    def _shards(self) -> Iterator[StoredIndex]:
        for number in range(len(self._folders)):
            with self._opening:
                shard = self._open.get(number)
                if shard is None:
                    folder = self._folders[number]
                    if number not in self._checked:
                        disk.read(folder)
                        self._checked.add(number)
                    shard = open_shard(folder)
                    if self._resident is None or len(self._open) < self._resident - 1:
                        self._open[number] = shard
            yield shard

    def _changeable(self) -> list[StoredIndex]:
        if self._resident is not None:
            raise InputError("an index with resident shards cannot be changed; leave resident out")
        return list(self._shards())

    def _homes(self, ids: Ids) -> NDArray[np.int64]:
        whole_numbers(ids)
        homes = np.full(len(ids), -1, np.int64)
        for number, shard in enumerate(self._changeable()):
            homes[shard.holds(ids)] = number
        return homes


def open_shard(folder: Path) -> StoredIndex:
    """An exact or ScaNN index whose own vectors stay on disk.

    Raises:
      ArtifactError: there is none.
    """
    kind = disk.read(folder, check=False)[0].get("kind")
    if kind == ExactIndex.kind:
        return ExactIndex.load(folder, mapped=True)
    if kind == ScannIndex.kind:
        return ScannIndex.load(folder, mapped=True)
    raise ArtifactError(f"{folder} says kind '{kind}', and a shard is exact or scann")


def _one_for_each(vectors: int, ids: Ids) -> None:
    if vectors != len(ids):
        more = " or more" if vectors > len(ids) else ""
        raise InputError(
            f"an index takes one vector for each id; got {vectors} vectors{more}, {len(ids)} ids"
        )


def _blocks(
    vectors: Iterable[Floats] | str | os.PathLike[str], size: int
) -> tuple[Iterable[Floats], int | None]:
    """Blocks of vectors, and how many vectors they are if that is known before they are read."""
    if isinstance(vectors, str | os.PathLike):
        try:
            mapped = np.load(vectors, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{os.fspath(vectors)} is no .npy file: {error}") from None
        if mapped.ndim != 2:
            raise InputError(f"{os.fspath(vectors)} is {mapped.shape}, and vectors are (n, dim)")
        return (mapped[start : start + size] for start in range(0, len(mapped), size)), len(mapped)
    if isinstance(vectors, list | tuple):
        return vectors, sum(len(block) for block in vectors)
    return vectors, None


def _parts(blocks: Iterable[Floats], size: int) -> Iterator[Floats]:
    """The vectors in arrays of ``size`` rows, the last one shorter.

    Raises:
      InputError: a block is not (m, dim), or its vectors are wider or narrower than the first.
    """
    held: list[Floats] = []
    count = read = width = 0
    for block in blocks:
        if len(block):
            shape = np.shape(block)
            width = width or shape[-1]
            if len(shape) != 2 or shape[1] != width:
                raise InputError(
                    f"blocks of vectors are (m, {width}) throughout, and got {shape} after {read} "
                    "vectors"
                )
            read += len(block)
        while len(block):
            some = block[: size - count]
            held.append(np.array(some, np.float32))
            count += len(some)
            block = block[len(some) :]
            if count == size:
                yield np.concatenate(held)
                held, count = [], 0
    if held:
        yield np.concatenate(held)
