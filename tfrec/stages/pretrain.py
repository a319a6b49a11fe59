"""pretrain: a prepared dataset in, an encoder that learned from it without labels out.

The text objectives train the BERT first; then its vectors stand still, and the sequence objectives
train the towers. Only training events are ever seen.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.artifact import Artifact, current, disk_errors, recipe_digest, write_json, writing
from tfrec.config import SEQUENCE_OBJECTIVES, TEXT_OBJECTIVES, Config
from tfrec.data.dataset import Dataset
from tfrec.data.history_text import history_texts
from tfrec.data.interactions import Interactions
from tfrec.data.sequences import EventCoding, Histories, PackedSequences
from tfrec.data.splits import labelled
from tfrec.distribution import Placement, place
from tfrec.errors import ConfigError, InputError
from tfrec.models import named
from tfrec.models.batches import SampledItems, TrainingBatches
from tfrec.models.encoder import CARD, KIND, TEXT, WEIGHTS, EncoderCard, contents, sizes_of, text_of
from tfrec.models.engine import cut_of
from tfrec.models.inputs import encoded, fitting_batch_size, text_encoder
from tfrec.models.keras_bridge import set_precision, set_seed
from tfrec.models.objectives import TextHistory
from tfrec.models.pretraining import Pretrainer
from tfrec.models.retrieval import TwoTower
from tfrec.models.text import TextEncoder
from tfrec.models.text_pretraining import (
    KnownPairs,
    NeighbouringEvents,
    TextBatches,
    TextPretrainer,
)
from tfrec.models.weights import folder_digest
from tfrec.tracking import callbacks
from tfrec.training import RESUMES, Progress, Trainer, discard

FOLDER = "pretrain"

UNTOLD = {"checkpoint_minutes", "validate_every", "patience", "recompute"}
"""Settings that the result does not depend on, but for rounding: nothing is validated here."""


def run(config: Config, out: Path, *, force: bool = False) -> Artifact:
    """Pretrains on ``out/prepare`` and leaves the encoder at ``out/pretrain``.

    A training that was killed goes on from its last checkpoint; one that is already there is not
    repeated.

    Args:
      config: Its ``[pretrain]`` section, the sizes of ``[adapt.retrieval]``, and the seed.
      out: The run's folder.
      force: Train anew in any case.

    Returns:
      An artifact of the kind ``encoder``, which ``adapt --from`` starts from.

    Raises:
      ArtifactError: the dataset is missing or damaged.
      ConfigError: no objective has a weight, or nobody is left to learn from.
      InputError: the data cannot support an objective.
      TrainingDivergedError: the loss became NaN.
    """
    out = Path(out)
    parents = {"dataset": Artifact.load(out / "prepare", "dataset")}
    folder, recipe = out / FOLDER, _recipe(config)
    found = None if force else current(folder, kind=KIND, config=recipe, parents=parents)
    if found is not None:
        return found
    placement = place(config.adapt.distribution)
    work = folder.with_name(f".{FOLDER}.work") / recipe_digest(KIND, recipe, parents)[:16]
    if force and placement.chief:
        discard(work)
    job = _Job(config, out, work, Dataset.load(parents["dataset"]), placement)
    began = time.monotonic()
    mine = folder if placement.chief else folder.with_name(f".{FOLDER}.worker-{placement.worker}")
    with writing(mine, kind=KIND, config=recipe, parents=parents) as draft:
        with disk_errors(folder, RESUMES):
            draft.metrics |= _pretrain(job, draft.path)
        draft.metrics["seconds"] = round(time.monotonic() - began, 1)
    placement.from_chief(None)
    discard(work.parent if placement.chief else mine)
    return Artifact.peek(folder, KIND)


def _recipe(config: Config) -> dict[str, Any]:
    adapt = config.adapt
    return {
        "seed": config.seed,
        "pretrain": config.pretrain.model_dump(mode="json", exclude=UNTOLD),
        "sizes": sizes_of(adapt.retrieval) | {"history": adapt.retrieval.history},
        "items": {
            name: getattr(adapt.retrieval, name)
            for name in (
                "item_ids",
                "id_dropout",
                "text_dropout",
                "dropout",
                "loss",
                "temperature",
                "uniform_negatives",
            )
        },
        "text": {"text": adapt.text, "text_length": adapt.text_length},
        "text_digest": folder_digest(adapt.text),
        "users": adapt.users if config.pretrain.users == "others" else 1.0,
    }


@dataclass(frozen=True)
class _Job:
    """What a pretraining works with."""

    config: Config
    out: Path
    work: Path
    dataset: Dataset
    placement: Placement

    @property
    def objectives(self) -> dict[str, float]:
        given = self.config.pretrain.objectives
        return {name: weight for name, weight in given.items() if weight}

    def trackers(self, name: str) -> list[Any]:
        return callbacks(self.config.adapt.tracking, self.out, name, self.config.dump())


def _pretrain(job: _Job, folder: Path) -> dict[str, Any]:
    set_seed(job.config.seed)
    set_precision(job.config.pretrain.precision)
    if not job.objectives:
        raise ConfigError("pretrain.objectives gives no objective a weight; there is nothing to do")
    config, dataset = job.config, job.dataset
    train = cut_of(dataset.interactions, "select")
    if config.pretrain.users == "others":
        if config.adapt.users == 1:
            raise ConfigError(
                "pretrain.users = 'others' reads the users that adapt.users leaves out, and "
                "adapt.users is 1; set it below 1"
            )
        own = labelled(len(dataset.users), config.adapt.users, config.seed)
        train = train.select(~own[train.user])
    if len(train) == 0:
        raise InputError("there is no training event to pretrain on")
    coding = EventCoding.of(train)
    histories = Histories.of(train, coding)
    _check_support(job, histories)
    history: dict[str, Any] = {}
    seconds = 0.0
    with job.placement.strategy.scope():
        encoder = text_encoder(config.adapt, dataset)
        trained = _text_objectives(job)
        if encoder is not None and trained:
            texts = _train_text(job, train, trained, folder)
            history["texts"], seconds = texts.history, texts.seconds
            encoder = text_encoder(config.adapt, dataset, str(folder / TEXT))
        text = encoded(encoder, dataset.catalog, "passage")
        profile = encoded(encoder, dataset.users, "query")
        told = None
        if encoder is not None and "text_history" in job.objectives:
            told = _told(job, encoder, train)
            profile = (
                profile if profile.shape[1] else np.zeros((len(profile), encoder.width), np.float32)
            )
        share = np.bincount(train.item, minlength=len(dataset.catalog)) + 1.0
        model = TwoTower(
            config.adapt.retrieval,
            text,
            dataset.catalog.features,
            coding,
            profile.shape[1],
            dataset.users.features.shape[1],
            popularity=(share / share.sum()).astype(np.float32),
        )
    rows = PackedSequences(histories, train.weight, config.adapt.retrieval.history, config.seed)
    state = Progress()
    losses: dict[str, float] = {}
    if set(job.objectives) & set(SEQUENCE_OBJECTIVES):
        state, losses = _train_towers(job, model, rows, profile, told)
        history["sequences"] = state.history
    if trained:
        last = history["texts"][-1]
        losses |= {f"text_{name}": last[name] for name in trained}
    named.save(folder / WEIGHTS, contents(model, job.objectives))
    card = EncoderCard(
        sizes=sizes_of(config.adapt.retrieval),
        text=text_of(encoder, config.adapt.text, bool(trained)),
        coding=coding,
        features=dataset.catalog.schema.names,
        user_features=dataset.users.schema.names,
        catalog=dataset.catalog.digest(),
        num_rows=len(dataset.catalog),
        data=_about(job, histories),
        objectives=job.objectives,
        losses=losses,
        seconds=round(seconds + state.seconds, 1),
    )
    write_json(folder / CARD, card.dump())
    write_json(folder / "history.json", history)
    return {"losses": losses, "train_seconds": card.seconds, "epochs": state.epoch}


def _check_support(job: _Job, histories: Histories) -> None:
    """Refuses an objective that the data cannot support."""
    texts = any(job.dataset.catalog.texts) and job.config.adapt.text != "none"
    lengths = histories.lengths
    met = np.unique(histories.item)
    told = texts and any(job.dataset.catalog.texts[row] for row in met)
    if "contrastive" in _text_objectives(job) and not told:
        raise InputError(
            "pretrain.train_text with the objective 'contrastive' reads the texts of items that "
            "users met, and none of these has one (or adapt.text is 'none'); set "
            "pretrain.train_text=false"
        )
    for name in job.objectives:
        if name in TEXT_OBJECTIVES and not texts:
            raise InputError(
                f"the objective '{name}' reads texts, and no item has one (or adapt.text is "
                f"'none'); take it out of pretrain.objectives"
            )
        if name in ("contrastive", "masked", "denoising", "text_history") and lengths.max() < 2:
            raise InputError(
                f"the objective '{name}' needs users with at least two training events, and the "
                f"longest history has {lengths.max()}; take it out of pretrain.objectives"
            )


def _text_objectives(job: _Job) -> tuple[str, ...]:
    """The objectives that train the BERT."""
    pairs = ("contrastive", "text_history") if job.config.pretrain.train_text else ()
    return tuple(name for name in job.objectives if name == "mlm" or name in pairs)


def _train_text(
    job: _Job, train: Interactions, objectives: tuple[str, ...], folder: Path
) -> Progress:
    """Trains the BERT and leaves it in the folder."""
    given, catalog = job.config.pretrain, job.dataset.catalog
    config = given.model_copy(
        update={
            "epochs": given.text_epochs,
            "batch_size": given.text_batch_size,
            "learning_rate": given.text_learning_rate,
            "objectives": {name: job.objectives[name] for name in objectives},
        }
    )
    encoder = text_encoder(job.config.adapt, job.dataset, trained=True)
    assert encoder is not None
    told = [row for row, text in enumerate(catalog.texts) if text]
    texts = encoder.tokenize([catalog.texts[row] for row in told], role="passage")
    place = np.zeros(len(catalog), np.int64)
    place[told] = np.arange(len(told))
    pairs: dict[str, Any] = {}
    if "contrastive" in objectives:
        pairs["contrastive"] = (NeighbouringEvents(train, told, place), texts, texts)
    if "text_history" in objectives:
        user, stop = _stops(train, given.history_texts, job.config.seed)
        event = train.offsets[user] + stop
        target = train.item[event]
        kept = np.isin(target, told) & (train.weight[event] > 0)
        if not kept.any():
            raise InputError(
                "the objective 'text_history' needs an event before another one of an item with a "
                "text, and there is none; take it out of pretrain.objectives"
            )
        said = history_texts(train, catalog.titles, user[kept], stop[kept])
        histories = encoder.tokenize(said, role="query")
        pairs["text_history"] = (KnownPairs(place[target[kept]]), histories, texts)
    mask_token = encoder.tokenizer.mask_token
    if mask_token is None and "mlm" in objectives:
        raise InputError(f"the vocabulary of '{job.config.adapt.text}' has no token for `mlm`")
    with job.placement.strategy.scope():
        model = TextPretrainer(encoder, config, tuple(pairs))
    batches = TextBatches(
        texts,
        config.batch_size,
        objectives,
        pairs,
        encoder.tokenizer.vocabulary_size,
        mask_token or 0,
        encoder.tokenizer.special_tokens,
        job.config.seed,
        replicas=job.placement.replicas,
    )
    state = Trainer(model, config, job.placement).fit(
        batches,
        work_dir=job.work / "texts",
        title="pretraining the BERT",
        warmup=batches.steps_per_epoch * config.epochs // 10,
        callbacks=job.trackers("pretrain-text"),
    )
    encoder.save(folder / TEXT)
    return state


def _train_towers(
    job: _Job,
    model: TwoTower,
    rows: PackedSequences,
    profile: NDArray[np.float32],
    told: TextHistory | None,
) -> tuple[Progress, dict[str, float]]:
    config = job.config.pretrain
    unit = job.placement.replicas * config.accumulate
    size = fitting_batch_size(config.batch_size, rows, unit)
    known = np.bincount(rows.histories.item, minlength=len(job.dataset.catalog)) > 0
    known[0] = False
    model.learn_from(known)
    sampled, rows_known = None, np.flatnonzero(known).astype(np.int32)
    if not model.full_softmax:
        retrieval = job.config.adapt.retrieval
        sampled = SampledItems(
            retrieval.positions,
            retrieval.uniform_negatives,
            job.dataset.catalog.num_items,
            known=rows_known,
        )
    steps = config.epochs * max(len(rows.epoch(0)["item"]) // size, 1)
    with job.placement.strategy.scope():
        pretrainer = Pretrainer(
            model, config, anneal=max(steps // 2, 1), text_history=told, known=rows_known
        )
    batches = TrainingBatches(
        rows,
        size,
        profile,
        job.dataset.users.features,
        sampled,
        job.placement.replicas,
        pretrainer.objectives,
    )
    state = Trainer(pretrainer, config, job.placement).fit(
        batches,
        work_dir=job.work / "sequences",
        title="pretraining",
        callbacks=job.trackers("pretrain"),
    )
    last = state.history[-1]
    return state, {name: last[name] for name in ("loss", *pretrainer.objectives)}


def _told(job: _Job, encoder: TextEncoder, train: Interactions) -> TextHistory:
    """Histories up to random places as texts, and what came next."""
    config = job.config.pretrain
    user, stop = _stops(train, config.history_texts, job.config.seed)
    counts = np.bincount(user, minlength=train.num_users)
    texts = history_texts(train, job.dataset.catalog.titles, user, stop)
    event = train.offsets[user] + stop
    return TextHistory(
        encoder.encode_cached(texts, role="query", progress=True),
        train.item[event],
        train.weight[event],
        np.concatenate([[0], np.cumsum(counts)]),
    )


def _stops(
    train: Interactions, most: int, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Users, sorted, and random places in their histories with events on both sides."""
    lengths = np.diff(train.offsets)
    counts = np.minimum(np.maximum(lengths - 1, 0), most)
    user = np.repeat(np.arange(len(counts)), counts)
    return user, np.random.default_rng([seed, 1]).integers(1, lengths[user])


def _about(job: _Job, histories: Histories) -> dict[str, Any]:
    """What the card says of the data."""
    lengths = histories.lengths
    return {
        "source": job.config.data.source,
        "users": int((lengths > 0).sum()),
        "items": len(np.unique(histories.item[histories.item > 0])),
        "events": int(lengths.sum()),
    }
