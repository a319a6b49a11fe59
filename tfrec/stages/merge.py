"""merge: an adapted two-tower in, the same one out, which needs no base any more.

The changes of ``lora`` are folded into the kernels, and the BERT is written beside the weights as a
Hugging Face folder. Adapters and prompts are no part of a plain BERT: with them the base is written
once, and each cut keeps its difference to it.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from tfrec.artifact import MANIFEST, Artifact, write_json, writing
from tfrec.errors import InputError
from tfrec.models.engine import (
    APART,
    MERGED,
    WEIGHTS,
    load_text,
    merged_config,
    read_json,
    restore_two_tower,
)
from tfrec.models.named import named_variables, save
from tfrec.models.tuning import difference, merge


def run(source: str | os.PathLike[str], out: str | os.PathLike[str]) -> Artifact:
    """Writes a retrieval artifact that is complete in itself.

    Args:
      source: A run's folder, or a retrieval artifact's.
      out: Where the new artifact comes. It can take the place of the old one in its run: the
        ranker made beside that one takes it for the same.

    Returns:
      A retrieval artifact whose vectors are those of the old one.

    Raises:
      ArtifactError: there is no retrieval artifact, it is damaged, or its base is another one.
      InputError: there is something else at ``out``.
    """
    folder, out = _retrieval(Path(source)), Path(out)
    found = Artifact.load(folder, "retrieval")
    if out.resolve() == folder.resolve() or (out.exists() and not (out / MANIFEST).is_file()):
        raise InputError(f"{out} is there already; name a folder that is not, or an old artifact")
    card = read_json(found.file("model.json"))
    config = merged_config(found)
    parents = {**found.parents, MERGED: found.digest}
    with writing(out, kind="retrieval", config=config, parents=parents) as draft:
        draft.metrics |= found.metrics
        for name in found.files.keys() - {f"{cut}/{WEIGHTS}" for cut in card["cuts"]}:
            (draft.path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.file(name), draft.path / name)
        for cut in card["cuts"]:
            _write(found, cut, card, draft.path)
        write_json(draft.path / "model.json", {**card, "text_digest": ""})
    return Artifact.peek(out, "retrieval")


def _retrieval(folder: Path) -> Path:
    inside = folder / "adapt" / "retrieval"
    return inside if inside.is_dir() else folder


def _write(found: Artifact, cut: str, card: dict[str, Any], folder: Path) -> None:
    """Weights of a cut, all of them, and its BERT, or the one that all cuts share."""
    features = np.zeros((card["num_rows"], card["attributes_width"]), np.float32)
    model, _ = restore_two_tower(found, cut, features)
    merge(model)
    weights = named_variables(model)
    plain = found.config["adapt"]["tuning"]["text"] not in APART
    if model.encoder is not None:
        moving = {} if plain else difference(model)
        in_bert = {id(v) for v in named_variables(model.encoder).values()}
        weights = {n: v for n, v in weights.items() if id(v) not in in_bert or n in moving}
    save(folder / cut / WEIGHTS, weights)
    if model.encoder is not None and plain:
        model.encoder.save(folder / cut / "text")
    elif card["text_digest"] and not (folder / "text").exists():
        load_text(found, cut).save(folder / "text")
