"""The TensorFlow engine, and how a trained run becomes a Recommender."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
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
from tfrec.data.tokens import Coverage
from tfrec.errors import ArtifactError
from tfrec.models.encoder import KIND, PretrainedEncoder
from tfrec.models.inputs import encoded
from tfrec.models.keras_bridge import tf
from tfrec.models.named import assign, named_variables, read
from tfrec.models.ranking import Ranker
from tfrec.models.retrieval import TwoTower
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import difference, tune
from tfrec.recommender import (
    SCALARS,
    Floats,
    LinearItems,
    Policy,
    Recommender,
    Rows,
    TextDirections,
)
from tfrec.rows import Vectors

DIRECTIONS = "directions.npy"
"""float32 (1 + p, text width) in a ranking artifact: mean and directions of the texts."""

CUTS: Mapping[str, tuple[int, ...]] = {
    "select": (TRAIN,),
    "test": (TRAIN, VALID),
    "final": (TRAIN, VALID, TEST),
}
"""What the weights of each cut were trained on."""

WEIGHTS = "weights.safetensors"
"""The trained weights of an artifact, or of one of its cuts."""

MERGED = "merged"
"""The role of the parent that a merged artifact stands for."""

APART = ("adapter", "prompt")
"""Methods of tuning whose additions are no part of a plain BERT."""


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
      text_digest: Digest of the BERT as it was before it was tuned; empty: there is none, or it
        is part of the artifact.
      pretrained: Names of the weights outside of the BERT that were pretrained.
      text_pretrained: Whether the BERT is that of the pretrained encoder, if there is one.
    """

    text_width: int
    attributes_width: int
    profile_width: int
    user_attributes_width: int
    num_rows: int
    coding: EventCoding
    cuts: tuple[str, ...]
    text_digest: str = ""
    pretrained: tuple[str, ...] = ()
    text_pretrained: bool = True

    def dump(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)

    @classmethod
    def parse(cls, tree: Mapping[str, Any]) -> RetrievalCard:
        """Reads back what :meth:`dump` gave."""
        coding = EventCoding.parse(tree["coding"])
        lists = {name: tuple(tree[name]) for name in ("cuts", "pretrained")}
        return cls(**{**tree, **lists, "coding": coding})


class TensorFlowEngine:
    """The models of a trained run, in this process.

    Args:
      two_tower: The retrieval model.
      ranker: The ranker, or None.
      load_text: Loads the text encoder, if the two-tower has none of its own.
    """

    def __init__(
        self, two_tower: TwoTower, ranker: Ranker | None, load_text: Callable[[], TextEncoder]
    ) -> None:
        self.two_tower, self.ranker, self.load_text = two_tower, ranker, load_text
        self._rank = tf.function(self._ranked, reduce_retracing=True) if ranker else None

    @functools.cached_property
    def text_encoder(self) -> TextEncoder:
        """The BERT, loaded when first asked for."""
        if self.two_tower.encoder is not None:
            encoder: TextEncoder = self.two_tower.encoder
            return encoder
        return self.load_text()

    def encode_text(self, texts: Sequence[str], query: bool = False) -> Floats:
        """See :class:`tfrec.recommender.Engine`."""
        return self.text_encoder.encode(texts, role="query" if query else "passage")

    def coverage(self, texts: Sequence[str]) -> Coverage:
        """See :class:`tfrec.recommender.Engine`."""
        return self.text_encoder.tokenizer.coverage(texts)

    def encode_candidate(self, text: Floats, attributes: Floats, rows: Rows) -> Floats:
        """See :class:`tfrec.recommender.Engine`."""
        return self.two_tower.encode_candidate(text, attributes, rows)

    def encode_query(
        self,
        histories: Histories,
        vectors: Vectors,
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
      ArtifactError: there are no weights of this cut, or the BERT is not the one they belong to.
    """
    return restore_two_tower(artifact, cut, dataset.catalog.features)


def restore_two_tower(artifact: Artifact, cut: str, features: Floats) -> tuple[TwoTower, Floats]:
    """As :func:`load_two_tower`; ``features`` are the catalog's attributes, float32 (n + 1, F)."""
    config, card = _told(artifact)
    if cut not in card.cuts:
        raise ArtifactError(f"{artifact.path} has no weights of '{cut}', only {card.cuts}")
    text = read_text(artifact, cut)
    tuned = config.tuning.text != "head" and card.text_width
    model = TwoTower(
        config.retrieval,
        text,
        features,
        card.coding,
        card.profile_width,
        card.user_attributes_width,
        encoder=load_text(artifact, cut) if tuned else None,
    )
    if set(card.pretrained) - named_variables(model).keys():
        raise ArtifactError(f"{artifact.path} was pretrained for another model; train it again")
    own_weights = artifact.file(f"{cut}/{WEIGHTS}")
    kept = config.tuning.behaviour != "full" or config.tuning.behaviour_layers
    if kept and card.pretrained and not _is_merged(artifact):
        base = _base(artifact).weights
        assign(named_variables(model), {n: base[n] for n in card.pretrained}, config.encoder)
    tune(model, config.tuning, card.pretrained)
    _restore(model, difference(model), own_weights)
    return model, text


def _base(artifact: Artifact) -> PretrainedEncoder:
    """The pretrained encoder that a retrieval artifact started from."""
    config, _ = _told(artifact)
    folder = config.encoder_folder(artifact.path.parent.parent)
    found = PretrainedEncoder.load(folder)
    if found.digest != artifact.parents.get(KIND):
        raise ArtifactError(
            f"{artifact.path} was made from an encoder of digest "
            f"{artifact.parents.get(KIND, '')[:12]}, and {folder} has {found.digest[:12]}; put the "
            "old one back, or train again"
        )
    return found


def _is_merged(artifact: Artifact) -> bool:
    return MERGED in artifact.parents


def load_text(artifact: Artifact, cut: str) -> TextEncoder:
    """The BERT that a retrieval artifact's weights are a difference to, or that is part of it.

    Raises:
      ArtifactError: the BERT of that name is another one.
    """
    config, card = _told(artifact)
    for place in (f"{cut}/text", "text"):
        if f"{place}/config.json" in artifact.files:
            return TextEncoder.load(artifact.path / place, length=config.text_length)
    folder = (
        _base(artifact).text_folder if KIND in artifact.parents and card.text_pretrained else ""
    )
    encoder = TextEncoder.load(folder or config.text, length=config.text_length)
    found = encoder.digest()
    if card.text_digest and found != card.text_digest:
        raise ArtifactError(
            f"{artifact.path} was made with a BERT of digest {card.text_digest[:12]}, and "
            f"'{config.text}' has {found[:12]} here; put the old weights back, or train again"
        )
    return encoder


def merged_config(artifact: Artifact) -> dict[str, Any]:
    """The settings by which a merged artifact is read: what is plain in it was never tuned."""
    adapt = dict(artifact.config["adapt"])
    tuning = dict(adapt["tuning"])
    if tuning["text"] not in APART:
        tuning |= {"text": "head", "layers": []}
    if tuning["behaviour"] not in APART:
        tuning |= {"behaviour": "full", "behaviour_layers": []}
    return {**artifact.config, "adapt": {**adapt, "tuning": tuning}}


def _restore(model: Any, needed: Collection[str], path: Path) -> None:
    weights = read(path)
    missing = set(needed) - weights.keys()
    if missing:
        raise ArtifactError(f"{path} has no weight '{min(missing)}', which this model needs")
    assign(named_variables(model), weights, str(path))


def _told(artifact: Artifact) -> tuple[AdaptConfig, RetrievalCard]:
    card = RetrievalCard.parse(read_json(artifact.file("model.json")))
    return AdaptConfig.model_validate(artifact.config["adapt"]), card


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
    _, card = _told(retrieval)
    trained = cut if cut in card.cuts else "select"
    two_tower, text = load_two_tower(retrieval, dataset, trained)
    vectors = read_array(retrieval.file(f"{trained}/vectors.npy"))
    profile = read_array(retrieval.file("profile.npy"))
    ranker, policy, linear, directions = None, None, None, None
    if ranking is not None:
        told = read_json(ranking.file("model.json"))
        policy = Policy.parse(told)
        ranker = load_ranker(ranking, told)
        directions = load_directions(ranking)
        if f"{trained}/linear.npy" in ranking.files:
            linear = LinearItems(read_array(ranking.file(f"{trained}/linear.npy")))
    return Recommender(
        TensorFlowEngine(two_tower, ranker, functools.partial(load_text, retrieval, trained)),
        dataset.catalog,
        dataset.users,
        cut_of(dataset.interactions, cut),
        card.coding,
        vectors,
        text,
        profile,
        policy,
        linear,
        directions=directions,
    )


def load_pretrained(folder: str | os.PathLike[str], cut: str = "final") -> Recommender:
    """What a run's pretrained encoder recommends as it is, adapted to nothing.

    Args:
      folder: The encoder's, beside the run's ``prepare``.
      cut: Whose events are the users' histories; of weights there is one cut.

    Raises:
      ArtifactError: an artifact is missing or damaged, or was made from another dataset.
    """
    artifact = Artifact.load(folder, KIND)
    parent = Artifact.load(artifact.path.resolve().parent / "prepare", "dataset")
    _belongs(artifact, "dataset", parent)
    dataset, base, told = Dataset.load(parent), PretrainedEncoder.load(artifact), artifact.config
    config = AdaptConfig.model_validate(
        {**told["text"], "retrieval": {**told["sizes"], **told["items"]}}
    )
    encoder = base.text_encoder() if base.card.text else None
    text = encoded(encoder, dataset.catalog, "passage")
    profile = base.profiles(encoded(encoder, dataset.users, "query"))
    features = dataset.catalog.features
    model = TwoTower(
        config.retrieval,
        text,
        features,
        base.card.coding,
        profile.shape[1],
        dataset.users.features.shape[1],
    )
    base.start(model, dataset)
    rows = np.zeros(len(features), np.int32)
    seen = dataset.interactions.part(TRAIN).item
    rows[seen] = seen
    vectors = model.encode_candidate(text, features, rows)
    vectors[0] = 0
    return Recommender(
        TensorFlowEngine(model, None, base.text_encoder),
        dataset.catalog,
        dataset.users,
        cut_of(dataset.interactions, cut),
        base.card.coding,
        vectors,
        text,
        profile,
        None,
        None,
    )


def load_directions(artifact: Artifact) -> TextDirections | None:
    """How the ranker of an artifact reads texts; None if it reads none."""
    if DIRECTIONS not in artifact.files:
        return None
    mean, *matrix = read_array(artifact.file(DIRECTIONS))
    return TextDirections(mean, np.stack(matrix, axis=1))


def save_directions(folder: Path, directions: TextDirections) -> None:
    """Leaves them where :func:`load_directions` finds them."""
    np.save(folder / DIRECTIONS, np.vstack([directions.mean, directions.matrix.T]))


def load_ranker(artifact: Artifact, told: Mapping[str, Any]) -> Ranker | None:
    """The trained ranker of an artifact; None if it has none."""
    if not told["tasks"]:
        return None
    config = RankingConfig.model_validate(artifact.config["ranking"])
    ranker = Ranker(config, num_scalars=len(SCALARS), tasks=tuple(told["tasks"]), **told["sizes"])
    _restore(ranker, named_variables(ranker), artifact.file(WEIGHTS))
    return ranker


def read_json(path: Path) -> Any:
    """Reads a JSON file of an artifact."""
    return json.loads(path.read_text("utf-8"))


def read_array(path: Path) -> Floats:
    """Reads a .npy file of an artifact; never a pickle."""
    array: Floats = np.load(path, allow_pickle=False)
    return array


def _belongs(child: Artifact, role: str, parent: Artifact) -> None:
    if child.parents.get(role) not in (parent.digest, parent.parents.get(MERGED)):
        verb = "pretrain" if child.kind == KIND else f"adapt --task {child.kind}"
        raise ArtifactError(
            f"{child.path} was not made from {parent.path} as it is now; run `tfrec {verb}` again"
        )
