"""export: a finished run in, a new version of a bundle out, which needs nothing of the run."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfrec import bundle
from tfrec.artifact import MANIFEST, Artifact, alone, current, write_json, writing
from tfrec.bundle import CONTENT, KIND, VERSIONS, Bundle
from tfrec.config import recommend_section
from tfrec.errors import ArtifactError, InputError
from tfrec.models import bundling
from tfrec.models.engine import load_recommender


def run(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    users: bool = True,
    int8: bool = True,
    saved_models: bool = True,
    keep: int = 3,
) -> Artifact:
    """Writes a new version of a bundle, unless the newest was made from just this.

    Args:
      folder: The run's folder.
      out: The bundle's folder; made if it is not there.
      users: Whether the known users and their histories are part of it.
      int8: Whether the weights of text encoder and ranker, vectors and linear model are int8; else
        float32.
      saved_models: Whether SavedModels for TensorFlow Serving are part of it.
      keep: How many versions are kept, this one counted.

    Returns:
      The version, which is the bundle's newest.

    Raises:
      ArtifactError: the run is missing or unfinished, or the bundle is damaged or of a newer tfrec.
      InputError: ``out`` is something else, ``keep`` is below 1, or weights are not finite.
      SetupError: the disk is full or cannot be written.
    """
    if keep < 1:
        raise InputError(f"--keep is at least 1, and got {keep}: the new version is always kept")
    source, path = Path(folder), bundle.writable(out)
    parents = _parents(source)
    told = recommend_section(source)
    said = {"users": users, "int8": int8, "saved_models": saved_models}
    recipe = {"export": said, "recommend": told.model_dump()}
    # One at a time: which number comes next must still be so when the version is there.
    with alone(path):
        made = _made(source, path, parents, recipe)
        bundle.publish(path, int(made.path.name), keep)
    if not users:
        _warn(path)
    return made


def _made(
    source: Path, path: Path, parents: Mapping[str, Artifact], recipe: Mapping[str, Any]
) -> Artifact:
    """The version that this recipe makes: the newest, if that was made by it, or else a new one."""
    numbers = bundle.versions(path)
    if numbers:
        newest = path / VERSIONS / str(numbers[-1])
        same = current(newest, kind=KIND, config=recipe, parents=parents)
        if same is not None:
            return same
    said = recipe["export"]
    recommender = load_recommender(source)
    bundling.check_finite(recommender, source)
    recommender = recommender if said["users"] else bundling.without_users(recommender)
    place = path / VERSIONS / str(max(numbers, default=0) + 1)
    with writing(place, kind=KIND, config=recipe, parents=parents) as draft:
        content = bundling.write(
            recommender,
            str(parents["retrieval"].config["adapt"]["text"]),
            draft.path,
            int8=said["int8"],
            saved_models=said["saved_models"],
        )
        write_json(draft.path / CONTENT, {**content, "recommend": recipe["recommend"]})
        _tell_licence(content["weights"])
        draft.metrics |= {role: _numbers(parent.metrics) for role, parent in parents.items()}
        draft.metrics |= _numbers({"compress": _trial(source, parents["retrieval"])})
    return Artifact.peek(place, KIND)


def _numbers(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers in a tree of metrics, where they are in it."""
    inner = {name: _numbers(value) for name, value in tree.items() if isinstance(value, Mapping)}
    plain = {name: value for name, value in tree.items() if isinstance(value, int | float)}
    return plain | {name: numbers for name, numbers in inner.items() if numbers}


def _trial(source: Path, retrieval: Artifact) -> dict[str, Any]:
    """What `compress` measured of a run that it made; empty where there is no report on it."""
    try:
        report = Artifact.load(source.resolve().parent / "report", "compression")
    except ArtifactError:
        return {}
    of_this = report.parents.get("retrieval") == retrieval.parents.get("source")
    if not of_this or report.created < retrieval.created:
        return {}
    told = json.loads(report.file("compress.json").read_text("utf-8"))["models"]
    for model in told:
        if model["key"] == source.resolve().name:
            means = {
                part: {name: estimate["mean"] for name, estimate in model[part].items()}
                for part in ("metrics", "kept")
            }
            fit = ("loss", "cosine", "cosine_min", "neighbours", "sizes", "times")
            return {**means["metrics"], "kept": means["kept"]} | {
                name: model[name] for name in fit if name in model
            }
    return {}


def _tell_licence(weights: Mapping[str, Any] | None) -> None:
    """Says it where those who are given the bundle cannot read under which licence."""
    if weights is not None and not (weights["licence"] and weights["files"]):
        told = f"is {weights['licence']}" if weights["licence"] else "is not known here"
        text = "" if weights["files"] else ", and no text of it was found that could come along"
        print(
            f"tfrec: the licence of the weights '{weights['name']}' {told}{text}", file=sys.stderr
        )


def _warn(path: Path) -> None:
    """Says which older versions still hold users."""
    older = [n for n in bundle.versions(path) if Bundle.load(path, n, check=False).content["users"]]
    if older:
        print(
            f"tfrec: {path} still holds the users of version {', '.join(map(str, older))}; "
            "--keep 1 removes it",
            file=sys.stderr,
        )


def _parents(source: Path) -> dict[str, Artifact]:
    parents = {
        "dataset": Artifact.peek(source / "prepare", "dataset"),
        "retrieval": Artifact.peek(source / "adapt" / "retrieval", "retrieval"),
    }
    ranking = source / "adapt" / "ranking"
    if (ranking / MANIFEST).is_file():
        parents["ranking"] = Artifact.peek(ranking, "ranking")
    return parents
