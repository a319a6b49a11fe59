"""Pretrained encoders: what `pretrain` leaves, and how a TwoTower starts from one.

Items enter through their text and attributes, so an encoder that was pretrained on one catalog
works on another without a shared id: what both know by name is taken over, and the rest is new.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.artifact import Artifact
from tfrec.config import SEQUENCE_OBJECTIVES, SIZES, AdaptConfig, RetrievalConfig
from tfrec.data.dataset import Dataset
from tfrec.data.sequences import EventCoding
from tfrec.errors import ArtifactError, ConfigError, InputError
from tfrec.models import named
from tfrec.models.retrieval import TwoTower
from tfrec.models.text import TextEncoder

KIND = "encoder"
WEIGHTS, CARD, TEXT = "weights.safetensors", "card.json", "text"
_TEXT = {"name", "digest", "tokenizer", "width", "length", "trained"}
_CODING = {field.name for field in fields(EventCoding)}


@dataclass(frozen=True)
class EncoderCard:
    """What must be known to start from an encoder, and what people want to know; ``card.json``.

    Attributes:
      sizes: The settings :data:`tfrec.config.SIZES` it was made with.
      text: ``name`` of the BERT, its ``digest`` and ``tokenizer`` digest, ``width``, ``length`` in
        tokens, and whether it was ``trained`` too and is in the artifact; empty: no text was read.
      coding: How events became integers.
      features: Names of the items' attributes.
      user_features: Names of the users' attributes.
      catalog: Digest of the catalog.
      num_rows: Its rows.
      data: What it was pretrained on, in words and counts.
      objectives: Weight of each objective.
      losses: Loss of each at the end.
      seconds: Time the training took.
    """

    sizes: Mapping[str, Any]
    text: Mapping[str, Any]
    coding: EventCoding
    features: tuple[str, ...]
    user_features: tuple[str, ...]
    catalog: str
    num_rows: int
    data: Mapping[str, Any]
    objectives: Mapping[str, float]
    losses: Mapping[str, float]
    seconds: float

    def dump(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> EncoderCard:
        """Reads back what :meth:`dump` gave.

        Raises:
          ArtifactError: a part is missing or unknown, so another version wrote it.
        """
        parts = {field.name for field in fields(cls)}
        known = {"": parts, "sizes": {*SIZES}, "text": _TEXT, "coding": _CODING}
        for place, names in known.items():
            found = tree.get(place, {}) if place else tree
            if not found and place == "text":
                continue  # no text was read
            for name in sorted(names ^ found.keys()):
                told = f"{place}.{name}" if place else name
                raise ArtifactError(
                    f"the card of this encoder has {'an unknown' if name in found else 'no'} "
                    f"'{told}': another version of tfrec made it; pretrain it again"
                )
        lists = {name: tuple(tree[name]) for name in ("features", "user_features")}
        return cls(**{**tree, **lists, "coding": EventCoding.parse(tree["coding"])})


@dataclass(frozen=True)
class PretrainedEncoder:
    """An encoder that was read, ready to start a TwoTower.

    Attributes:
      path: Its folder.
      card: What it is.
      weights: Name -> values, of :func:`tfrec.models.named.named_variables`.
      digest: Of the artifact.
    """

    path: Path
    card: EncoderCard
    weights: Mapping[str, NDArray[Any]]
    digest: str = ""

    @classmethod
    def load(cls, artifact: Artifact | str | os.PathLike[str]) -> PretrainedEncoder:
        """Reads the artifact of `pretrain`, every byte checked.

        Raises:
          ArtifactError: it is missing, damaged, or none of `pretrain`'s.
        """
        folder = artifact.path if isinstance(artifact, Artifact) else artifact
        found = Artifact.load(folder, KIND)
        card = EncoderCard.parse(json.loads(found.file(CARD).read_text("utf-8")))
        return cls(found.path, card, named.read(found.file(WEIGHTS)), found.digest)

    def profiles(self, given: NDArray[np.float32]) -> NDArray[np.float32]:
        """float32 (users, text width) of (users, 0), if it learned to read texts about users."""
        if given.shape[1] or "query_tower.profile.kernel" not in self.weights:
            return given
        return np.zeros((len(given), self.card.text["width"]), np.float32)

    @property
    def text_folder(self) -> str:
        """Where the BERT is if it was trained too, else empty."""
        return str(self.path / TEXT) if self.card.text.get("trained") else ""

    def text_encoder(self) -> TextEncoder:
        """The BERT that it reads texts with.

        Raises:
          ArtifactError: the BERT of that name has other weights here.
          InputError: it reads no texts.
        """
        told = self.card.text
        if not told:
            raise InputError(f"the encoder {self.path} reads no texts: it was pretrained without")
        found = TextEncoder.load(self.text_folder or told["name"], length=told["length"])
        if found.digest() != told["digest"]:
            raise ArtifactError(
                f"the encoder {self.path} was pretrained with a BERT of digest "
                f"{told['digest'][:12]}, and '{told['name']}' has {found.digest()[:12]} here; put "
                "the old weights back"
            )
        return found

    def check(self, config: AdaptConfig, encoder: TextEncoder | None, dataset: Dataset) -> None:
        """Says why an adaptation cannot start from here.

        Args:
          config: Of the adaptation.
          encoder: The BERT that it reads texts with, or None.
          dataset: What it adapts to.

        Raises:
          ConfigError: sizes or the text encoder are others.
          InputError: the dataset gives nothing to read items by.
        """
        for name in SIZES:
            ours, theirs = getattr(config.retrieval, name), self.card.sizes[name]
            if ours != theirs:
                raise ConfigError(
                    f"the encoder {self.path} was pretrained with {name} = {theirs}, and "
                    f"adapt.retrieval.{name} is {ours}; give both the same"
                )
        known = self.card.catalog == dataset.catalog.digest(self.card.num_rows)
        if not self.card.text:
            if not known and not set(self.card.features) & set(dataset.catalog.schema.names):
                raise InputError(
                    f"the encoder {self.path} was pretrained without texts, on other items with "
                    "other attributes: there is nothing of it that this catalog could use"
                )
            return
        if encoder is None:
            raise InputError(
                f"the encoder {self.path} reads items by their text, and here adapt.text is "
                f"'{config.text}' and {dataset.catalog.num_items:,} items have no text to read"
            )
        if encoder.tokenizer.length != self.card.text["length"]:
            raise ConfigError(
                f"the encoder {self.path} was pretrained with adapt.text_length = "
                f"{self.card.text['length']}, and here it is {encoder.tokenizer.length}; give both "
                "the same"
            )
        if encoder.tokenizer.digest != self.card.text["tokenizer"]:
            raise ConfigError(
                f"the encoder {self.path} was pretrained with another tokenizer than that of "
                f"'{config.text}'; set adapt.text={self.card.text['name']}"
            )
        if encoder.digest() != self.card.text["digest"]:
            raise ConfigError(
                f"the encoder {self.path} was pretrained with the text model "
                f"'{self.card.text['name']}' ({self.card.text['digest'][:12]}), and adapt.text = "
                f"'{config.text}' has other weights; set adapt.text={self.card.text['name']}, or "
                "pretrain again"
            )

    def start(self, model: TwoTower, dataset: Dataset) -> tuple[str, ...]:
        """Gives a new TwoTower all that it can take over.

        Args:
          model: Of the sizes that :meth:`check` saw.
          dataset: What it is for.

        Returns:
          Names of the weights that were taken over as they are; others are new, at least in part.
        """
        same = self.card.catalog == dataset.catalog.digest(self.card.num_rows)
        theirs, ours = self.card, dataset
        rows = {
            "query_tower.tables.event": _by_name(
                ("", "?", *theirs.coding.event_names), ("", "?", *model.coding.event_names)
            ),
            "query_tower.attributes.kernel": _by_name(
                theirs.user_features, ours.users.schema.names
            ),
            "candidate_tower.attributes.kernel": _by_name(
                theirs.features, ours.catalog.schema.names
            ),
        }
        if not same:
            rows["candidate_tower.ids"] = []
        taken = []
        for name, variable in named.named_variables(model).items():
            source = self.weights.get(name)
            if source is None:
                continue
            value = variable.numpy()
            if name in rows:
                if not rows[name]:
                    continue
                for there, here in rows[name]:
                    # A table of types that are not told apart ends after the unknown one.
                    if there < len(source) and here < len(value):
                        value[here] = source[there]
            elif _by_place(name):
                part = tuple(
                    slice(min(a, b)) for a, b in zip(value.shape, source.shape, strict=True)
                )
                value[part] = source[part]
            elif value.shape == source.shape:
                value = source
            else:
                continue
            variable.assign(value)
            if value.shape == source.shape and np.array_equal(value, source):
                taken.append(name)
        return tuple(taken)


def contents(model: TwoTower, objectives: Collection[str]) -> dict[str, Any]:
    """The variables of a TwoTower that an encoder keeps: what was trained, but for the BERT."""
    trained = set(objectives) & set(SEQUENCE_OBJECTIVES)
    left: tuple[str, ...] = ("encoder.",)
    if trained <= {"contrastive", "vae"}:  # they know of no user but his events
        left += ("query_tower.profile.", "query_tower.attributes.")
    if trained <= {"vae"}:
        left += ("query_tower.",)
    if not trained:
        left += ("candidate_tower.",)
    variables = named.named_variables(model)
    return {name: v for name, v in variables.items() if not name.startswith(left)}


def sizes_of(config: RetrievalConfig) -> dict[str, Any]:
    """The :data:`tfrec.config.SIZES` of a configuration."""
    return {name: getattr(config, name) for name in SIZES}


def text_of(encoder: TextEncoder | None, name: str, trained: bool) -> dict[str, Any]:
    """What a card says of the BERT."""
    if encoder is None:
        return {}
    return {
        "name": name,
        "digest": encoder.digest(),
        "tokenizer": encoder.tokenizer.digest,
        "width": encoder.width,
        "length": encoder.tokenizer.length,
        "trained": trained,
    }


def _by_name(theirs: Sequence[str], ours: Sequence[str]) -> list[tuple[int, int]]:
    """Places of the names that both know."""
    place = {name: row for row, name in enumerate(theirs)}
    return [(place[name], row) for row, name in enumerate(ours) if name in place]


def _by_place(name: str) -> bool:
    """Whether a weight has a part for each row or place, of which the first are taken over."""
    *_, owner, last = name.split(".")
    distance = last == "bias" and owner.isdigit()  # of a block itself, and not of a layer in it
    return distance or last in ("ids", "position")
