"""inspect: says in plain lines what an artifact is, and checks every byte of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tfrec.artifact import Artifact, below
from tfrec.bundle import VERSIONS, is_bundle
from tfrec.config import Config
from tfrec.errors import ArtifactError


def describe(folder: Path) -> Iterator[str]:
    """Yields lines about the artifact at ``folder``, or about each artifact below it.

    Every file is read and compared with its digest.

    Raises:
      ArtifactError: there is none, one is unfinished or of another version, or bytes changed.
    """
    folder = Path(folder)
    # A bundle's own manifest.json says which of the artifacts below is the newest.
    found = below(folder / VERSIONS) if is_bundle(folder) else below(folder)
    if not found:
        Artifact.peek(folder)
        raise ArtifactError(f"{folder} holds no artifact")
    oldest_first = sorted(found, key=lambda path: (Artifact.peek(path).created, path))
    for number, path in enumerate(oldest_first):
        if number:
            yield ""
        yield from _lines(Artifact.load(path))


def _lines(artifact: Artifact) -> Iterator[str]:
    yield f"{artifact.path}: {artifact.kind}"
    yield f"  created  {artifact.created} by tfrec {artifact.tfrec_version}"
    yield f"  digest   {artifact.digest}"
    for role, digest in sorted(artifact.parents.items()):
        yield f"  parent   {role} {digest}"
    yield from _table("metrics", _flat(artifact.metrics))
    settings, others = _settings(artifact.config)
    yield from _table("settings that are not the defaults", settings)
    yield from _table("made from", others)
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
        if value == {}:
            continue
        yield f"    {key:<{width}}  {shown}"


def _settings(recipe: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of a recipe that are not the defaults, and what is no setting at all."""
    defaults = _flat(Config().dump())
    changed, others = {}, {}
    for key, value in _flat(recipe).items():
        known = _known(key, defaults)
        if known is None:
            others[key] = value
        # A recipe holds None for a setting that does not touch the stage.
        elif value is not None and value != defaults.get(known):
            changed[known] = value
    return changed, others


def _known(key: str, settings: Mapping[str, Any]) -> str | None:
    """The setting that a recipe's key names; a recipe may leave out the outer sections."""
    for known, value in settings.items():
        if known == key or known.endswith(f".{key}"):
            return known
        inner = key.rpartition(".")[0]
        if value == {} and inner and (known == inner or known.endswith(f".{inner}")):
            return known.removesuffix(inner) + key
    return None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
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
