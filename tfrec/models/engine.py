"""The TensorFlow engine, and how a trained run becomes a Recommender."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.artifact import MANIFEST, Artifact
from tfrec.config import AdaptConfig, RankingConfig
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID, Interactions
from tfrec.data.sequences import EventCoding, Histories
from tfrec.errors import ArtifactError
from tfrec.models.keras_bridge import tf
from tfrec.models.ranking import Ranker
from tfrec.models.retrieval import TwoTower
from tfrec.models.text import TextEncoder
from tfrec.recommender import SCALARS, Floats, LinearItems, Policy, Recommender, Rows

CUTS: Mapping[str, tuple[int, ...]] = {
    "select": (TRAIN,),
    "test": (TRAIN, VALID),
    "final": (TRAIN, VALID, TEST),
}
"""What the weights of each cut were trained on."""


@dataclass(frozen=True)
class RetrievalCard:
    """What is needed to build a trained TwoTower again; ``model.json`` of its artifact.

    Attributes:
      text_width: Width of the text vectors; 0: no text.
      attributes_width: Width of the items' attributes.
      profile_width: Width of the users' profile vectors; 0: no profiles.
      user_attributes_width: Width of the users' attributes.
      num_rows: Rows of the catalog it was trained on.
      coding: How events become integers.
      cuts: The cuts that there are weights of.
    """

    text_width: int
    attributes_width: int
    profile_width: int
    user_attributes_width: int
    num_rows: int
    coding: EventCoding
    cuts: tuple[str, ...]

    def dump(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> RetrievalCard:
        """Reads back what :meth:`dump` gave."""
        coding = EventCoding(
            **{**tree["coding"], "event_names": tuple(tree["coding"]["event_names"])}
        )
        return cls(**{**tree, "coding": coding, "cuts": tuple(tree["cuts"])})


class TensorFlowEngine:
    """The models of a trained run, in this process.

    Args:
      two_tower: The retrieval model.
      ranker: The ranker, or None.
      adapt: The configuration, which names the text encoder.
    """

    def __init__(self, two_tower: TwoTower, ranker: Ranker | None, adapt: AdaptConfig) -> None:
        self.two_tower, self.ranker, self.adapt = two_tower, ranker, adapt
        self._rank = tf.function(self._ranked, reduce_retracing=True) if ranker else None

    @functools.cached_property
    def _encoder(self) -> TextEncoder:
        if self.two_tower.encoder is not None:
            encoder: TextEncoder = self.two_tower.encoder
            return encoder
        return TextEncoder.load(self.adapt.text, length=self.adapt.text_length, trainable=False)

    def encode_text(self, texts: Sequence[str], query: bool = False) -> Floats:
        """See :class:`tfrec.recommender.Engine`."""
        return self._encoder.encode(texts, role="query" if query else "passage")

    def encode_candidate(self, text: Floats, attributes: Floats, rows: Rows) -> Floats:
        """See :class:`tfrec.recommender.Engine`."""
        return self.two_tower.encode_candidate(text, attributes, rows)

    def encode_query(
        self,
        histories: Histories,
        vectors: Floats,
        profile: Floats,
        attributes: Floats,
        request_time: NDArray[np.int64] | None = None,
    ) -> Floats:
        """See :class:`tfrec.recommender.Engine`."""
        return self.two_tower.encode_query(histories, vectors, profile, attributes, request_time)

    def rank(self, inputs: Mapping[str, Floats]) -> dict[str, Floats]:
        """See :class:`tfrec.recommender.Engine`."""
        if self._rank is None:
            return {}
        out = self._rank({name: tf.constant(value) for name, value in inputs.items()})
        return {task: value.numpy() for task, value in out.items()}

    def _ranked(self, inputs: Mapping[str, Any]) -> Any:
        assert self.ranker is not None
        return self.ranker(inputs, training=False)


def cut_of(interactions: Interactions, cut: str) -> Interactions:
    """The events that a cut's weights were trained on."""
    return interactions.part(*CUTS[cut])


def load_two_tower(artifact: Artifact, dataset: Dataset, cut: str) -> tuple[TwoTower, Floats]:
    """A trained TwoTower and its catalog's text vectors, float32 (n + 1, text width).

    Raises:
      ArtifactError: there are no weights of this cut.
    """
    config = AdaptConfig.model_validate(artifact.config["adapt"])
    card = RetrievalCard.parse(read_json(artifact.file("model.json")))
    if cut not in card.cuts:
        raise ArtifactError(f"{artifact.path} has no weights of '{cut}', only {card.cuts}")
    text = read_text(artifact, cut)
    encoder = None
    if config.text_mode == "full" and card.text_width:
        encoder = TextEncoder.load(config.text, length=config.text_length)
    model = TwoTower(
        config.retrieval,
        text,
        dataset.catalog.features,
        card.coding,
        card.profile_width,
        card.user_attributes_width,
        encoder=encoder,
    )
    tf.train.Checkpoint(model=model).read(str(artifact.path / cut / "weights")).expect_partial()
    return model, text


def read_text(retrieval: Artifact, cut: str) -> Floats:
    """float32 (n + 1, text width), the catalog's text vectors as a retrieval's cut reads them."""
    own = f"{cut}/text.npy"
    return read_array(retrieval.file(own if own in retrieval.files else "text.npy"))


def load_recommender(run_dir: str | os.PathLike[str], cut: str = "final") -> Recommender:
    """The recommender of a run: retrieval and, where it was adapted, ranking.

    Args:
      run_dir: The run's folder.
      cut: ``select``, ``test`` or ``final``; where a run was not refitted, ``select`` serves all.

    Raises:
      ArtifactError: an artifact is missing or damaged, or the ranker belongs to another retrieval.
    """
    folder = Path(run_dir)
    parent = Artifact.load(folder / "prepare", "dataset")
    dataset = Dataset.load(parent)
    retrieval = Artifact.load(folder / "adapt" / "retrieval", "retrieval")
    _belongs(retrieval, "dataset", parent)
    ranking_folder = folder / "adapt" / "ranking"
    ranking = None
    if (ranking_folder / MANIFEST).exists():
        ranking = Artifact.load(ranking_folder, "ranking")
        _belongs(ranking, "retrieval", retrieval)
    return recommender_of(dataset, retrieval, ranking, cut)


def recommender_of(
    dataset: Dataset, retrieval: Artifact, ranking: Artifact | None, cut: str
) -> Recommender:
    """Puts artifacts that were read and belong together into a Recommender."""
    adapt = AdaptConfig.model_validate(retrieval.config["adapt"])
    card = RetrievalCard.parse(read_json(retrieval.file("model.json")))
    trained = cut if cut in card.cuts else "select"
    two_tower, text = load_two_tower(retrieval, dataset, trained)
    vectors = read_array(retrieval.file(f"{trained}/vectors.npy"))
    profile = read_array(retrieval.file("profile.npy"))
    ranker, policy, linear = None, None, None
    if ranking is not None:
        told = read_json(ranking.file("model.json"))
        policy = Policy(
            told["candidates"],
            told["history"],
            told["score"],
            tuple(told["tasks"]),
            told["text_decay"],
        )
        ranker = load_ranker(ranking, told)
        if f"{trained}/linear.npy" in ranking.files:
            linear = LinearItems(read_array(ranking.file(f"{trained}/linear.npy")))
    return Recommender(
        TensorFlowEngine(two_tower, ranker, adapt),
        dataset.catalog,
        dataset.users,
        cut_of(dataset.interactions, cut),
        card.coding,
        vectors,
        text,
        profile,
        policy,
        linear,
    )


def load_ranker(artifact: Artifact, told: Mapping[str, Any]) -> Ranker | None:
    """The trained ranker of an artifact; None if it has none."""
    if not told["tasks"]:
        return None
    config = RankingConfig.model_validate(artifact.config["ranking"])
    ranker = Ranker(config, num_scalars=len(SCALARS), tasks=tuple(told["tasks"]), **told["sizes"])
    tf.train.Checkpoint(model=ranker).read(str(artifact.path / "weights")).expect_partial()
    return ranker


def read_json(path: Path) -> Any:
    """Reads a JSON file of an artifact."""
    return json.loads(path.read_text("utf-8"))


def read_array(path: Path) -> Floats:
    """Reads a .npy file of an artifact; never a pickle."""
    array: Floats = np.load(path, allow_pickle=False)
    return array


def _belongs(child: Artifact, role: str, parent: Artifact) -> None:
    if child.parents.get(role) != parent.digest:
        raise ArtifactError(
            f"{child.path} was not made from {parent.path} as it is now; run "
            f"`tfrec adapt --task {child.kind}` again"
        )
