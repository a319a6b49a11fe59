"""adapt: a prepared dataset in, a trained model of one task out.

Each task is trained up to three times. The first training sees the training events only, and the
validation events choose its epoch (cut ``select``). From there training goes on for a few epochs
with the validation events too (cut ``test``, which the test events then judge), and with all
events (cut ``final``, which recommends).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfrec import metrics
from tfrec.artifact import Artifact, current, disk_errors, recipe_digest, write_json, writing
from tfrec.baselines import EASE_LIMIT, Ease, carry_over, choose, matrix_of, tf_idf
from tfrec.config import SCORE_PARTS, AdaptConfig, Config, RankingConfig, RetrievalConfig
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID, Interactions
from tfrec.data.sequences import EventCoding, Histories, PackedSequences
from tfrec.data.splits import labelled
from tfrec.distribution import Placement, place
from tfrec.errors import ArtifactError, ConfigError, InputError
from tfrec.index import ExactIndex, Index, Ragged
from tfrec.models.batches import SampledItems, TrainingBatches
from tfrec.models.encoder import KIND as ENCODER
from tfrec.models.encoder import PretrainedEncoder
from tfrec.models.engine import (
    WEIGHTS,
    RetrievalCard,
    TensorFlowEngine,
    cut_of,
    read_array,
    read_text,
    recommender_of,
    save_directions,
)
from tfrec.models.exposures import CONVERSION_EVENT, NothingToLearnError, ranking_batches
from tfrec.models.inputs import encoded, fitting_batch_size, text_encoder, tokens_of, vectors_of
from tfrec.models.keras_bridge import set_precision, set_seed
from tfrec.models.named import named_variables, save
from tfrec.models.ranking import Ranker
from tfrec.models.retrieval import TwoTower
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import count, difference, tune
from tfrec.models.weights import folder_digest
from tfrec.recommender import (
    BLOCK,
    SCALARS,
    Floats,
    LinearItems,
    Policy,
    Recommender,
    Rows,
    TextDirections,
    Who,
    best_of,
    scalars,
)
from tfrec.report.cold import EVENTS, FirstEvents
from tfrec.tracking import callbacks
from tfrec.training import (
    GOAL,
    RESUMES,
    Metrics,
    Progress,
    Trainer,
    discard,
    peak_memory_mb,
    step_seconds,
)

Task = Literal["retrieval", "ranking"]
Times = NDArray[np.int64]

# A refit moves the chosen weights no further than it must: half the learning rate measured better
# than all of it, on MovieLens-100K.
REFIT_RATE = 0.5


def run(
    config: Config,
    out: Path,
    task: Task,
    *,
    force: bool = False,
    inputs: Path | None = None,
    watching: Sequence[Any] = (),
) -> Artifact:
    """Trains the model of a task on ``out/prepare`` and leaves it at ``out/adapt/<task>``.

    A training that was killed goes on from its last checkpoint; one that is already there is not
    repeated.

    Args:
      config: Its ``[adapt]`` section and the seed.
      out: The run's folder.
      task: ``retrieval``, or ``ranking``, which needs the retrieval of the same run.
      force: Train anew in any case.
      inputs: The run's folder whose artifacts are read, if it is not ``out``.
      watching: Further tf_keras callbacks of the training that chooses; an error of theirs ends it.

    Returns:
      An artifact of the kind of the task.

    Raises:
      ArtifactError: what it needs is missing or damaged.
      InputError: there is nothing to train on.
      TrainingDivergedError: the loss became NaN.
    """
    out, inputs = Path(out), Path(inputs or out)
    parents = {"dataset": Artifact.load(inputs / "prepare", "dataset")}
    if task == "retrieval" and config.adapt.encoder:
        parents["encoder"] = Artifact.load(config.adapt.encoder_folder(inputs), ENCODER)
    if task == "ranking":
        parents["retrieval"] = Artifact.load(inputs / "adapt" / "retrieval", "retrieval")
    recipe = _recipe(config, task)
    folder = out / "adapt" / task
    found = None if force else current(folder, kind=task, config=recipe, parents=parents)
    if found is not None:
        return found
    dataset = Dataset.load(parents["dataset"])
    if "encoder" in parents:
        _check_what_it_saw(parents["encoder"], parents["dataset"], dataset, config.adapt.encoder)
    placement = place(config.adapt.distribution)
    digest = recipe_digest(task, recipe, parents)
    work = folder.with_name(f".{task}.work") / digest[:16]
    if force and placement.chief:
        discard(work)
    job = _Job(config, out, work, dataset, parents, placement, watching)
    _publish(job, folder, task, recipe)
    return Artifact.peek(folder, task)


def _check_what_it_saw(encoder: Artifact, prepared: Artifact, dataset: Dataset, given: str) -> None:
    """An encoder of the same items and another split may have learned from held-out events."""
    if encoder.parents.get("dataset") == prepared.digest:
        return
    if given == "pretrain":
        raise ArtifactError(
            f"{encoder.path} was not made from {prepared.path} as it is now and may have seen what "
            "is held out; run `tfrec pretrain` again"
        )
    card = PretrainedEncoder.load(encoder).card
    source = prepared.config.get("data", {}).get("source")
    named = source != "files" and card.data.get("source") == source
    if named or card.catalog == dataset.catalog.digest(card.num_rows):
        print(
            f"tfrec: {given} was pretrained on these items but not on this split of their events; "
            "if it has seen what is held out here, what is measured here is too good",
            file=sys.stderr,
        )


def _recipe(config: Config, task: Task) -> dict[str, Any]:
    adapt = config.adapt.model_dump(mode="json", exclude={"ranking", "tracking"})
    if task == "retrieval":
        return {
            "seed": config.seed,
            "adapt": adapt,
            "text_digest": folder_digest(config.adapt.text),
        }
    ranking = config.adapt.ranking.model_dump(mode="json")
    users = config.adapt.users
    return {"seed": config.seed, "refit": config.adapt.refit, "users": users, "ranking": ranking}


@dataclass(frozen=True)
class _Job:
    """What a training works with."""

    config: Config
    out: Path
    work: Path
    dataset: Dataset
    parents: Mapping[str, Artifact]
    placement: Placement
    watching: Sequence[Any] = ()

    @property
    def adapt(self) -> AdaptConfig:
        return self.config.adapt

    @property
    def cuts(self) -> list[str]:
        """``select``, and the refits that differ from it and from each other."""
        split = self.dataset.interactions.split
        if not self.adapt.refit:
            return ["select"]
        refits = [cut for cut, part in (("test", VALID), ("final", TEST)) if (split == part).any()]
        return ["select", *refits]

    def events(self, cut: str) -> Interactions:
        """The events of a cut, of the users that adaptation learns from."""
        return self.of_users(cut_of(self.dataset.interactions, cut))

    def valid(self) -> Interactions:
        """The validation events of these users."""
        return self.of_users(self.dataset.interactions.part(VALID))

    def of_users(self, events: Interactions) -> Interactions:
        """Those events that adaptation may learn from."""
        if self.adapt.users == 1:
            return events
        chosen = labelled(len(self.dataset.users), self.adapt.users, self.config.seed)
        return events.select(chosen[events.user])

    def trackers(self, name: str) -> list[Any]:
        trackers = callbacks(self.adapt.tracking, self.out, name, self.config.dump())
        return [*trackers, *self.watching]


def _publish(job: _Job, folder: Path, task: Task, recipe: Mapping[str, Any]) -> None:
    """Trains and publishes. Every worker writes, for TensorFlow's sake; the chief's is kept."""
    began = time.monotonic()
    make = _retrieval if task == "retrieval" else _ranking
    placement = job.placement
    mine = folder if placement.chief else folder.with_name(f".{task}.worker-{placement.worker}")
    with writing(mine, kind=task, config=recipe, parents=job.parents) as draft:
        with disk_errors(folder, RESUMES):
            draft.metrics |= make(job, draft.path)
        draft.metrics["seconds"] = round(time.monotonic() - began, 1)
    placement.from_chief(None)  # nobody goes on before the chief has published
    discard(job.work.parent if placement.chief else mine)


# --- retrieval ---


def _retrieval(job: _Job, folder: Path) -> dict[str, Any]:
    set_seed(job.config.seed)
    set_precision(job.adapt.retrieval.precision)
    made = _Retrieval(job)
    state = made.select()
    measured = {"best_epoch": state.best_epoch, "validation": state.best, "epochs": state.epoch}
    measured |= {"train_seconds": round(state.seconds, 1), **made.weights()}
    measured |= {"step_seconds": step_seconds(state), "peak_memory_mb": peak_memory_mb()}
    made.write(folder, "select")
    measured["difference_bytes"] = (folder / "select" / WEIGHTS).stat().st_size
    for cut in job.cuts[1:]:
        made.refit(cut)
        made.write(folder, cut)
    np.save(folder / "text.npy", made.text)
    np.save(folder / "profile.npy", made.profile)
    write_json(folder / "model.json", made.card.dump())
    write_json(folder / "history.json", state.history)
    return measured


class _Retrieval:
    """A two-tower in training."""

    def __init__(self, job: _Job) -> None:
        self.job, self.placement = job, job.placement
        dataset, config = job.dataset, job.adapt.retrieval
        self.config: RetrievalConfig = config
        train = job.events("select")
        if len(train) == 0:
            raise InputError("there is no training event; the dataset has only held-out ones")
        coding = EventCoding.of(train)
        base = None
        if "encoder" in job.parents:
            base = PretrainedEncoder.load(job.parents["encoder"])
        with self.placement.strategy.scope():
            trained = job.adapt.tuning.text != "head" and any(dataset.catalog.texts)
            encoder = text_encoder(job.adapt, dataset, base.text_folder if base else "", trained)
            if base is not None:
                base.check(job.adapt, encoder, dataset)
            self.tokens = tokens_of(encoder, dataset) if trained else None
            self.text = encoded(encoder, dataset.catalog, "passage")
            self.profile = encoded(encoder, dataset.users, "query")
            if base is not None:
                self.profile = base.profiles(self.profile)
            share = np.bincount(train.item, minlength=len(dataset.catalog)) + 1.0
            self.model = TwoTower(
                config,
                self.text,
                dataset.catalog.features,
                coding,
                self.profile.shape[1],
                dataset.users.features.shape[1],
                popularity=(share / share.sum()).astype(np.float32),
                encoder=encoder if self.tokens is not None else None,
            )
            text_digest = encoder.digest() if encoder else ""
            self.pretrained = base.start(self.model, dataset) if base is not None else ()
            self.tuned = tune(self.model, job.adapt.tuning, self.pretrained)
        self.encoder = encoder
        rates = self.tuned.rates(self.model.trainable_variables)
        self.trainer = Trainer(self.model, config, self.placement, rates)
        self.batch_size = 0
        self.card = RetrievalCard(
            text_width=self.text.shape[1],
            attributes_width=dataset.catalog.features.shape[1],
            profile_width=self.profile.shape[1],
            user_attributes_width=dataset.users.features.shape[1],
            num_rows=len(dataset.catalog),
            coding=coding,
            cuts=tuple(job.cuts),
            text_digest=text_digest,
            pretrained=self.pretrained,
            text_pretrained=bool(base and base.text_folder),
        )

    def select(self) -> Progress:
        """Trains on the training events; the validation events choose the epoch."""
        held_out = len(self.job.valid())
        if not self.model.trainable_variables:
            print(
                "tfrec: the encoder brought all weights and adapt.tuning.behaviour = head moves "
                "none, so it is measured as it came; --tune full trains it on",
                file=sys.stderr,
            )
        state = self.trainer.fit(
            self._batches("select"),
            work_dir=self.job.work / "select",
            title="retrieval",
            validate=self._validate if held_out else None,
            callbacks=self.job.trackers("retrieval"),
        )
        self._chosen = [v.numpy() for v in self.model.trainable_variables]
        self._waited = state.best_epoch or state.epoch
        return state

    def refit(self, cut: str) -> None:
        """Goes on from the chosen weights with the events of a cut."""
        for variable, value in zip(self.model.trainable_variables, self._chosen, strict=True):
            variable.assign(value)
        batches = self._batches(cut)
        self.trainer.fit(
            batches,
            work_dir=self.job.work / cut,
            title=f"retrieval, with {'all' if cut == 'final' else 'validation'} events",
            epochs=self.job.adapt.refit_epochs,
            schedule="cosine",
            warmup=batches.steps_per_epoch // 2,
            peak=REFIT_RATE * self.config.learning_rate,
            averaged=False,
            waited=self._waited,
        )

    def write(self, folder: Path, cut: str) -> None:
        """Writes weights and vectors of a cut."""
        (folder / cut).mkdir()
        save(folder / cut / WEIGHTS, difference(self.model))
        if self.tokens is not None:
            np.save(folder / cut / "text.npy", self._text())
        np.save(folder / cut / "vectors.npy", self.vectors(cut))

    def vectors(self, cut: str) -> Floats:
        """float32 (n + 1, d), the catalog's candidate vectors; row 0 is zero.

        Items that no event of the cut is of do without an id: theirs has learned nothing.
        """
        features = self.job.dataset.catalog.features
        rows = np.arange(len(features), dtype=np.int32) * self._known(cut)
        vectors = self.model.encode_candidate(self._text(), features, rows)
        vectors[0] = 0
        return vectors

    def weights(self) -> dict[str, int]:
        """How many weights move, and how many there are; of the model and of its BERT."""
        text = 0 if self.encoder is None else count(named_variables(self.encoder).values())
        frozen = text if self.model.encoder is None else 0
        moving = [] if self.model.encoder is None else self.model.encoder.trainable_variables
        return {
            "weights": count(self.model.trainable_variables),
            "weights_total": count(named_variables(self.model).values()) + frozen,
            "text_weights_trained": count(moving),
            "text_weights_total": text,
        }

    def _text_encoder(self) -> TextEncoder:
        assert self.encoder is not None
        return self.encoder

    def _known(self, cut: str) -> NDArray[np.bool_]:
        """bool (n + 1,): the items that the events of a cut, or of pretraining, are of."""
        known = np.zeros(len(self.job.dataset.catalog), bool)
        known[self.job.events(cut).item] = True
        if "candidate_tower.ids" in self.pretrained:
            known[cut_of(self.job.dataset.interactions, "select").item] = True
        known[0] = False
        return known

    def _text(self) -> Floats:
        if self.model.encoder is None:
            return self.text
        return vectors_of(self.model.encoder.encode, self.job.dataset.catalog)

    def _batches(self, cut: str) -> TrainingBatches:
        dataset, config = self.job.dataset, self.config
        events = self.job.events(cut)
        histories = Histories.of(events, self.model.coding)
        known = self._known(cut)
        self.model.learn_from(known)
        sampled = None
        if not self.model.full_softmax:
            tokens, mask = self.tokens or (None, None)
            sampled = SampledItems(
                config.positions,
                config.uniform_negatives,
                dataset.catalog.num_items,
                tokens,
                mask,
                np.flatnonzero(known).astype(np.int32),
            )
        rows = PackedSequences(histories, events.weight, config.history, self.job.config.seed)
        if not self.batch_size:
            unit = self.placement.replicas * config.accumulate
            self.batch_size = fitting_batch_size(config.batch_size, rows, unit)
        return TrainingBatches(
            rows,
            self.batch_size,
            self.profile,
            dataset.users.features,
            sampled,
            self.placement.replicas,
        )

    def _validate(self) -> Metrics:
        """Full ranking of the validation events, from those before; see :func:`_judged`."""
        engine = TensorFlowEngine(self.model, None, self._text_encoder)
        recommender = _recommender(
            self.job.dataset, engine, self.vectors("select"), self.text, self.profile
        )
        history, wanted = _judged(self.job.of_users(self.job.dataset.interactions))
        users, targets, offsets, times = held_out(wanted)
        cold = np.flatnonzero(~self._known("select")).astype(np.int32)
        # Where every target is a cold item, what tells one such item from another is judged.
        among = cold[1:] if np.isin(targets, cold).all() else None
        asked = recommender.lists(history, users, 10, request_time=times, among=among)
        found = metrics.ranking(asked["retrieval"].ids, targets, offsets, [10])
        return {name: float(found[name].mean()) for name in ("ndcg@10", "hr@10")}


def held_out(events: Interactions) -> tuple[Rows, Rows, NDArray[np.int64], Times]:
    """Users with held-out events, those events' items, offsets of each user's, first times."""
    counts = np.diff(events.offsets)
    users = np.flatnonzero(counts).astype(np.int32)
    offsets = np.concatenate([[0], np.cumsum(counts[users])]).astype(np.int64)
    return users, events.item, offsets, events.timestamp[events.offsets[:-1][users]]


def _judged(events: Interactions) -> tuple[Interactions, Interactions]:
    """What an epoch is judged on: the events that are known, and those to be foreseen.

    A user without a training event is given the first half of his validation events: without any
    he would be answered by words or popularity, which no training changes.
    """
    known, valid = events.split == TRAIN, events.split == VALID
    part = events.part(VALID)
    place = np.arange(len(part)) - part.offsets[part.user]
    new = np.diff(events.part(TRAIN).offsets)[part.user] == 0
    known[np.flatnonzero(valid)] |= new & (2 * (place + 1) <= np.diff(part.offsets)[part.user])
    return events.select(known), events.select(valid & ~known)


def _recommender(
    dataset: Dataset, engine: TensorFlowEngine, vectors: Floats, text: Floats, profile: Floats
) -> Recommender:
    return Recommender(
        engine,
        dataset.catalog,
        dataset.users,
        cut_of(dataset.interactions, "select"),
        engine.two_tower.coding,
        vectors,
        text,
        profile,
    )


# --- ranking ---


def _ranking(job: _Job, folder: Path) -> dict[str, Any]:
    set_seed(job.config.seed)
    config = job.adapt.ranking
    set_precision(config.precision)
    retrieval = job.parents["retrieval"]
    tasks = _tasks(job.dataset, config.tasks)
    linear_settings = _linear(job, folder, config)
    base = recommender_of(job.dataset, retrieval, None, "select")
    base.linear = _read_linear(folder, "select")
    base.policy = Policy(config.candidates, config.history, {"retrieval": 1.0})
    base.directions = _directions(base, config)
    ranker: Ranker | None = None
    sizes: dict[str, Any] = {}
    state = Progress()
    try:
        ranker, sizes, state = _train_ranker(job, base, tasks)
    except NothingToLearnError as error:
        if config.tasks:
            raise
        tasks = ()
        if job.placement.chief:
            print(f"tfrec: {error}; the score does without one", file=sys.stderr)
    policy, found = _choose_policy(job, base, tasks)
    if ranker is not None:
        save(folder / WEIGHTS, named_variables(ranker))
        found["task_weights"] = ranker.task_weights
        if base.directions is not None:
            save_directions(folder, base.directions)
    told = {
        "candidates": policy.candidates,
        "history": policy.history,
        "score": dict(policy.score),
        "text_decay": policy.text_decay,
        "newcomer": policy.newcomer,
        "fade": policy.fade,
        "tasks": list(tasks),
        "sizes": sizes,
        "linear": linear_settings,
    }
    write_json(folder / "model.json", told)
    write_json(folder / "history.json", state.history)
    return {**found, "score": told["score"], "train_seconds": round(state.seconds, 1)}


def _linear(job: _Job, folder: Path, config: RankingConfig) -> dict[str, float] | None:
    """Writes the linear item-item model of every cut; its settings are chosen on validation."""
    limit = min(config.linear_items, EASE_LIMIT)
    if not 0 < job.dataset.catalog.num_items <= limit:
        return None
    items = job.dataset.catalog.num_items
    valid = job.valid()
    matrix = matrix_of(job.events("select"), items)
    chosen = choose("ease", matrix, Ragged(valid.offsets, valid.item), matrix, job.config.seed)
    settings = dict(chosen.settings)
    catalog = job.dataset.catalog
    words = tf_idf(catalog.texts) if config.linear_of_new else None
    for cut in job.cuts:
        events = job.events(cut)
        weights = Ease(**settings).fit(matrix_of(events, items)).weights
        if words is not None:
            counts = np.bincount(events.item, minlength=items + 1)
            counts[0] = 0
            text = read_text(job.parents["retrieval"], cut)
            weights = carry_over(weights, text, catalog.features, words, counts, job.config.seed)
        (folder / cut).mkdir(exist_ok=True)
        np.save(folder / cut / "linear.npy", np.asarray(weights, np.float32))
    return settings


def _read_linear(folder: Path, cut: str) -> LinearItems | None:
    path = folder / cut / "linear.npy"
    return LinearItems(read_array(path)) if path.exists() else None


def _tasks(dataset: Dataset, wanted: Sequence[str]) -> tuple[str, ...]:
    """The tasks that the data supports, of those that are wanted, or all if none is named."""
    events = dataset.interactions
    supported = ["click"]
    if np.isfinite(events.rating).any():
        supported += ["like", "rating"]
    if CONVERSION_EVENT in events.event_names:
        supported.append("conversion")
    for task in wanted:
        if task not in supported:
            lacking = f"event '{CONVERSION_EVENT}'" if task == "conversion" else "rating"
            raise InputError(
                f"the ranker cannot learn '{task}': the data has no {lacking}; it supports "
                f"{', '.join(supported)} (--task or adapt.ranking.tasks)"
            )
    return tuple(task for task in supported if task in wanted or not wanted)


def _directions(base: Recommender, config: RankingConfig) -> TextDirections | None:
    """Of the items' texts; of the profiles where no item has a text."""
    known = base.text if base.text.any() else base.profile
    return TextDirections.of(known, config.text_width)


def _train_ranker(
    job: _Job, base: Recommender, tasks: tuple[str, ...]
) -> tuple[Ranker, dict[str, Any], Progress]:
    dataset, config = job.dataset, job.adapt.ranking
    train = job.of_users(base.interactions)
    rated = train.rating[np.isfinite(train.rating)]
    sizes: dict[str, Any] = {
        "embedding_dim": int(base.vectors.shape[1]),
        "attributes_width": int(dataset.catalog.features.shape[1]),
        "user_attributes_width": int(dataset.users.features.shape[1]),
        "text_width": int(base.described.shape[1]),
        "profile_width": int(base.read(base.profile).shape[1]),
        "rating_mean": float(rated.mean()) if len(rated) else 0.0,
        "rating_std": float(max(rated.std(), 1e-3)) if len(rated) else 1.0,
    }
    clicks, hard = "click" in tasks, None
    if clicks:
        everyone = np.arange(len(dataset.users), dtype=np.int32)
        found = base.lists(train, everyone, config.candidates)["retrieval"].ids
        hard = Ragged.of([ids[ids > 0] for ids in found])
    batches = ranking_batches(
        config,
        histories=Histories.of(train, base.coding),
        interactions=train,
        vectors=base.vectors[:],
        query_vectors_of=lambda users, histories, times: _queries(base, users, histories, times),
        hard=hard,
        attributes=dataset.catalog.features,
        user_attributes=dataset.users.features,
        text=base.described,
        profile=base.read(base.profile),
        scalars_of=lambda users, query, histories, rows: _scalars(base, query, histories, rows),
        seed=job.config.seed,
        replicas=job.placement.replicas,
        tasks=tasks,
    )
    with job.placement.strategy.scope():
        ranker = Ranker(config, num_scalars=len(SCALARS), tasks=tasks, **sizes)
    ranker.adapt_scalars(batches.sample_scalars())
    assert isinstance(base.engine, TensorFlowEngine)
    base.engine = TensorFlowEngine(base.engine.two_tower, ranker, base.engine.load_text)
    base.policy = replace(base.policy, tasks=tasks)
    validation = _click_validation if clicks else _rating_validation
    state = Trainer(ranker, config, job.placement).fit(
        batches,
        work_dir=job.work / "select",
        title="ranking",
        validate=validation(job, base, tasks),
        goal=GOAL if clicks else SKILL,
        callbacks=job.trackers("ranking"),
    )
    return ranker, sizes, state


def _click_validation(
    job: _Job, base: Recommender, tasks: tuple[str, ...]
) -> Callable[[], Metrics] | None:
    """What tells how well ``click`` alone orders the candidates of some validation users."""
    asked, target = _validated(job, base, MOST_IN_TRAINING)
    if not len(asked):
        return None
    policy = replace(base.policy, score={"retrieval": 1.0, "click": 1.0}, tasks=tasks)
    query = base.queries(asked)
    rows = base.candidates(asked, query, policy.candidates, asked.seen, policy=policy)

    def validate() -> Metrics:
        found = 0.0
        for start in range(0, len(asked), BLOCK):
            part = np.arange(start, min(start + BLOCK, len(asked)))
            clicks = base.parts(asked.take(part), query[part], rows[part], policy)["click"]
            found += len(part) * _ndcg(clicks, rows[part], target[part])
        return {"ndcg@10": found / len(asked)}

    return validate


SKILL = "skill"


def _rating_validation(
    job: _Job, base: Recommender, tasks: tuple[str, ...]
) -> Callable[[], Metrics] | None:
    """How much of the error of always guessing the mean the ranker avoids, a mean over the tasks.

    Of squared error for ``rating``, of log loss for ``like``; on validation events.
    """
    events = job.valid()
    there = np.isfinite(events.rating) & (events.item > 0)
    chosen = np.flatnonzero(there & (np.diff(base.interactions.offsets)[events.user] > 0))
    if len(chosen) > MOST_RATED:
        chosen = np.sort(np.random.default_rng(job.config.seed).choice(chosen, MOST_RATED, False))
    if not len(chosen):
        return None
    events = events.select(np.isin(np.arange(len(events)), chosen))
    liked = (events.rating >= job.adapt.ranking.like_rating).astype(np.float32)

    def errors(task: str, told: Floats) -> float:
        if task == "rating":
            return float(np.square(told - events.rating).mean())
        told = np.clip(told, 1e-6, 1 - 1e-6)
        return float(-(liked * np.log(told) + (1 - liked) * np.log1p(-told)).mean())

    rating = job.of_users(base.interactions).rating
    guess = {"rating": np.nanmean(rating), "like": liked.mean()}
    usual = {task: errors(task, np.full(len(events), guess[task], "f4")) for task in tasks}

    def validate() -> Metrics:
        told = base.predictions(events, base.interactions)
        skill = [1 - errors(task, told[task]) / max(usual[task], 1e-9) for task in tasks]
        return {SKILL: float(np.mean(skill))}

    return validate


def _validated(job: _Job, base: Recommender, most: int) -> tuple[Who, Rows]:
    """At most so many users with events to be foreseen, and the first such item of each.

    Users without an event before are left out: the chain is not for them.
    """
    history, wanted = _judged(job.of_users(job.dataset.interactions))
    users, targets, offsets, times = held_out(wanted)
    chosen = np.flatnonzero(np.diff(history.offsets)[users])
    if len(chosen) > most:
        chosen = np.sort(np.random.default_rng(job.config.seed).choice(chosen, most, False))
    return base.who(history, users[chosen], times[chosen]), targets[offsets[:-1][chosen]]


def _queries(base: Recommender, users: Rows, histories: Histories, times: Times) -> Floats:
    return base.queries(Who(histories, base.profile[users], base.users.features[users], times))


def _scalars(base: Recommender, query: Floats, histories: Histories, rows: Rows) -> Floats:
    retrieval = np.einsum("bd,bcd->bc", query, base.vectors[rows]).astype(np.float32)
    linear = np.zeros(rows.shape, np.float32)
    if base.linear is not None:
        seen = Ragged(histories.offsets, histories.item)
        linear = base.linear.scores_of(seen, rows)
    return scalars(retrieval, linear, base.popularity[rows])


# --- how the parts of the score are put together ---

STEPS = (0.0, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0, 20.0)
LEAST_GAIN = 0.005
TEXT_DECAYS = (0.8, 1.0, 0.6)
MOST_VALIDATED = 20_000  # users that the weights are chosen on
MOST_IN_TRAINING = 1_000  # users that an epoch of the ranker is judged on
MOST_RATED = 5_000  # rated events that an epoch of a ranker without clicks is judged on


def _choose_policy(
    job: _Job, base: Recommender, tasks: tuple[str, ...]
) -> tuple[Policy, dict[str, Any]]:
    """Weights of the parts of the final score, chosen on the validation events.

    Every part is measured in standard deviations of the retrieval score within a user's
    candidates. One part after the other, twice over, gets the weight with which NDCG@10 of each
    user's first validation event is best; a part that does not gain half a percent gets none.
    """
    config = job.adapt.ranking
    policy = Policy(config.candidates, config.history, {"retrieval": 1.0}, tasks)
    asked, target = _validated(job, base, MOST_VALIDATED)
    if config.score:
        _check_parts(config.score, base, tasks)
    if config.score or len(asked) == 0:
        return replace(policy, score=dict(config.score) or policy.score), {}
    index = _judged_among(base, target)
    policy = replace(policy, text_decay=_text_decay(base, policy, asked, target, index))
    parts, rows = _validation_parts(
        base, asked, replace(policy, score=dict.fromkeys(SCORE_PARTS, 1.0)), index
    )
    score, found = _choose_score(parts, rows, target)
    policy = replace(policy, score=score)
    total, popular = policy.total(parts), base.popular(rows)

    few = asked.events <= EVENTS[-1]

    def usual(chosen: Policy) -> NDArray[np.float64]:
        gain = _gains(total + chosen.prior(asked.events)[:, None] * popular, rows, target)
        return np.array([gain.mean(), gain[few].sum()])

    return _choose_newcomer(job, base, policy, usual), found


NEWCOMERS = (1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 40.0)
FADES = (1.0, 2.0, 4.0, 8.0, 16.0)
LEAST_NEWCOMERS, MOST_NEWCOMERS = 30, 300  # users


def _choose_newcomer(
    job: _Job, base: Recommender, policy: Policy, usual: Callable[[Policy], NDArray[np.float64]]
) -> Policy:
    """Chooses how much popularity counts beside few events.

    What is best for a user's whole history is not so for his first events: they tell what comes
    next, and little of him. So validation users are asked about with their first 1, 2, 3, 5, 10 and
    20 events, what follows the 20th being wanted, and NDCG@10 is averaged over these. The weights
    are tried in standard deviations of the score over that of popularity.

    Args:
      job: What is trained.
      base: Of the cut ``select``.
      policy: All but this.
      usual: Quality for validation users with the events that they have, for all and for those
        of 20 events or fewer: neither may fall.
    """
    events = job.of_users(job.dataset.interactions.part(TRAIN, VALID))
    first = FirstEvents.of(events, MOST_NEWCOMERS, job.config.seed, VALID)
    if len(first.users) < LEAST_NEWCOMERS:
        return policy
    asking = replace(policy, newcomer=1.0, fade=np.inf)  # popular items are candidates for all
    scored: list[tuple[int, Floats, Floats, Rows]] = []
    for known in EVENTS[1:]:
        asked = base.who(first.history(known), first.users, first.times)
        query, evidence = base.queries(asked), base.evidence(asked, asking)
        rows = base.candidates(asked, query, asking.candidates, first.known, None, asking, evidence)
        parts = base.parts(asked, query, rows, asking, evidence)
        scored.append((known, policy.total(parts), base.popular(rows), rows))
    spreads = [(_spread(s, rows > 0), _spread(p, rows > 0)) for _, s, p, rows in scored]
    unit = float(np.mean([s / max(p, 1e-9) for s, p in spreads]))

    def quality(chosen: Policy) -> float:
        found = 0.0
        for known, score, popular, rows in scored:
            total = score + chosen.prior(np.array([known])) * popular
            lists = best_of(np.where(rows > 0, total, -np.inf), rows, 10).ids
            each = metrics.ranking(lists, first.targets.ids, first.targets.offsets, [10])
            found += float(each["ndcg@10"].mean())
        return found

    least = usual(policy)
    tried = [replace(policy, newcomer=unit * w, fade=f) for w in NEWCOMERS for f in FADES]
    values = {quality(one): one for one in tried if (usual(one) >= least).all()}
    best = max(values, default=0.0)
    return values[best] if best > quality(policy) * (1 + LEAST_GAIN) else policy


def _judged_among(base: Recommender, targets: Rows) -> Index:
    """The catalog; only its items without events where every target is one of these."""
    cold = np.flatnonzero(base.popularity == 0)[1:].astype(np.int32)
    if not np.isin(targets, cold).all():
        return base.index
    return ExactIndex.build(base.vectors[cold], cold)


def _check_parts(score: Mapping[str, float], base: Recommender, tasks: tuple[str, ...]) -> None:
    there = {"retrieval", "popularity", *tasks}
    there |= {"linear"} if base.linear is not None else set()
    there |= {"text"} if base.text.shape[1] else set()
    for part in score:
        if part not in there:
            raise ConfigError(
                f"adapt.ranking.score names '{part}', and this run has only: "
                f"{', '.join(sorted(there))}"
            )


def _text_decay(
    base: Recommender, policy: Policy, everyone: Who, target: Rows, index: Index
) -> float:
    """The decay with which text alone is best."""
    if not base.text.shape[1]:
        return policy.text_decay
    near = base.text_index
    if index is not base.index:
        near = ExactIndex.build(base.text[index.ids], index.ids)
    found = dict.fromkeys(TEXT_DECAYS, 0.0)
    for start in range(0, len(everyone), BLOCK):
        asked = everyone.take(np.arange(start, min(start + BLOCK, len(everyone))))
        for decay in TEXT_DECAYS:
            query = base.text_queries(asked, replace(policy, text_decay=decay))
            best = near.search(query, 10, asked.seen)
            found[decay] += len(asked) * _ndcg(best.scores, best.ids, target[start:][: len(asked)])
    return max(found, key=lambda decay: found[decay])


def _choose_score(
    parts: Mapping[str, Floats], rows: Rows, target: Rows
) -> tuple[dict[str, float], dict[str, Any]]:
    """See :func:`_choose_policy`."""
    scale = {name: _spread(values, rows > 0) for name, values in parts.items()}
    unit = {n: scale["retrieval"] / s for n, s in scale.items() if s > 0 and n != "retrieval"}
    score = {"retrieval": 1.0}
    total = parts["retrieval"].copy()
    best = alone = _ndcg(total, rows, target)
    for _ in range(2):
        for name, one in unit.items():
            without = total - np.float32(score.get(name, 0.0)) * parts[name]
            tried = {
                s * one: _ndcg(without + np.float32(s * one) * parts[name], rows, target)
                for s in STEPS
            }
            weight = max(tried, key=lambda w: tried[w])
            chosen = weight if tried[weight] > tried[0.0] * (1 + LEAST_GAIN) else 0.0
            total, best = without + np.float32(chosen) * parts[name], tried[chosen]
            score[name] = float(chosen)
    found = {"validation": best, "validation_retrieval_alone": alone}
    return {name: weight for name, weight in score.items() if weight}, found


def _validation_parts(
    base: Recommender, everyone: Who, policy: Policy, index: Index
) -> tuple[dict[str, Floats], Rows]:
    """Parts of the score of every validation user's candidates, padded with row 0."""
    all_parts: list[dict[str, Floats]] = []
    all_rows: list[Rows] = []
    for start in range(0, len(everyone), BLOCK):
        asked = everyone.take(np.arange(start, min(start + BLOCK, len(everyone))))
        query = base.queries(asked)
        seen, evidence = asked.seen, base.evidence(asked, policy)
        rows = base.candidates(asked, query, policy.candidates, seen, index, policy, evidence)
        all_parts.append(base.parts(asked, query, rows, policy, evidence))
        all_rows.append(rows)
    parts = {name: np.concatenate([p[name] for p in all_parts]) for name in all_parts[0]}
    return parts, np.concatenate(all_rows)


def _spread(values: Floats, used: NDArray[np.bool_]) -> float:
    """Median over users of the standard deviation among a user's candidates."""
    several = used.sum(axis=1) > 1
    if not several.any():
        return 0.0
    shown = np.where(used, values, np.nan)
    return float(np.median(np.nanstd(shown[several], axis=1)))


def _ndcg(score: Floats, rows: Rows, target: Rows) -> float:
    """Mean of :func:`_gains`."""
    return float(_gains(score, rows, target).mean())


def _gains(score: Floats, rows: Rows, target: Rows) -> NDArray[np.float64]:
    """NDCG@10 of one target a user; a target that is no candidate is a miss."""
    hit = rows == target[:, None]
    wanted = np.where(hit, score, -np.inf).max(axis=1, keepdims=True)
    place = ((score > wanted) & (rows > 0)).sum(axis=1) + 1
    return np.where(hit.any(axis=1) & (place <= 10), 1 / np.log2(place + 1), 0.0)
