"""tune: a search for the settings with the best validation NDCG@10, by Optuna.

Trial 0 is the configuration as it is, so that the gain is told honestly; the others are proposed by
a tree-structured Parzen estimator (TPE; Bergstra et al., 2011, "Algorithms for Hyper-Parameter
Optimization") and run by Optuna (Akiba et al., 2019, arXiv:1907.10902). A trial trains on the
training events and is judged by the validation events; the test events are not looked at.

A trial is a process of its own, :mod:`tfrec.trial`; this one needs no TensorFlow.

The trials of one recipe (data, configuration, space) are a study, in a SQLite file of its own at
``DIR/.tune.work``. What a process has finished there survives it; the trial that it was at goes on
from its last checkpoint in the next process. Several processes may work on one study.
"""

from __future__ import annotations

import fcntl
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

import tfrec
from tfrec.artifact import Artifact, current, recipe_digest, write_json, writing
from tfrec.config import SIZES, Config
from tfrec.errors import ArtifactError, ConfigError, InputError, SetupError, TfrecError
from tfrec.report import tuning
from tfrec.stages import prepare

KIND = FOLDER = "tune"

SPACES: dict[str, dict[str, Any]] = {
    "retrieval": {
        "adapt.retrieval.learning_rate": {"low": 3e-4, "high": 1e-2, "log": True},
        "adapt.retrieval.dropout": {"low": 0.0, "high": 0.6},
        "adapt.retrieval.id_dropout": {"low": 0.0, "high": 0.5},
        "adapt.retrieval.embedding_dim": [32, 64, 128],
        "adapt.retrieval.layers": {"low": 1, "high": 3},
        "adapt.retrieval.batch_size": [32, 64, 128],
        "adapt.retrieval.ema": [0.0, 0.95, 0.99, 0.995],
    },
    "ranking": {
        "adapt.ranking.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "adapt.ranking.dropout": {"low": 0.0, "high": 0.5},
        "adapt.ranking.batch_size": [128, 256, 512, 1024],
        "adapt.ranking.negatives": {"low": 3, "high": 31, "log": True},
        "adapt.ranking.hidden": [32, 64, 128],
        "adapt.ranking.experts": [2, 4, 8],
        "adapt.ranking.cross_layers": {"low": 0, "high": 3},
    },
}
"""What is searched where ``tune.space`` says nothing."""

RANDOM_TRIALS = 6
"""Trials before the sampler begins to learn from them."""

LEAST_IMPORTANCE = 10
"""Complete trials from which on the importance of the settings is worth a look."""

HOPELESS = 3
"""A trial in which so many processes died, none further than the one before, has failed."""

_CHILD = (sys.executable, "-m", "tfrec.trial")

_KINDS = {kind.__name__: kind for kind in (ArtifactError, ConfigError, InputError, SetupError)}

_STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}

_say: Callable[[str], None] = functools.partial(print, flush=True)


def run(
    config: Config, out: Path, *, force: bool = False, say: Callable[[str], None] = _say
) -> Artifact:
    """Searches until there are ``tune.trials`` trials, and leaves the best at ``out/tune``.

    What the search stands on (``out/prepare``, and ``out/adapt/retrieval`` to tune the ranking) is
    made first if it is not there. The same call goes on with a search that was stopped or killed;
    more trials add to it.

    Args:
      config: What is tuned; its ``[tune]`` section says how.
      out: The run's folder.
      force: Forget the trials of this very search and begin anew.
      say: Gets a line as each trial ends.

    Returns:
      An artifact of the kind ``tune``: ``best.toml``, ``trials.json``, ``trials.csv`` and
      ``report.html``.

    Raises:
      ConfigError: the space or a setting is wrong, or the configuration as it is cannot be trained.
      InputError: there are no validation events.
      SetupError: the study cannot be written.
    """
    out = Path(out)
    _check(config)
    shelf = out / f".{FOLDER}.work"
    with _disk_errors(shelf):
        shelf.mkdir(parents=True, exist_ok=True)
        with _locked(shelf / "inputs.lock"):
            parents = _inputs(config, out, say)
        search = _Search.open(config, out, shelf, parents, force, say)
        try:
            with search.at_work() as worker:
                search.go_on(worker)
        except KeyboardInterrupt:
            with suppress(InputError):
                search.publish()
            raise
        return search.publish()


def summary(artifact: Artifact) -> str:
    """What the search found, for the terminal."""
    return tuning.text(tuning.read(artifact.path), artifact.path)


def _check(config: Config) -> None:
    settings = config.tune
    several = bool(os.environ.get("TF_CONFIG")) and config.adapt.distribution == "auto"
    if several or config.adapt.distribution == "multi_worker":
        raise ConfigError(
            "a trial is not spread over several workers; leave TF_CONFIG away, with "
            "adapt.distribution=auto: several commands on one machine share the trials of a search"
        )
    scored = [key for key in settings.space if key.startswith("adapt.ranking.score")]
    if settings.task == "ranking" and (config.adapt.ranking.score or scored):
        raise ConfigError(
            "adapt.ranking.score is chosen on validation in each trial of a ranking; leave it empty"
        )


def _inputs(config: Config, out: Path, say: Callable[[str], None]) -> dict[str, Artifact]:
    say(f"prepare: {config.data.source}")
    parents = {"dataset": prepare.run(config, out)}
    if not parents["dataset"].metrics["split"].get("valid"):
        raise InputError(
            "there are no validation events to tune on; take a data.split that holds some out"
        )
    if config.tune.task == "retrieval" and config.adapt.encoder:
        parents["encoder"] = Artifact.peek(config.adapt.encoder_folder(out), "encoder")
    if config.tune.task == "ranking":
        say("adapt: retrieval")
        place = out / "adapt" / "retrieval"
        order = {"config": config.dump(), "task": "retrieval", "out": str(out), "inputs": str(out)}
        ending = _apart(order, out / f".{FOLDER}.work" / "inputs")
        if ending["state"] == "failed":
            raise _error_of(ending)
        parents["retrieval"] = Artifact.peek(place, "retrieval")
    return parents


def _usual_space(config: Config) -> dict[str, Any]:
    """What is searched where the configuration names nothing."""
    space = SPACES[config.tune.task]
    if not config.adapt.encoder:
        return space
    given = {f"adapt.retrieval.{name}" for name in SIZES}  # those of the encoder
    return {key: values for key, values in space.items() if key not in given}


def _recipe(config: Config, space: Mapping[str, Any]) -> dict[str, Any]:
    """What must be the same for two trials to be comparable: the test of ``out/tune`` too."""
    tune = config.tune
    tuned = config.changed(_fixed(config))
    if tune.task == "retrieval":
        settings = tuned.adapt.model_dump(mode="json", exclude={"ranking", "tracking"})
    else:
        settings = {"ranking": tuned.adapt.ranking.model_dump(mode="json")}
    return {
        "seed": config.seed,
        "adapt": settings,
        "tune": {"task": tune.task, "pruner": tune.pruner, "space": dict(space)},
    }


def _fixed(config: Config) -> dict[str, Any]:
    """What is different in a trial whatever its values: it is short and leaves nothing behind."""
    task, cap = config.tune.task, config.tune.epochs
    epochs = config.at(f"adapt.{task}.epochs")
    return {
        "adapt.refit": False,
        "adapt.tracking": [],
        f"adapt.{task}.epochs": min(epochs, cap) if cap else epochs,
    }


# --- a study -------------------------------------------------------------------------------------


@dataclass
class _Search:
    """The trials of one recipe, and where they are kept."""

    config: Config
    out: Path
    home: Path
    space: Mapping[str, BaseDistribution]
    recipe: Mapping[str, Any]
    parents: Mapping[str, Artifact]
    study: optuna.Study
    storage: optuna.storages.RDBStorage
    say: Callable[[str], None]

    @classmethod
    def open(
        cls,
        config: Config,
        out: Path,
        shelf: Path,
        parents: Mapping[str, Artifact],
        force: bool,
        say: Callable[[str], None],
    ) -> _Search:
        told = config.tune.space or _usual_space(config)
        recipe = _recipe(config, told)
        digest = recipe_digest(KIND, recipe, parents)[:16]
        home = shelf / digest
        if force:
            shutil.rmtree(home, ignore_errors=True)
        others = [path for path in shelf.iterdir() if path.is_dir() and path != home]
        if others and not home.exists():
            say("a new study: data, configuration or space are not those of the earlier trials")
        home.mkdir(exist_ok=True)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with _locked(home / "lock"):
            storage = optuna.storages.RDBStorage(
                f"sqlite:///{home / 'study.db'}", engine_kwargs={"connect_args": {"timeout": 60}}
            )
            study = optuna.create_study(
                storage=storage,
                study_name=digest,
                direction="maximize",
                load_if_exists=True,
            )
        space = {key: _distribution(config, key, dimension) for key, dimension in told.items()}
        return cls(config, out, home, space, recipe, parents, study, storage, say)

    @property
    def task(self) -> Literal["retrieval", "ranking"]:
        return self.config.tune.task

    @contextmanager
    def at_work(self) -> Iterator[str]:
        """A name of this process, whose lock the system lets go when the process ends, however."""
        name = uuid.uuid4().hex
        file = self.home / f"worker-{name}.lock"
        try:
            with _locked(file):
                yield name
        finally:
            file.unlink(missing_ok=True)

    def go_on(self, worker: str) -> None:
        """Runs trials until there are enough or the time is over."""
        began, wanted = time.monotonic(), self.config.tune.trials
        before = len(self.finished())
        if before:
            self.say(f"{before} trials are there already")
        while taken := self.take(worker, self._late(began)):
            self.attempt(*taken)
            self.say(tuning.line(self.standing(), taken[0].number, wanted))

    def _late(self, began: float) -> bool:
        limit = self.config.tune.timeout
        return bool(limit) and time.monotonic() - began >= limit

    def finished(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=tuple(_STATES.values()))

    def take(self, worker: str, late: bool) -> tuple[Trial, dict[str, Any]] | None:
        """The next trial and its values, as this process's own; None if there are enough."""
        with _locked(self.home / "lock"):
            self._give_back_the_dead()
            trials = self.study.get_trials(deepcopy=False)
            waiting = [t.number for t in trials if t.state == TrialState.WAITING]
            number = min([*waiting, len(trials)])
            if number >= self.config.tune.trials or (late and number):
                return None
            if not trials:
                self.study.enqueue_trial(self._base())
            # Drawn anew for each trial, so that no process draws what another has drawn.
            drawn = np.random.SeedSequence([self.config.seed, number]).generate_state(1)
            self.study.sampler = optuna.samplers.TPESampler(
                seed=int(drawn[0]), n_startup_trials=RANDOM_TRIALS
            )
            trial = self.study.ask()
            keys = self._base() if trial.number == 0 else self.space
            values = {key: _suggest(trial, key, self.space[key]) for key in keys}
            trial.set_user_attr("worker", worker)
            return trial, values

    def _base(self) -> dict[str, Any]:
        """The configuration's own values, where the space has them."""
        own = {key: self.config.at(key) for key in self.space}
        return {key: value for key, value in own.items() if _holds(self.space[key], value)}

    def _give_back_the_dead(self) -> None:
        """Lets trials whose process is gone be taken again, under their own numbers."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            file = self.home / f"worker-{trial.user_attrs.get('worker', '')}.lock"
            if _is_locked(file):
                continue
            file.unlink(missing_ok=True)
            reached, times = trial.user_attrs.get("died", [-1, 0])
            step = trial.last_step or 0
            times = times + 1 if step == reached else 1
            self.storage.set_trial_user_attr(trial._trial_id, "died", [step, times])
            if times < HOPELESS or trial.number == 0:
                self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
                continue
            reason = f"{times} processes ended in it without a word; memory is the likeliest cause"
            self.storage.set_trial_user_attr(trial._trial_id, "reason", reason)
            self.storage.set_trial_state_values(trial._trial_id, TrialState.FAIL)

    def attempt(self, trial: Trial, values: Mapping[str, Any]) -> None:
        """Trains and judges a trial; what goes wrong in it is written down, and the search goes on.

        What would go wrong in any trial ends the search, and the trial can be taken again.
        """
        began = time.monotonic()
        folder = self.home / f"trial-{trial.number}"
        try:
            ending = self.train(trial, values, folder)
            # What fails in trial 0 would fail in others, and with it nothing can be compared.
            if ending["state"] == "failed" and (
                trial.number == 0 or ending["kind"] in ("ArtifactError", "SetupError")
            ):
                raise _error_of(ending)
        except BaseException:
            self.storage.set_trial_state_values(trial._trial_id, TrialState.WAITING)
            raise
        made = ending.get("metrics", {})
        told = {key: made[key] for key in ("weights", "train_seconds") if key in made}
        told |= {"reason": ending["reason"]} if ending["state"] == "failed" else {}
        told["seconds"] = round(time.monotonic() - began, 1)
        for key, one in told.items():
            trial.set_user_attr(key, one)
        self.study.tell(trial, made.get("validation"), _STATES[ending["state"]])
        shutil.rmtree(folder, ignore_errors=True)

    def train(self, trial: Trial, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """What :func:`tfrec.trial.run` says of a trial."""
        try:
            order = self.order(trial, values, folder)
        except ConfigError as error:
            return {"state": "failed", "kind": "ConfigError", "reason": str(error)}
        return _apart(order, folder)

    def order(self, trial: Trial, values: Mapping[str, Any], folder: Path) -> dict[str, Any]:
        """What :func:`tfrec.trial.run` is told of a trial."""
        fixed = _fixed(self.config)
        epochs = f"adapt.{self.task}.epochs"
        if epochs in values:
            fixed[epochs] = min(values[epochs], self.config.tune.epochs or values[epochs])
        return {
            "config": self.config.changed({**values, **fixed}).dump(),
            "task": self.task,
            "out": str(folder),
            "inputs": str(self.out),
            "database": str(self.home / "study.db"),
            "study": self.study.study_name,
            "trial": trial._trial_id,
            "pruner": self.config.tune.pruner,
            "validate_every": self.config.at(f"adapt.{self.task}.validate_every"),
        }

    # --- what is left ---

    def standing(self) -> dict[str, Any]:
        """The trials so far, as plain values."""
        base = {key: self.config.at(key) for key in self.space}
        trials = [_told(trial, base) for trial in self.finished()]
        complete = [trial for trial in trials if trial["state"] == "complete"]
        best = max(complete, key=lambda t: t["value"], default=None)
        return {
            "task": self.task,
            "base": base,
            "trials": trials,
            "best": best["number"] if best else None,
        }

    def tree(self) -> dict[str, Any]:
        """Everything that the report shows, as plain values.

        Raises:
          InputError: trial 0 has not ended.
        """
        told = self.standing()
        values = {trial["number"]: trial["values"] for trial in told["trials"]}
        if 0 not in values:
            raise InputError(
                "trial 0, the configuration as it is, has not ended, so there is nothing to "
                "compare with; the same command goes on when no other process is at it"
            )
        ready = {**values[told["best"]], "name": f"{self.config.name}-tuned"}
        return {
            **told,
            "name": self.config.name,
            "seed": self.config.seed,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "tfrec_version": tfrec.__version__,
            "optuna_version": optuna.__version__,
            "pruner": self.config.tune.pruner,
            "epochs": _fixed(self.config)[f"adapt.{self.task}.epochs"],
            "epochs_configured": self.config.at(f"adapt.{self.task}.epochs"),
            "space": self.recipe["tune"]["space"],
            "toml": self.config.changed(ready).toml(),
            "importance": self._importance(),
        }

    def _importance(self) -> dict[str, float] | None:
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        # Trial 0 may have values that the space does not.
        inside = [trial for trial in complete if set(trial.params) == set(self.space)]
        if len(inside) < LEAST_IMPORTANCE:
            return None
        known = optuna.create_study(direction="maximize")
        known.add_trials(inside)
        found = get_param_importances(known, evaluator=PedAnovaImportanceEvaluator())
        return {key: float(share) for key, share in found.items()}

    def publish(self) -> Artifact:
        """Leaves what is known so far at ``out/tune``, if it is not there already."""
        with _locked(self.home / "lock"):
            tree = self.tree()
            place = self.out / FOLDER
            found = current(place, kind=KIND, config=self.recipe, parents=self.parents)
            if found is not None and found.metrics["trials"] == len(tree["trials"]):
                return found
            with writing(place, kind=KIND, config=self.recipe, parents=self.parents) as draft:
                tuning.write(tree, draft.path)
                draft.metrics |= tuning.measured(tree)
            return Artifact.peek(place, KIND)


def _distribution(config: Config, key: str, told: Any) -> BaseDistribution:
    if isinstance(told, list):
        return CategoricalDistribution(told)
    low, high, step, log = told["low"], told["high"], told.get("step"), told.get("log", False)
    if isinstance(config.at(key), int):
        return IntDistribution(low, high, log=log, step=step or 1)
    return FloatDistribution(low, high, log=log, step=step)


def _suggest(trial: Trial, key: str, told: BaseDistribution) -> Any:
    if isinstance(told, IntDistribution):
        return trial.suggest_int(key, told.low, told.high, step=told.step, log=told.log)
    if isinstance(told, FloatDistribution):
        return trial.suggest_float(key, told.low, told.high, step=told.step, log=told.log)
    assert isinstance(told, CategoricalDistribution)
    return trial.suggest_categorical(key, told.choices)


def _holds(told: BaseDistribution, value: Any) -> bool:
    """Whether a value is one that the search could come to."""
    if isinstance(told, CategoricalDistribution):
        return value in told.choices
    assert isinstance(told, IntDistribution | FloatDistribution)
    steps = (value - told.low) / told.step if told.step else 0.0
    return bool(told.low <= value <= told.high and abs(steps - round(steps)) < 1e-9)


def _told(trial: FrozenTrial, base: Mapping[str, Any]) -> dict[str, Any]:
    curve = sorted(trial.intermediate_values.items())
    reached = max((value for _, value in curve), default=None)
    done = trial.state == TrialState.COMPLETE
    return {
        "number": trial.number,
        "state": next(name for name, state in _STATES.items() if state == trial.state),
        "value": trial.value if done else None,
        "reached": reached,
        "values": {**base, **trial.params},
        "curve": [[epoch, value] for epoch, value in curve],
        "epochs": curve[-1][0] if curve else 0,
        "weights": trial.user_attrs.get("weights"),
        "seconds": trial.user_attrs.get("seconds"),
        "train_seconds": trial.user_attrs.get("train_seconds"),
        "reason": trial.user_attrs.get("reason", ""),
    }


# --- a trial's process ---------------------------------------------------------------------------


def _apart(order: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """What :func:`tfrec.trial.run` says, in another process that ends with this one."""
    folder.mkdir(parents=True, exist_ok=True)
    told = folder / "ending.json"
    told.unlink(missing_ok=True)
    write_json(folder / "order.json", order)
    process = subprocess.Popen(
        [*_CHILD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for this process, which then ends the other
    )
    assert process.stdin is not None
    try:
        code = process.wait()
    finally:
        process.stdin.close()
        process.wait()
    if told.exists():
        ending: dict[str, Any] = json.loads(told.read_text("utf-8"))
        return ending
    how = f"with exit code {code}"
    if code < 0:
        how = f"by {signal.Signals(-code).name}"
    why = "; the system does so where memory runs out" if code == -signal.SIGKILL else ""
    return {"state": "failed", "kind": "", "reason": f"its process was ended {how}{why}"}


def _error_of(ending: Mapping[str, Any]) -> Exception:
    if "traceback" in ending and not ending["kind"]:
        error = RuntimeError(ending["reason"])
        error.__cause__ = RuntimeError(ending["traceback"])
        return error
    if not ending["kind"]:
        return SetupError(f"the training of the configuration as it is: {ending['reason']}")
    return _KINDS.get(ending["kind"], TfrecError)(ending["reason"])


# --- several processes ---------------------------------------------------------------------------


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Within the block no other process is in a block of this file."""
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _is_locked(file: Path) -> bool:
    try:
        with file.open() as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False


@contextmanager
def _disk_errors(shelf: Path) -> Iterator[None]:
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise SetupError(
            f"the study below {shelf} cannot be read or written ({cause}); look after the disk, or "
            "begin anew with --force"
        ) from None
