"""inspect: says in plain lines what an artifact is, and checks every byte of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tfrec.artifact import MANIFEST, Artifact
from tfrec.config import Config
from tfrec.errors import ArtifactError

_ABSENT = object()


def describe(folder: Path) -> Iterator[str]:
    """Yields lines about the artifact at ``folder``, or about each artifact below it.

    Every file is read and compared with its digest.

    Raises:
      ArtifactError: there is none, one is unfinished or of another version, or bytes changed.
    """
    folder = Path(folder)
    patterns = (MANIFEST, f"[!.]*/{MANIFEST}", f"[!.]*/[!.]*/{MANIFEST}")
    below = sorted({found.parent for pattern in patterns for found in folder.glob(pattern)})
    if not below:
        Artifact.peek(folder)
        raise ArtifactError(f"{folder} holds no artifact")
    for number, one in enumerate(below):
        if number:
            yield ""
        yield from _lines(Artifact.load(one))


def _lines(artifact: Artifact) -> Iterator[str]:
    yield f"{artifact.path}: {artifact.kind}"
    yield f"  created  {artifact.created} by tfrec {artifact.tfrec_version}"
    yield f"  digest   {artifact.digest}"
    for role, digest in sorted(artifact.parents.items()):
        yield f"  parent   {role} {digest}"
    yield from _table("metrics", _flat(artifact.metrics))
    settings = {key: artifact.config[key] for key in artifact.config if key in Config.model_fields}
    others = {key: artifact.config[key] for key in artifact.config if key not in settings}
    yield from _table("settings that are not the defaults", _changed(settings))
    yield from _table("made from", _flat(others))
    total = sum(entry["bytes"] for entry in artifact.files.values())
    yield f"  files    {len(artifact.files)}, {_size(total)}, every digest matches"
    for name, entry in sorted(artifact.files.items()):
        yield f"    {_size(entry['bytes']):>9}  {name}"


def _table(title: str, values: Mapping[str, Any]) -> Iterator[str]:
    if not values:
        return
    yield f"  {title}"
    width = max(len(key) for key in values)
    for key, value in values.items():
        shown = f"{value:.6g}" if isinstance(value, float) else value
        yield f"    {key:<{width}}  {shown}"


def _changed(settings: Mapping[str, Any]) -> dict[str, Any]:
    defaults = _flat(Config().dump())
    # A recipe holds None for a setting that does not touch the stage.
    return {
        key: value
        for key, value in _flat(settings).items()
        if value is not None and defaults.get(key, _ABSENT) != value
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
