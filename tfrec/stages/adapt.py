"""adapt: a prepared dataset in, a trained model of one task out.

Each task is trained up to three times. The first training sees the training events only, and the
validation events choose its epoch (cut ``select``). From there training goes on for a few epochs
with the validation events too (cut ``test``, which the test events then judge), and with all
events (cut ``final``, which recommends).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfrec import metrics
from tfrec.artifact import Artifact, current, recipe_digest, write_json, writing
from tfrec.baselines import EASE_LIMIT, Ease, carry_over, choose, matrix_of
from tfrec.config import SCORE_PARTS, AdaptConfig, Config, RankingConfig, RetrievalConfig
from tfrec.data.catalog import Table
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import TEST, TRAIN, VALID, Interactions
from tfrec.data.sequences import EventCoding, Histories, PackedSequences
from tfrec.distribution import Placement, place
from tfrec.errors import ConfigError, InputError, SetupError
from tfrec.index import ExactIndex, Index, Ragged
from tfrec.models.batches import SampledItems, TrainingBatches
from tfrec.models.engine import (
    RetrievalCard,
    TensorFlowEngine,
    cut_of,
    read_array,
    read_text,
    recommender_of,
)
from tfrec.models.exposures import ranking_batches
from tfrec.models.keras_bridge import set_precision, set_seed, tf
from tfrec.models.ranking import Ranker
from tfrec.models.retrieval import TwoTower
from tfrec.models.text import TextEncoder
from tfrec.recommender import (
    BLOCK,
    SCALARS,
    Floats,
    LinearItems,
    Policy,
    Recommender,
    Rows,
    Who,
    scalars,
)
from tfrec.tracking import callbacks
from tfrec.training import Metrics, Progress, Trainer, discard

Task = Literal["retrieval", "ranking"]
Times = NDArray[np.int64]

# A refit moves the chosen weights no further than it must: half the learning rate measured better
# than all of it, on MovieLens-100K.
REFIT_RATE = 0.5

# Small data gets smaller batches, so that an epoch has at least so many updates.
LEAST_STEPS = 8


def run(config: Config, out: Path, task: Task, *, force: bool = False) -> Artifact:
    """Trains the model of a task on ``out/prepare`` and leaves it at ``out/adapt/<task>``.

    A training that was killed goes on from its last checkpoint; one that is already there is not
    repeated.

    Args:
      config: Its ``[adapt]`` section and the seed.
      out: The run's folder.
      task: ``retrieval``, or ``ranking``, which needs the retrieval of the same run.
      force: Train anew in any case.

    Returns:
      An artifact of the kind of the task.

    Raises:
      ArtifactError: what it needs is missing or damaged.
      InputError: there is nothing to train on.
      TrainingDivergedError: the loss became NaN.
    """
    out = Path(out)
    parents = {"dataset": Artifact.load(out / "prepare", "dataset")}
    if task == "ranking":
        parents["retrieval"] = Artifact.load(out / "adapt" / "retrieval", "retrieval")
    recipe = _recipe(config, task)
    folder = out / "adapt" / task
    found = None if force else current(folder, kind=task, config=recipe, parents=parents)
    if found is not None:
        return found
    placement = place(config.adapt.distribution)
    digest = recipe_digest(task, recipe, parents)
    work = folder.with_name(f".{task}.work") / digest[:16]
    if force and placement.chief:
        discard(work)
    job = _Job(config, out, work, Dataset.load(parents["dataset"]), parents, placement)
    _publish(job, folder, task, recipe)
    return Artifact.peek(folder, task)


def _recipe(config: Config, task: Task) -> dict[str, Any]:
    adapt = config.adapt.model_dump(mode="json", exclude={"ranking", "tracking"})
    if task == "retrieval":
        return {"seed": config.seed, "adapt": adapt}
    ranking = config.adapt.ranking.model_dump(mode="json")
    return {"seed": config.seed, "refit": config.adapt.refit, "ranking": ranking}


@dataclass(frozen=True)
class _Job:
    """What a training works with."""

    config: Config
    out: Path
    work: Path
    dataset: Dataset
    parents: Mapping[str, Artifact]
    placement: Placement

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

    def trackers(self, name: str) -> list[Any]:
        return callbacks(self.adapt.tracking, self.out, name, self.config.dump())


def _publish(job: _Job, folder: Path, task: Task, recipe: Mapping[str, Any]) -> None:
    """Trains and publishes. Every worker writes, for TensorFlow's sake; the chief's is kept."""
    began = time.monotonic()
    make = _retrieval if task == "retrieval" else _ranking
    placement = job.placement
    mine = folder if placement.chief else folder.with_name(f".{task}.worker-{placement.worker}")
    with writing(mine, kind=task, config=recipe, parents=job.parents) as draft:
        with _disk_errors(folder):
            draft.metrics |= make(job, draft.path)
        draft.metrics["seconds"] = round(time.monotonic() - began, 1)
    placement.from_chief(None)  # nobody goes on before the chief has published
    discard(job.work.parent if placement.chief else mine)


@contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """A full disk as TensorFlow and NumPy tell it: neither gives the error its number."""
    try:
        yield
    except (tf.errors.ResourceExhaustedError, tf.errors.UnknownError, OSError) as error:
        if "No space left on device" not in str(error) and " requested and " not in str(error):
            raise
        raise SetupError(
            f"no space left on the disk while making {folder}; free some and run the same command "
            "again, which goes on from the last checkpoint"
        ) from None


# --- retrieval ---


def _retrieval(job: _Job, folder: Path) -> dict[str, Any]:
    set_seed(job.config.seed)
    set_precision(job.adapt.retrieval.precision)
    made = _Retrieval(job)
    state = made.select()
    measured = {"best_epoch": state.best_epoch, "validation": state.best, "epochs": state.epoch}
    weights = sum(int(np.prod(v.shape)) for v in made.model.trainable_variables)
    measured |= {"train_seconds": round(state.seconds, 1), "weights": weights}
    made.write(folder, "select")
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
        train = cut_of(dataset.interactions, "select")
        if len(train) == 0:
            raise InputError("there is no training event; the dataset has only held-out ones")
        coding = EventCoding.of(train)
        with self.placement.strategy.scope():
            encoder = _encoder(job.adapt, dataset)
            trained = job.adapt.text_mode == "full" and any(dataset.catalog.texts)
            self.tokens = _tokens(encoder, dataset) if trained else None
            self.text = _encoded(encoder, dataset.catalog, "passage")
            self.profile = _encoded(encoder, dataset.users, "query")
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
        self.trainer = Trainer(self.model, config, self.placement)
        self.batch_size = 0
        self.card = RetrievalCard(
            text_width=self.text.shape[1],
            attributes_width=dataset.catalog.features.shape[1],
            profile_width=self.profile.shape[1],
            user_attributes_width=dataset.users.features.shape[1],
            num_rows=len(dataset.catalog),
            coding=coding,
            cuts=tuple(job.cuts),
        )

    def select(self) -> Progress:
        """Trains on the training events; the validation events choose the epoch."""
        held_out = (self.job.dataset.interactions.split == VALID).any()
        state = self.trainer.fit(
            self._batches("select"),
            work_dir=self.job.work / "select",
            title="retrieval",
            validate=self._validate if held_out else None,
            callbacks=self.job.trackers("retrieval"),
        )
        self._chosen = [v.numpy() for v in self.model.trainable_variables]
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
        )

    def write(self, folder: Path, cut: str) -> None:
        """Writes weights and vectors of a cut."""
        (folder / cut).mkdir()
        tf.train.Checkpoint(model=self.model).write(str(folder / cut / "weights"))
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

    def _known(self, cut: str) -> NDArray[np.bool_]:
        """bool (n + 1,): the items that the events of a cut are of."""
        known = np.zeros(len(self.job.dataset.catalog), bool)
        known[cut_of(self.job.dataset.interactions, cut).item] = True
        known[0] = False
        return known

    def _text(self) -> Floats:
        if self.model.encoder is None:
            return self.text
        return _vectors_of(self.model.encoder.encode, self.job.dataset.catalog)

    def _batches(self, cut: str) -> TrainingBatches:
        dataset, config = self.job.dataset, self.config
        events = cut_of(dataset.interactions, cut)
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
            self.batch_size = _batch_size(config.batch_size, rows, unit)
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
        engine = TensorFlowEngine(self.model, None, self.job.adapt)
        recommender = _recommender(
            self.job.dataset, engine, self.vectors("select"), self.text, self.profile
        )
        history, wanted = _judged(self.job.dataset.interactions)
        users, targets, offsets, times = _wanted(wanted)
        cold = np.flatnonzero(~self._known("select")).astype(np.int32)
        # Where every target is a cold item, what tells one such item from another is judged.
        among = cold[1:] if np.isin(targets, cold).all() else None
        asked = recommender.lists(history, users, 10, request_time=times, among=among)
        found = metrics.ranking(asked["retrieval"].ids, targets, offsets, [10])
        return {name: float(found[name].mean()) for name in ("ndcg@10", "hr@10")}


def _batch_size(wanted: int, rows: PackedSequences, unit: int) -> int:
    """Rows of a batch: fewer than ``wanted`` where the data does not fill LEAST_STEPS of them.

    A multiple of ``unit``, the pieces that a batch is cut into.
    """
    room = len(rows.epoch(0)["item"]) // LEAST_STEPS
    return min(wanted, max(room // unit, 1) * unit)


def _wanted(events: Interactions) -> tuple[Rows, Rows, NDArray[np.int64], Times]:
    """Users with such events, the events' items, offsets of each user's, first times."""
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


def _encoder(config: AdaptConfig, dataset: Dataset) -> TextEncoder | None:
    if config.text == "none" or not any((*dataset.catalog.texts, *dataset.users.texts)):
        return None
    return TextEncoder.load(
        config.text, length=config.text_length, trainable=config.text_mode == "full"
    )


def _encoded(
    encoder: TextEncoder | None, table: Table, role: Literal["passage", "query"]
) -> Floats:
    """float32 (rows, text width); zero for rows without a text, width 0 if no row has one."""
    if encoder is None or not any(table.texts):
        return np.zeros((len(table), 0), np.float32)
    return _vectors_of(lambda texts: encoder.encode_cached(texts, role=role, progress=True), table)


def _vectors_of(encode: Any, table: Table) -> Floats:
    rows = [row for row, text in enumerate(table.texts) if text]
    found = encode([table.texts[row] for row in rows])
    out = np.zeros((len(table), found.shape[1]), np.float32)
    out[rows] = found
    return out


def _tokens(
    encoder: TextEncoder | None, dataset: Dataset
) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    return encoder.tokenize(dataset.catalog.texts, role="passage") if encoder else None


# --- ranking ---


def _ranking(job: _Job, folder: Path) -> dict[str, Any]:
    set_seed(job.config.seed)
    config = job.adapt.ranking
    set_precision(config.precision)
    retrieval = job.parents["retrieval"]
    linear_settings = _linear(job, folder, config)
    base = recommender_of(job.dataset, retrieval, None, "select")
    base.linear = _read_linear(folder, "select")
    base.policy = Policy(config.candidates, config.history, {"retrieval": 1.0})
    tasks = _tasks(job.dataset)
    ranker, sizes, state = _train_ranker(job, base, tasks)
    policy, found = _choose_policy(job, base, tasks)
    tf.train.Checkpoint(model=ranker).write(str(folder / "weights"))
    told = {
        "candidates": policy.candidates,
        "history": policy.history,
        "score": dict(policy.score),
        "text_decay": policy.text_decay,
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
    train = cut_of(job.dataset.interactions, "select")
    valid = job.dataset.interactions.part(VALID)
    matrix = matrix_of(train, items)
    chosen = choose("ease", matrix, Ragged(valid.offsets, valid.item), matrix, job.config.seed)
    settings = dict(chosen.settings)
    for cut in job.cuts:
        events = cut_of(job.dataset.interactions, cut)
        weights = Ease(**settings).fit(matrix_of(events, items)).weights
        if config.linear_of_new:
            known = np.bincount(events.item, minlength=items + 1) > 0
            text = read_text(job.parents["retrieval"], cut)
            weights = carry_over(weights, text, job.dataset.catalog.features, known)
        (folder / cut).mkdir(exist_ok=True)
        np.save(folder / cut / "linear.npy", np.asarray(weights, np.float32))
    return settings


def _read_linear(folder: Path, cut: str) -> LinearItems | None:
    path = folder / cut / "linear.npy"
    return LinearItems(read_array(path)) if path.exists() else None


def _tasks(dataset: Dataset) -> tuple[str, ...]:
    events = dataset.interactions
    tasks = ["click"]
    if np.isfinite(events.rating).any():
        tasks += ["like", "rating"]
    if "purchase" in events.event_names:
        tasks.append("conversion")
    return tuple(tasks)


def _train_ranker(
    job: _Job, base: Recommender, tasks: tuple[str, ...]
) -> tuple[Ranker, dict[str, Any], Progress]:
    dataset, config = job.dataset, job.adapt.ranking
    train = base.interactions
    rated = train.rating[np.isfinite(train.rating)]
    sizes: dict[str, Any] = {
        "embedding_dim": int(base.vectors.shape[1]),
        "attributes_width": int(dataset.catalog.features.shape[1]),
        "user_attributes_width": int(dataset.users.features.shape[1]),
        "rating_mean": float(rated.mean()) if len(rated) else 0.0,
        "rating_std": float(max(rated.std(), 1e-3)) if len(rated) else 1.0,
    }
    everyone = np.arange(len(dataset.users), dtype=np.int32)
    found = base.lists(train, everyone, config.candidates)["retrieval"].ids
    batches = ranking_batches(
        config,
        histories=Histories.of(train, base.coding),
        interactions=train,
        vectors=base.vectors,
        query_vectors_of=lambda users, histories, times: _queries(base, users, histories, times),
        hard=Ragged.of([ids[ids > 0] for ids in found]),
        attributes=dataset.catalog.features,
        user_attributes=dataset.users.features,
        scalars_of=lambda users, query, histories, rows: _scalars(base, query, histories, rows),
        seed=job.config.seed,
        replicas=job.placement.replicas,
        tasks=tasks,
    )
    with job.placement.strategy.scope():
        ranker = Ranker(config, num_scalars=len(SCALARS), tasks=tasks, **sizes)
    ranker.adapt_scalars(batches.sample_scalars())
    assert isinstance(base.engine, TensorFlowEngine)
    base.engine = TensorFlowEngine(base.engine.two_tower, ranker, job.adapt)
    state = Trainer(ranker, config, job.placement).fit(
        batches,
        work_dir=job.work / "select",
        title="ranking",
        validate=_ranker_validation(job, base, tasks),
        callbacks=job.trackers("ranking"),
    )
    return ranker, sizes, state


def _ranker_validation(
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


def _validated(job: _Job, base: Recommender, most: int) -> tuple[Who, Rows]:
    """At most so many users with events to be foreseen, and the first such item of each.

    Users without an event before are left out: the chain is not for them.
    """
    history, wanted = _judged(job.dataset.interactions)
    users, targets, offsets, times = _wanted(wanted)
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
    return replace(policy, score=score), found


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
        rows = base.candidates(asked, query, policy.candidates, asked.seen, index, policy)
        all_parts.append(base.parts(asked, query, rows, policy))
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
    """Mean NDCG@10 of one target a user; a target that is no candidate is a miss."""
    hit = rows == target[:, None]
    wanted = np.where(hit, score, -np.inf).max(axis=1, keepdims=True)
    place = ((score > wanted) & (rows > 0)).sum(axis=1) + 1
    gain = np.where(hit.any(axis=1) & (place <= 10), 1 / np.log2(place + 1), 0.0)
    return float(gain.mean())
