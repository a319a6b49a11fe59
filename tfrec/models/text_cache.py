"""Vectors of texts on disk, so that a catalog is encoded once.

A folder for each encoder (by digest), in it files of records (digest of a text, vector). A file's
name is the digest of its content, it appears in one rename and is never changed, so that several
processes may write at once and a damaged file is noticed and ignored.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import SetupError


class TextCache:
    """The vectors that one encoder has made.

    Args:
      folder: The cache of all encoders.
      encoder: Digest of the encoder: another one, another set of vectors.
      width: Length of a vector.
    """

    def __init__(self, folder: str | os.PathLike[str], encoder: str, width: int) -> None:
        self.folder = Path(folder) / encoder[:32]
        self.width = width
        self._record = np.dtype([("text", np.uint8, 16), ("vector", np.float32, (width,))])

    def get(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Looks texts up.

        Returns:
          float32 (n, width), zeros where there is none, and bool (n,): which were found.
        """
        digests = [_digest(text) for text in texts]
        wanted = {digest: row for row, digest in enumerate(digests)}
        vectors = np.zeros((len(texts), self.width), np.float32)
        found = np.zeros(len(texts), bool)
        for path in sorted(self.folder.glob("*.npy")) if texts else ():
            records = self._read(path)
            held = records["text"].tobytes()
            rows = [wanted.get(held[i : i + 16], -1) for i in range(0, len(held), 16)]
            hits = np.array(rows, np.int64)
            vectors[hits[hits >= 0]] = records["vector"][hits >= 0]
            found[hits[hits >= 0]] = True
        same = np.array([wanted[digest] for digest in digests], np.int64)
        return vectors[same], found[same]

    def add(self, texts: Sequence[str], vectors: NDArray[np.float32]) -> None:
        """Stores vectors, float32 (n, width).

        Raises:
          SetupError: the folder cannot be written.
        """
        records = np.zeros(len(texts), self._record)
        digests = b"".join(_digest(text) for text in texts)
        records["text"] = np.frombuffer(digests, np.uint8).reshape(-1, 16)
        records["vector"] = vectors
        stream = io.BytesIO()
        np.save(stream, records, allow_pickle=False)
        content = stream.getvalue()
        try:
            self._write(content)
        except OSError as error:
            raise SetupError(
                f"the text cache {self.folder} cannot be written: {error.strerror or error}"
            ) from None

    def _write(self, content: bytes) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, partial = tempfile.mkstemp(prefix=".partial-", dir=self.folder)
        try:
            with os.fdopen(handle, "wb") as stream:
                stream.write(content)
            os.replace(partial, self.folder / f"{_name(content)}.npy")
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)

    def _read(self, path: Path) -> NDArray[np.void]:
        nothing = np.zeros(0, self._record)
        try:
            content = path.read_bytes()
            if _name(content) != path.stem:
                return nothing
            records = np.load(io.BytesIO(content), allow_pickle=False)
        except (OSError, ValueError):
            return nothing
        return records if records.dtype == self._record else nothing


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:16]


def _name(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
