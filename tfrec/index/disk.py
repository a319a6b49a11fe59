"""Disk: an index as a folder of plain files, written whole or not at all, checked when read.

``index.json`` names a folder beside it, the files in that and their digests, and has a digest of
itself. It is replaced last, so that a kill leaves the old index or the new one.

What lies in folders of their own there (shards) are indexes again: of those, the digest of their
``index.json`` is kept, which has the digests of what belongs to it.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tfrec.artifact import alone, disk_errors, file_digest, value_digest, write_json
from tfrec.errors import ArtifactError
from tfrec.index.store import Store

FORMAT = 2
NAME = "index.json"


def write(
    folder: str | os.PathLike[str],
    about: Mapping[str, Any],
    files: Callable[[Path], None],
    written: Callable[[Path], None] = lambda data: None,
) -> None:
    """Makes ``folder`` hold an index.

    Args:
      folder: Where; an index that is there is replaced.
      about: What ``index.json`` says beside the files.
      files: Writes them into the folder it is given.
      written: Told that folder when the index is there, before an old one is deleted.

    Raises:
      SetupError: the disk is full or cannot be written.
    """
    target = Path(folder)
    with alone(target):
        _write(target, about, files, written)


def _write(
    target: Path,
    about: Mapping[str, Any],
    files: Callable[[Path], None],
    written: Callable[[Path], None],
) -> None:
    numbers = [path.name.removeprefix("data-") for path in target.glob("data-*")]
    data = target / f"data-{max((int(n) for n in numbers if n.isdigit()), default=0) + 1}"
    with disk_errors(target):
        try:
            data.mkdir(parents=True)
            files(data)
            listing = {
                path.relative_to(data).as_posix(): {
                    "bytes": path.stat().st_size,
                    "sha256": file_digest(path),
                }
                for path in sorted([*data.iterdir(), *data.glob(f"*/{NAME}")])
                if path.is_file()
            }
            content = {"format": FORMAT, **about, "data": data.name, "files": listing}
            write_json(target / NAME, {**content, "digest": value_digest(content)})
        except BaseException:
            shutil.rmtree(data, ignore_errors=True)
            raise
    written(data)
    for old in target.glob("data-*"):
        if old != data:
            shutil.rmtree(old, ignore_errors=True)


def read(folder: str | os.PathLike[str], check: bool = True) -> tuple[dict[str, Any], Path]:
    """What ``index.json`` says, and where the files are.

    Args:
      folder: Holds an index.
      check: Whether each file is read to compare its digest; else its size alone.

    Raises:
      ArtifactError: there is none, another tfrec wrote it, or a file is not as it was written.
    """
    path = Path(folder) / NAME
    try:
        about = json.loads(path.read_text("utf-8"))
        written, data, files = about["format"], Path(folder) / about["data"], about["files"]
        if written not in (1, FORMAT):
            raise ArtifactError(
                f"{path} is of format {written}, and this tfrec reads 1 and {FORMAT}; build it "
                "again, or use the tfrec that wrote it"
            )
        # Format 1 had no digest of itself.
        if about.pop("digest", None) != (value_digest(about) if written == FORMAT else None):
            raise ArtifactError(f"{path} is damaged: its digest differs; build the index again")
        names = [about["data"], *(part for name in files for part in name.split("/"))]
        if any(Path(name).name != name or name in ("", ".", "..") for name in names):
            raise ValueError
        expected = {data / name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ArtifactError(f"{path} is missing or damaged; build the index again") from None
    for file, (size, digest) in expected.items():
        if not file.is_file() or file.stat().st_size != size:
            raise ArtifactError(f"{file} is missing or cut short; build the index again")
        if check and file_digest(file) != digest:
            raise ArtifactError(f"{file} is damaged: its digest differs; build the index again")
    if any(Path(folder).rglob("*.pkl")):
        raise ArtifactError(f"{folder} holds a pickle, which could run code; it is not ours")
    return about, data


def write_store(data: Path, store: Store) -> None:
    """Writes vectors.npy and ids.npy, and scales.npy where the vectors are int8."""
    vectors, scales, ids = store.parts()
    np.save(data / "vectors.npy", vectors, allow_pickle=False)
    np.save(data / "ids.npy", ids, allow_pickle=False)
    if scales is not None:
        np.save(data / "scales.npy", scales, allow_pickle=False)


def read_store(about: Mapping[str, Any], data: Path, mapped: bool) -> Store:
    """The store that :func:`write_store` wrote.

    Args:
      about: What ``index.json`` says.
      data: Where the files are.
      mapped: Whether the vectors stay on disk until they are asked for or changed.

    Raises:
      ArtifactError: the files are damaged, or do not fit each other.
    """
    try:
        vectors = np.load(
            data / "vectors.npy", mmap_mode="r" if mapped else None, allow_pickle=False
        )
        ids = np.load(data / "ids.npy", allow_pickle=False)
        scales = None
        if about["precision"] == "int8":
            scales = np.load(data / "scales.npy", allow_pickle=False)
        return Store.of_parts(vectors, scales, ids, about["metric"], about["precision"])
    except (OSError, ValueError, EOFError, KeyError) as error:
        raise ArtifactError(f"the index in {data} cannot be read: {error}") from None


def expect(folder: str | os.PathLike[str], about: Mapping[str, Any], kind: str) -> None:
    """Refuses an index of another kind.

    Raises:
      ArtifactError: it is.
    """
    if about.get("kind") != kind:
        raise ArtifactError(
            f"{Path(folder) / NAME} says kind '{about.get('kind')}', not '{kind}'; use load_index"
        )
