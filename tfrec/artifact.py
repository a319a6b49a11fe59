"""Artifact: what a stage leaves on disk, and the only thing that stages hand to each other.

A folder with a payload and a ``manifest.json``. The manifest is written last and holds the
SHA-256 of every file, so a folder without one is unfinished and a changed byte is found. The
folder appears under its name in one rename; whatever was there before stays until then.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import tfrec
from tfrec.errors import ArtifactError, SetupError

FORMAT = 1
MANIFEST = "manifest.json"

_TYPES = {
    "format": int,
    "kind": str,
    "config": dict,
    "parents": dict,
    "metrics": dict,
    "files": dict,
    "digest": str,
    "created": str,
    "tfrec_version": str,
}


@dataclass(frozen=True)
class Artifact:
    """A finished folder of one ``kind``.

    Attributes:
      path: The folder.
      kind: What it is: ``dataset``, ``retrieval``, ``ranking``, ``report``, ``tune``.
      config: The plain configuration values it was made with.
      parents: Role -> digest of the artifacts it was made from.
      metrics: Numbers worth knowing about it.
      files: Path inside the folder -> ``{"sha256": str, "bytes": int}``.
      digest: SHA-256 over kind, config, parents and files: equal content, equal digest.
    """

    path: Path
    kind: str
    config: Mapping[str, Any]
    parents: Mapping[str, str]
    metrics: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    digest: str
    created: str = ""
    tfrec_version: str = ""

    @classmethod
    def load(cls, path: str | os.PathLike[str], kind: str | None = None) -> Artifact:
        """Reads the manifest and checks the digest of every file.

        Raises:
          ArtifactError: there is no finished artifact of this kind, or a file was changed.
        """
        found = cls.peek(path, kind)
        found.check()
        return found

    def check(self, without: tuple[str, ...] = ()) -> None:
        """Checks the digest of every file, or of those whose names begin otherwise.

        Raises:
          ArtifactError: a file is missing or was changed.
        """
        for name, entry in self.files.items():
            if not name.startswith(without):
                check_file(self.path / name, entry)

    @classmethod
    def peek(cls, path: str | os.PathLike[str], kind: str | None = None) -> Artifact:
        """Reads the manifest alone, without looking at the payload.

        Raises:
          ArtifactError: there is no finished artifact of this kind, or its manifest is damaged.
        """
        folder = Path(path)
        _put_back(folder.parent)
        manifest = _read_manifest(folder)
        if kind is not None and manifest["kind"] != kind:
            raise ArtifactError(f"{folder} is a {manifest['kind']} artifact, not a {kind}")
        found = cls(
            path=folder,
            kind=manifest["kind"],
            config=manifest["config"],
            parents=manifest["parents"],
            metrics=manifest["metrics"],
            files=manifest["files"],
            digest=manifest["digest"],
            created=manifest["created"],
            tfrec_version=manifest["tfrec_version"],
        )
        expected = content_digest(found.kind, found.config, found.parents, found.files)
        if found.digest != expected:
            raise ArtifactError(f"{folder / MANIFEST} was changed after it was written")
        return found

    def file(self, name: str) -> Path:
        """Path of a payload file.

        Raises:
          ArtifactError: the artifact has no such file.
        """
        if name not in self.files:
            raise ArtifactError(f"the {self.kind} artifact {self.path} has no file '{name}'")
        return self.path / name


@dataclass
class Draft:
    """An artifact being written: put files under ``path``, numbers into ``metrics``."""

    path: Path
    metrics: dict[str, Any] = field(default_factory=dict)


@contextlib.contextmanager
def writing(
    path: str | os.PathLike[str],
    *,
    kind: str,
    config: Mapping[str, Any],
    parents: Mapping[str, Artifact | str] | None = None,
) -> Iterator[Draft]:
    """Opens a draft that becomes the artifact at ``path`` when the block ends without error.

    Args:
      path: Where it will be.
      kind: See :class:`Artifact`.
      config: See :class:`Artifact`.
      parents: Role -> what it is made from, or the digest of that.

    Raises:
      SetupError: another process is writing it, or the disk is full or cannot be written.
    """
    final = Path(path)
    partial = final.with_name(f".{final.name}.partial")
    with disk_errors(final), _claimed(partial, final):
        try:
            draft = Draft(partial)
            yield draft
            _write_manifest(partial, kind, config, _lineage(parents), draft.metrics)
            _swap(partial, final)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def below(folder: str | os.PathLike[str], levels: int = 3) -> list[Path]:
    """Folders of the finished artifacts at ``folder`` or at most so many levels below, sorted.

    Hidden folders, which hold drafts, are left out.
    """
    folder = Path(folder)
    _put_back(folder.parent)
    _put_back(folder)
    if (folder / MANIFEST).is_file():
        return [folder]
    inner = sorted(path for path in folder.glob("[!.]*") if path.is_dir()) if levels else []
    return [found for path in inner for found in below(path, levels - 1)]


def content_digest(
    kind: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    files: Mapping[str, Mapping[str, Any]],
) -> str:
    """SHA-256 of what an artifact is made from and holds, as hex."""
    content = {"kind": kind, "config": config, "parents": parents, "files": files}
    return value_digest(content)


def recipe_digest(
    kind: str,
    config: Mapping[str, Any],
    parents: Mapping[str, Artifact | str] | None = None,
) -> str:
    """SHA-256 of what an artifact is to be made from: equal recipe, no need to make it again."""
    content = {"kind": kind, "config": config, "parents": _lineage(parents)}
    return value_digest(content)


def current(
    path: str | os.PathLike[str],
    *,
    kind: str,
    config: Mapping[str, Any],
    parents: Mapping[str, Artifact | str] | None = None,
) -> Artifact | None:
    """The finished artifact at ``path`` if it was made by this very recipe, else None."""
    try:
        found = Artifact.load(path, kind)
    except ArtifactError:
        return None
    same = _canonical(dict(found.config)) == _canonical(dict(config))
    return found if same and dict(found.parents) == _lineage(parents) else None


def _lineage(parents: Mapping[str, Artifact | str] | None) -> dict[str, str]:
    """Role -> digest."""
    return {
        role: parent if isinstance(parent, str) else parent.digest
        for role, parent in (parents or {}).items()
    }


def value_digest(value: Any) -> str:
    """SHA-256 of a JSON value, as hex: however it is laid out in a file."""
    return hashlib.sha256(_canonical(value)).hexdigest()


def file_digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, as hex."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write_json(path: str | os.PathLike[str], value: Any, *, private: bool = False) -> None:
    """Writes JSON so that the file is either the old one or the whole new one."""
    write_text(path, as_json(value), private=private)


def as_json(value: Any) -> str:
    """What :func:`write_json` writes."""
    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True, allow_nan=False)
    return f"{text}\n"


def write_text(path: str | os.PathLike[str], text: str, *, private: bool = False) -> None:
    """Writes UTF-8 text so that the file is either the old one or the whole new one.

    Args:
      path: Where it will be.
      text: What it will hold.
      private: Whether nobody but its owner may ever read it.

    Raises:
      SetupError: the disk is full or cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    with disk_errors(target):
        try:
            with open(partial, "w", encoding="utf-8", newline="") as stream:
                if private:
                    os.fchmod(stream.fileno(), 0o600)
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(partial, target)
        except BaseException:
            with contextlib.suppress(OSError):
                partial.unlink()
            raise


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _read_manifest(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise ArtifactError(f"there is no artifact at {folder}; run the stage that makes it first")
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}: it is unfinished or no artifact")
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError):
        manifest = None
    if not isinstance(manifest, dict):
        raise ArtifactError(f"{path} is damaged: it is not the JSON of an artifact")
    if (found := manifest.get("format", FORMAT)) != FORMAT:
        raise ArtifactError(
            f"{folder} has artifact format {found}, and this tfrec {tfrec.__version__} reads "
            f"format {FORMAT}; make it again with this version"
        )
    wrong = [key for key, kind in _TYPES.items() if not isinstance(manifest.get(key), kind)]
    if wrong or not _is_listing(manifest["files"]):
        what = ", ".join(wrong) or "files"
        raise ArtifactError(f"{path} is damaged: {what} is missing or not what it should be")
    return manifest


def _is_listing(files: Mapping[str, Any]) -> bool:
    """Whether every entry has the digest and the size of a file."""
    return all(
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        for entry in files.values()
    )


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Compares a file with its entry in :attr:`Artifact.files`.

    Raises:
      ArtifactError: it is missing or was changed.
    """
    if not path.is_file():
        raise ArtifactError(f"{path} is missing from its artifact; make the artifact again")
    size = path.stat().st_size
    if size != entry["bytes"]:
        raise ArtifactError(f"{path} has {size} bytes, not {entry['bytes']}: it was changed")
    if file_digest(path) != entry["sha256"]:
        raise ArtifactError(f"{path} does not match its digest: it was changed")


def _write_manifest(
    folder: Path,
    kind: str,
    config: Mapping[str, Any],
    parents: Mapping[str, str],
    metrics: Mapping[str, Any],
) -> None:
    files = {
        str(path.relative_to(folder)): {"sha256": file_digest(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    manifest = {
        "format": FORMAT,
        "kind": kind,
        "tfrec_version": tfrec.__version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "config": dict(config),
        "parents": dict(parents),
        "metrics": dict(metrics),
        "files": files,
        "digest": content_digest(kind, config, parents, files),
    }
    write_json(folder / MANIFEST, manifest)


@contextlib.contextmanager
def _claimed(partial: Path, final: Path) -> Iterator[None]:
    """An empty draft folder that no other process takes away; what a kill left there is removed.

    The claim is a lock on the folder itself, which ends with the process however it ends.
    """
    partial.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileNotFoundError), locked(partial, final):
        shutil.rmtree(partial)
    with contextlib.suppress(FileExistsError):
        partial.mkdir()
    with locked(partial, final):
        yield


@contextlib.contextmanager
def locked(partial: Path, final: Path) -> Iterator[None]:
    """A draft folder that no other process may work in; the lock ends with the process.

    Raises:
      SetupError: another one is making ``final``.
    """
    opened = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(opened)
        raise SetupError(
            f"another tfrec process is making {final}; wait for it, stop it, or name another folder"
        ) from None
    except OSError:
        pass  # a file system without locks
    try:
        yield
    finally:
        os.close(opened)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Within the block no other thread or process is in such a block of this folder; they wait.

    Args:
      folder: Made if it is not there.

    Raises:
      SetupError: the disk is full or cannot be written.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        os.close(opened)


def _swap(partial: Path, final: Path) -> None:
    """Puts the draft in the place of what is there; a kill leaves one of the two to be found."""
    _put_back(final.parent)
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        os.rename(final, old)
    try:
        os.rename(partial, final)
    except OSError:
        if not final.exists():
            raise
        _swap(partial, final)  # a reader took this for a kill and put the old one back
    shutil.rmtree(old, ignore_errors=True)


def _put_back(parent: Path) -> None:
    """Gives the old artifacts in ``parent`` their names back, where a kill hit a swap halfway."""
    for manifest in parent.glob(f".*.old/{MANIFEST}"):
        old = manifest.parent
        final = parent / old.name[1 : -len(".old")]
        if final.exists():
            continue
        with contextlib.suppress(ArtifactError, OSError):
            _read_manifest(old)  # else it is not ours
            # May fail: another process was faster, or this is read-only and stays as it is.
            os.rename(old, final)


@contextlib.contextmanager
def disk_errors(path: Path, remedy: str = "free some, or take another --out") -> Iterator[None]:
    """Turns a full or unwritable disk into a SetupError that names ``path``.

    Args:
      path: What is written.
      remedy: What to do when the disk is full.
    """
    try:
        yield
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        # NumPy, TensorFlow and ScaNN give no number: they tell it in words alone.
        words = os.strerror(errno.ENOSPC), " requested and "
        if number in (errno.ENOSPC, errno.EDQUOT) or any(word in str(error) for word in words):
            raise SetupError(f"no space left on the disk while writing {path}; {remedy}") from None
        if number in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise SetupError(f"{path} cannot be written: {os.strerror(number)}") from None
        raise
