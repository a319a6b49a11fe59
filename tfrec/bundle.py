"""Bundle: what is deployed. One folder of numbered versions, each complete in itself.

    BUNDLE/
      manifest.json        which version is the newest, and all that there is to know about it
      versions/3/          an artifact: models, vectors, catalog, histories, policy, golden answers
      tf-serving/          models.config, models-scann.config for a server with ScaNN's operations,
                           and encode_query/3 -> ../../versions/3/tf-serving/...

A new version appears in one rename, and ``manifest.json`` names it only when all of it is there;
so a reader finds the old one or the new one, whole.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

import tfrec
from tfrec.artifact import (
    MANIFEST,
    Artifact,
    as_json,
    check_file,
    disk_errors,
    file_digest,
    write_json,
    write_text,
)
from tfrec.errors import ArtifactError, InputError, SetupError
from tfrec.rows import Int8Rows, Vectors, int8_rows

FORMAT = 2
_READ = (1, FORMAT)  # in format 1 all arrays are floats
_CODES, _SCALES = ".int8.npy.zst", ".scales.npy"
_MANY = 50_000  # rows from which on memory is worth more than the time to read them from int8
_LEVEL = 1  # Huffman codes and few matches: small numbers compress no further
_ALL_MODELS = "models-scann.config"
_BATCHING = """max_batch_size { value: 128 }
batch_timeout_micros { value: 2000 }
max_enqueued_batches { value: 1000 }
"""
KIND = "bundle"
VERSIONS = "versions"
SERVING = "tf-serving"
DEFAULT = "serving_default"
ARRAYS = "arrays"
"""The signature of SavedModels that takes and gives what the LiteRT model of the same does."""
EXAMPLES = "examples"
LINKED = ("tensorflow-text",)
"""Packages whose operations are linked into TensorFlow Serving as it is released."""

CONTENT = "content.json"
"""In a version: its models with their signatures, packages, the weights' licence, and policy."""


@dataclass(frozen=True)
class Bundle:
    """One version of a bundle.

    Attributes:
      path: The bundle's folder.
      version: Its number.
      artifact: Its files.
    """

    path: Path
    version: int
    artifact: Artifact

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], version: int | None = None, check: bool = True
    ) -> Bundle:
        """Reads a version and checks the digest of every file.

        Args:
          folder: The bundle.
          version: Its number; None: the newest.
          check: False: the digests are not checked.

        Raises:
          ArtifactError: there is no bundle or no such version, it was changed, or it was written
            by a newer tfrec.
        """
        path = Path(folder)
        newest = _newest(path)
        wanted = newest if version is None else version
        if wanted not in versions(path):
            known = ", ".join(map(str, versions(path))) or "none"
            raise ArtifactError(f"{path} has no version {wanted}; there are: {known}")
        read = Artifact.load if check else Artifact.peek
        return cls(path, wanted, read(path / VERSIONS / str(wanted), KIND))

    @property
    def folder(self) -> Path:
        """Where the version's files are."""
        return self.artifact.path

    @cached_property
    def content(self) -> dict[str, Any]:
        """What the version holds."""
        path = self.artifact.file(CONTENT)
        try:
            found: dict[str, Any] = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from None
        return found


def is_bundle(folder: str | os.PathLike[str]) -> bool:
    """Whether there is a bundle, as opposed to a run."""
    return (Path(folder) / VERSIONS).is_dir()


def versions(folder: str | os.PathLike[str]) -> list[int]:
    """The numbers of the finished versions, oldest first."""
    found = Path(folder, VERSIONS).glob(f"*/{MANIFEST}")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


def writable(folder: str | os.PathLike[str]) -> Path:
    """A folder in which a bundle is or can be made.

    Raises:
      ArtifactError: the bundle there was written by a newer tfrec.
      InputError: something else is there.
    """
    path = Path(folder)
    if (path / MANIFEST).is_file():
        _newest(path)
    elif path.is_file() or (path.is_dir() and any(path.iterdir()) and not is_bundle(path)):
        raise InputError(f"{path} is there already and is no bundle; name another folder with --to")
    return path


def publish(folder: Path, version: int, keep: int) -> Path:
    """Makes a finished version the newest one, and removes the oldest beyond ``keep``.

    Args:
      folder: The bundle.
      version: Its number.
      keep: Versions to keep, at least 1.

    Returns:
      The path of ``manifest.json``.
    """
    with disk_errors(folder):
        there = versions(folder)
        old = [number for number in there if number != version][: max(len(there) - keep, 0)]
        kept = [number for number in there if number not in old]
        with _linked(folder, there):
            write_json(folder / MANIFEST, _described(folder, version, kept))
        _unlink(folder, kept)
        for number in old:
            os.rename(folder / VERSIONS / str(number), folder / VERSIONS / f".{number}.gone")
        for gone in (folder / VERSIONS).glob(".*.gone"):
            shutil.rmtree(gone, ignore_errors=True)
    return folder / MANIFEST


def check(folder: str | os.PathLike[str]) -> None:
    """Checks what stands beside the versions: ``manifest.json``, and what TensorFlow Serving reads.

    Each is compared with what :func:`publish` writes for the versions that are there.

    Raises:
      ArtifactError: it is missing or was changed.
    """
    path = Path(folder)
    version = _newest(path)
    told = json.loads((path / MANIFEST).read_text("utf-8"))
    listed = told.get("versions")
    listed = listed if isinstance(listed, dict) else {}
    kept = [number for number in versions(path) if str(number) in listed]
    expected = _described(path, version, kept)
    if "manifests" not in told:  # bundles that were made before there was this
        del expected["manifests"]
    if "arrays_int8" not in expected:
        expected["format"] = told["format"]
    theirs = told.get("manifests")
    for number, digest in expected.get("manifests", {}).items():
        if isinstance(theirs, dict) and digest != theirs.get(number):
            raise ArtifactError(
                f"{path / VERSIONS / number / MANIFEST} does not match its digest in "
                f"{path / MANIFEST}: one of them was changed; export again"
            )
    _check_text(path / MANIFEST, as_json(expected))
    for name, text in _configs(path, kept).items():
        _check_text(path / SERVING / name, text)
    links = _links(path, kept)
    for link, model in links.items():
        if not link.is_symlink():
            _check_copy(path, link)
        elif link.readlink() != model:
            raise ArtifactError(f"{link} leads to {link.readlink()}, not {model}; export again")
    for link in (path / SERVING).glob("*/*"):
        if link.name.isdigit() and link not in links:
            raise ArtifactError(
                f"TensorFlow Serving finds {link}, which is of no version in {path / MANIFEST}; "
                "export again"
            )


def _check_text(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; export again")
    if path.read_bytes() != expected.encode():
        raise ArtifactError(
            f"{path} does not say what there is in {VERSIONS}: it was changed; export again"
        )


def _check_copy(folder: Path, place: Path) -> None:
    """Checks a SavedModel that was copied from its version, as a copy that follows links has it."""
    version = Artifact.peek(folder / VERSIONS / place.name, KIND)
    model = f"{SERVING}/{place.parent.name}/"
    for name, entry in version.files.items():
        if name.startswith(model):
            check_file(place / name.removeprefix(model), entry)


def _described(folder: Path, version: int, kept: Sequence[int]) -> dict[str, Any]:
    """What ``manifest.json`` says."""
    found = Artifact.peek(folder / VERSIONS / str(version), KIND)
    return {
        **Bundle(folder, version, found).content,
        "format": FORMAT,
        "kind": KIND,
        "version": version,
        "versions": {str(n): f"{VERSIONS}/{n}" for n in kept},
        "manifests": {str(n): file_digest(folder / VERSIONS / str(n) / MANIFEST) for n in kept},
        "created": found.created,
        "tfrec_version": found.tfrec_version,
        "digest": found.digest,
        "lineage": dict(found.parents),
        "metrics": dict(found.metrics),
        "files": {f"{VERSIONS}/{version}/{n}": dict(e) for n, e in found.files.items()},
    }


@contextlib.contextmanager
def _linked(folder: Path, numbers: Sequence[int]) -> Iterator[None]:
    """Gives every TensorFlow Serving model a folder of these versions, and lists the models.

    A server runs the highest version that it finds: so if the block fails, what is new goes again.
    """
    new: list[Path] = []
    try:
        for link, model in _links(folder, numbers).items():
            if link.is_symlink():
                continue
            link.parent.mkdir(parents=True, exist_ok=True)
            if link.is_dir():  # a copy that followed the links
                shutil.rmtree(link)
            else:
                new.append(link)
            link.symlink_to(model)
        _list_models(folder, numbers)
        yield
    except BaseException:
        for link in new:
            link.unlink(missing_ok=True)
        with contextlib.suppress(OSError, SetupError):  # what went wrong first is told
            _unlink(folder, [n for n in numbers if str(n) not in {link.name for link in new}])
        raise


def _unlink(folder: Path, kept: Sequence[int]) -> None:
    """Takes away from TensorFlow Serving what is of no version that is kept."""
    links = _links(folder, kept)
    _list_models(folder, kept)
    for link in (folder / SERVING).glob("*/*"):
        if link.name.isdigit() and link not in links:
            shutil.rmtree(link) if not link.is_symlink() else link.unlink()
    places = {link.parent for link in links}
    for place in (folder / SERVING).glob("*/"):
        if place not in places:
            shutil.rmtree(place)
    if not links:
        shutil.rmtree(folder / SERVING, ignore_errors=True)


def _links(folder: Path, numbers: Sequence[int]) -> dict[Path, Path]:
    """The link to each SavedModel of some versions -> what it says."""
    return {
        folder / SERVING / model.name / str(number): Path(
            "..", "..", VERSIONS, str(number), SERVING, model.name
        )
        for number in numbers
        for model in sorted((folder / VERSIONS / str(number) / SERVING).glob("[!.]*"))
    }


def _list_models(folder: Path, numbers: Sequence[int]) -> None:
    """Writes what TensorFlow Serving reads, where it is not there already."""
    texts = _configs(folder, numbers)
    for name, text in texts.items():
        path = folder / SERVING / name
        if not path.is_file() or path.read_bytes() != text.encode():
            write_text(path, text)
    if _ALL_MODELS not in texts:
        (folder / SERVING / _ALL_MODELS).unlink(missing_ok=True)


def _configs(folder: Path, numbers: Sequence[int]) -> dict[str, str]:
    """File -> what it says, for the models of some versions: those that a server runs as it is
    released, all of them, and how requests are put together."""
    names: set[str] = set()
    special: set[str] = set()
    for number in numbers:
        place = folder / VERSIONS / str(number)
        told = Bundle(folder, number, Artifact.peek(place, KIND)).content.get("models", {})
        for model in (place / SERVING).glob("[!.]*"):
            names.add(model.name)
            needs = told.get(f"{SERVING}/{model.name}", {}).get("needs", ())
            special |= {model.name} if set(needs) - set(LINKED) else set()
    if not names:
        return {}
    texts = {"models.config": _models_config(names - special), "batching.config": _BATCHING}
    return texts | ({_ALL_MODELS: _models_config(names)} if special else {})


def _models_config(names: Iterable[str]) -> str:
    """What TensorFlow Serving reads as --model_config_file, the bundle being at /models there."""
    each = "".join(
        f'  config {{\n    name: "{name}"\n    base_path: "/models/{SERVING}/{name}"\n'
        '    model_platform: "tensorflow"\n  }\n'
        for name in sorted(names)
    )
    return f"model_config_list {{\n{each}}}\n"


def _newest(folder: Path) -> int:
    if not folder.is_dir():
        raise ArtifactError(f"there is no bundle at {folder}; make one with `tfrec export`")
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is unfinished or no bundle")
    try:
        found = json.loads(path.read_text("utf-8"))
        told, number = found["format"], found["version"]
    except (ValueError, KeyError, TypeError):
        raise ArtifactError(f"{path} is damaged: it is not the JSON of a bundle") from None
    if told not in _READ:
        raise ArtifactError(
            f"{folder} has bundle format {told}, and this tfrec {tfrec.__version__} reads formats "
            f"{' and '.join(map(str, _READ))}; take the tfrec that wrote it, or export again"
        )
    if found.get("kind") != KIND or not isinstance(number, int):
        raise ArtifactError(f"{path} is damaged: it is not the JSON of a bundle")
    return number


def save_rows(path: Path, array: NDArray[Any], int8: bool = False) -> None:
    """Writes an array as .npy; where many rows are the same, each once and which row is which.

    Args:
      path: Ends in ``.npy``.
      array: (n, ...).
      int8: Whether float32 (n, width) is rounded to int8 with a scale for each row.
    """
    rows, which = np.unique(array, axis=0, return_inverse=True)
    if len(rows) * 2 < len(array):
        np.save(path.with_suffix(".rows.npy"), which.reshape(-1).astype(np.int32))
        array = rows
    if int8:
        save_codes(path, *int8_rows(array))
    else:
        np.save(path, array, allow_pickle=False)


def load_rows(path: Path) -> NDArray[Any]:
    """Reads what :func:`save_rows` wrote; float32 where it rounded to int8.

    Raises:
      ArtifactError: a file is missing or damaged.
    """
    array: NDArray[Any] = _load_int8(path)[:] if holds_codes(path) else _load(path)
    which = path.with_suffix(".rows.npy")
    try:
        return array[_load(which)] if which.is_file() else array
    except IndexError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None


def load_vectors(path: Path) -> Vectors:
    """As :func:`load_rows`; many rows that were rounded to int8 stay that.

    Raises:
      ArtifactError: a file is missing or damaged.
    """
    if not holds_codes(path) or path.with_suffix(".rows.npy").is_file():
        return load_rows(path)
    rows = _load_int8(path)
    return rows if len(rows) > _MANY else rows[:]


def _load_int8(path: Path) -> Int8Rows:
    try:
        return Int8Rows(*load_codes(path))
    except InputError as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None


def save_codes(path: Path, codes: NDArray[np.int8], scales: NDArray[np.float32]) -> None:
    """Writes int8 codes as .npy in zstd beside where ``path`` would be, and their scales."""
    stream = io.BytesIO()
    np.save(stream, codes, allow_pickle=False)
    packed = pa.Codec("zstd", compression_level=_LEVEL).compress(stream.getvalue(), asbytes=True)
    path.with_suffix(_CODES).write_bytes(packed)
    np.save(path.with_suffix(_SCALES), scales, allow_pickle=False)


def holds_codes(path: Path) -> bool:
    """Whether :func:`save_codes` was given this path, and not an array of floats."""
    return path.with_suffix(_CODES).is_file()


def load_codes(path: Path) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Reads the codes and scales that :func:`save_codes` wrote.

    Raises:
      ArtifactError: a file is missing or damaged.
    """
    file = path.with_suffix(_CODES)
    try:
        with pa.input_stream(file, compression="zstd") as stream:
            codes: NDArray[Any] = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{file} cannot be read: {error}") from None
    scales = _load(path.with_suffix(_SCALES))
    if codes.dtype != np.int8 or codes.ndim != 2:
        raise ArtifactError(f"{file} cannot be read: it holds {codes.dtype} {codes.shape}")
    if scales.dtype != np.float32 or scales.ndim != 1 or not np.isfinite(scales).all():
        raise ArtifactError(f"{path.with_suffix(_SCALES)} cannot be read: it holds no scales")
    return codes, scales


def _load(path: Path) -> NDArray[Any]:
    try:
        array: NDArray[Any] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    return array
