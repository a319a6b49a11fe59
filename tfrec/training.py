"""The fit loop that every trained stage shares: checkpoints, resume, validation, tracking.

A training is a number of epochs over batches that are the same for the same seed. After an epoch
everything needed to go on is written to ``work_dir``: a process killed at any moment continues
from there with the same command and the same batches.
"""

from __future__ import annotations

import itertools
import json
import math
import resource
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from tfrec.artifact import write_json
from tfrec.config import TrainingConfig
from tfrec.distribution import Placement
from tfrec.errors import ConfigError, TfrecError
from tfrec.models.keras_bridge import tf, tf_keras

GOAL = "ndcg@10"
SHAPES = ("constant", "linear", "cosine")
RESUMES = "free some and run the same command again, which goes on from the last checkpoint"
"""What to do when a disk was full while something was trained."""

Metrics = dict[str, float]


class Batches(Protocol):
    """What can be trained on: see :class:`tfrec.models.batches.TrainingBatches`."""

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch."""

    def dataset(self, first_epoch: int = 0, worker: int = 0, workers: int = 1) -> Any:
        """An endless tf.data.Dataset that starts with ``first_epoch``."""


class TrainingDivergedError(TfrecError):
    """The loss is not a number any more."""


@dataclass
class Progress:
    """How far a training is; what ``state.json`` holds.

    Attributes:
      epoch: Epochs done.
      seconds: Time spent in them, validation left out.
      best: Best validation so far, by NDCG@10 or another goal; -1 before the first.
      best_epoch: The epoch that had it.
      stale: Validations since then.
      history: A record for each epoch.
      checkpoint: Name of the checkpoint that belongs to this state.
    """

    epoch: int = 0
    seconds: float = 0.0
    best: float = -1.0
    best_epoch: int = 0
    stale: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    checkpoint: str = ""


class Schedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then constant, or down to zero at ``steps`` by a line or a half cosine.

    Its numbers are variables, so that one compiled training step serves several schedules.
    """

    def __init__(
        self, peak: float, warmup: int = 1, steps: int = 1, shape: str = SHAPES[0]
    ) -> None:
        self._peak, self._warmup, self._steps, self._shape = (
            tf.Variable(0.0, trainable=False, name=name)
            for name in ("peak", "warmup", "steps", "shape")
        )
        self.follow(peak, warmup, steps, shape)

    def follow(self, peak: float, warmup: int, steps: int, shape: str) -> None:
        """Takes another course, counted in updates from 0."""
        self._peak.assign(peak)
        self._warmup.assign(float(max(min(warmup, steps), 1)))
        self._steps.assign(float(steps))
        self._shape.assign(float(SHAPES.index(shape)))

    def __call__(self, step: Any) -> Any:
        """Learning rate of an update, counted from 0."""
        now = tf.cast(step, tf.float32)
        rise = tf.minimum((now + 1) / self._warmup, 1.0)
        span = tf.maximum(self._steps - self._warmup, 1.0)
        done = tf.clip_by_value((now - self._warmup) / span, 0.0, 1.0)
        falls = tf.stack([tf.ones_like(done), 1 - done, 0.5 * (1 + tf.cos(math.pi * done))])
        return self._peak * rise * tf.gather(falls, tf.cast(self._shape, tf.int32))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "peak": float(self._peak.numpy()),
            "warmup": int(self._warmup.numpy()),
            "steps": int(self._steps.numpy()),
            "shape": SHAPES[int(self._shape.numpy())],
        }


class Rate(Protocol):
    """How fast a variable learns: see :class:`tfrec.models.tuning.Rate`."""

    @property
    def share(self) -> float:
        """Its learning rate, in that of the training."""

    @property
    def wait(self) -> int:
        """Epochs before it moves."""


class Optimizer(tf_keras.optimizers.AdamW):
    """AdamW that can start again, with a learning rate for each variable if asked.

    It leaves it to us when the model gets the averaged weights.
    """

    _rates: Sequence[Rate] = ()
    _shares: Any = None
    _share: Any = None  # of the variable that is being updated

    def set_rates(self, rates: Sequence[Rate]) -> None:
        """Scales the learning rate, and with it the weight decay, of each variable it was built on.

        The shares are values and no part of the graph: :meth:`begin_epoch` changes them.
        """
        self._rates = tuple(rates)
        self._shares = tf.Variable([rate.share for rate in rates], trainable=False, name="shares")

    def begin_epoch(self, epoch: int) -> None:
        """Lets those variables move that have waited long enough; epochs count from 0."""
        if self._rates:
            self._shares.assign([r.share if epoch >= r.wait else 0.0 for r in self._rates])

    @tf_keras.optimizers.AdamW.learning_rate.getter
    def learning_rate(self) -> Any:
        """The schedule's, times the share of the variable that is being updated."""
        rate = tf_keras.optimizers.AdamW.learning_rate.fget(self)
        return rate if self._share is None else rate * self._share

    def apply_gradients(self, grads_and_vars: Any, *arguments: Any, **settings: Any) -> Any:
        """As Keras does; what waits counts for nothing in the norm that is clipped either."""
        if self._rates:
            grads_and_vars = [
                (tf.where(self._share_of(v) > 0, gradient, tf.zeros_like(gradient)), v)
                for gradient, v in grads_and_vars
            ]
        return super().apply_gradients(grads_and_vars, *arguments, **settings)

    def update_step(self, gradient: Any, variable: Any) -> None:
        """AdamW's, with the decay."""
        self._share = self._share_of(variable) if self._rates else None
        try:
            if self.weight_decay:
                decay = tf.cast(self.learning_rate * self.weight_decay, variable.dtype)
                variable.assign_sub(variable * decay)
            super().update_step(gradient, variable)
        finally:
            self._share = None

    def _apply_weight_decay(self, variables: Sequence[Any]) -> None:
        """Nothing: :meth:`update_step` does it, which knows each variable's rate."""

    def _update_model_variables_moving_average(self, var_list: Sequence[Any]) -> None:
        """Keras' average, written so that the average of a constant is that constant to the bit."""
        if not self.use_ema:
            return

        def update(average: Any, variable: Any) -> None:
            average.assign_add((1 - self.ema_momentum) * (variable - average))

        for variable in var_list:
            average = self._model_variables_moving_average[self._place(variable)]
            self._distribution_strategy.extended.update(
                average, update, args=(variable,), group=False
            )

    def _share_of(self, variable: Any) -> Any:
        return self._shares[self._place(variable)]

    def _place(self, variable: Any) -> int:
        place: int = self._index_dict[self._var_key(variable)]
        return place

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Nothing: Keras calls it at the end of every fit, also where no average is wanted."""

    def put_average(self, variables: Sequence[Any]) -> None:
        """Gives the model's variables the moving average of their values."""
        super().finalize_variable_values(variables)

    def start_again(self, variables: Sequence[Any]) -> None:
        """Takes the state of the first step of a training that begins with these values."""
        for state in self.variables:
            state.assign(tf.zeros_like(state))
        if self.use_ema:
            for average, value in zip(self._model_variables_moving_average, variables, strict=True):
                average.assign(tf.convert_to_tensor(value))


class Trainer:
    """A model with its optimizer, compiled once for any number of fits.

    The optimizer is AdamW with warm-up, schedule, clipping and a moving average of the weights;
    with mixed_float16 it scales the loss.

    Args:
      model: A tf_keras model made under the placement's strategy, all weights built.
      config: How it is trained.
      placement: Where it runs.
      rates: One for each of the model's trainable variables, in their order; empty: all learn at
        the learning rate, from the start.

    Raises:
      ConfigError: a batch cannot be cut into as many pieces as there are replicas and parts.
    """

    def __init__(
        self,
        model: Any,
        config: TrainingConfig,
        placement: Placement,
        rates: Sequence[Rate] = (),
    ) -> None:
        self.model, self.config, self.placement = model, config, placement
        if config.batch_size % (placement.replicas * config.accumulate):
            raise ConfigError(
                f"batch_size = {config.batch_size} cannot be cut into accumulate = "
                f"{config.accumulate} pieces on {placement.replicas} replicas; take a multiple of "
                f"{placement.replicas * config.accumulate}"
            )
        with placement.strategy.scope():
            self.schedule = Schedule(config.learning_rate)
            self.optimizer = Optimizer(
                learning_rate=self.schedule,
                weight_decay=config.weight_decay,
                beta_2=0.98,
                global_clipnorm=config.clip_norm or None,
                use_ema=config.ema > 0,
                ema_momentum=config.ema or 0.99,
                ema_overwrite_frequency=None,
                jit_compile=False,
            )
            self.whole = self.optimizer
            if config.precision == "mixed_float16":
                self.whole = tf_keras.mixed_precision.LossScaleOptimizer(self.optimizer)
            compiled = config.jit_compile and placement.compiles
            model.compile(optimizer=self.whole, jit_compile=compiled)
            self.optimizer.build(model.trainable_variables)
            if any(rate.share != 1 or rate.wait for rate in rates):
                self.optimizer.set_rates(rates)

    def fit(
        self,
        batches: Batches,
        *,
        work_dir: Path,
        title: str,
        epochs: int | None = None,
        schedule: str | None = None,
        warmup: int | None = None,
        peak: float | None = None,
        validate: Callable[[], Metrics] | None = None,
        goal: str = GOAL,
        averaged: bool = True,
        waited: int = 0,
        callbacks: Sequence[Any] = (),
    ) -> Progress:
        """Trains the model and leaves it with the weights of its best validation.

        Without ``validate`` the weights at the end are kept.

        Args:
          batches: What it is trained on.
          work_dir: Where checkpoints are; a finished training found there is not repeated.
          title: What the progress bar says.
          epochs: Instead of the configured ones.
          schedule: Instead of the configured one.
          warmup: Steps, instead of the configured ones.
          peak: Learning rate, instead of the configured one.
          validate: Returns metrics, among them the goal, of the model as it is.
          goal: Name of the metric that chooses the weights; more is better.
          averaged: Whether it is the moving average of the weights, if there is one, that is
            validated and kept; it begins with the weights that the model has now.
          waited: Epochs of earlier fits that count for what waits before it moves.
          callbacks: Further tf_keras callbacks, for tracking; they see the metrics as logs.

        Returns:
          The state at the end, with a record of every epoch.

        Raises:
          TrainingDivergedError: the loss became NaN or infinite.
        """
        config, steps = self.config, batches.steps_per_epoch
        epochs = epochs or config.epochs
        self.optimizer.start_again(self.model.trainable_variables)
        self.schedule.follow(
            peak or config.learning_rate,
            config.warmup_steps if warmup is None else warmup,
            epochs * steps,
            schedule or config.schedule,
        )
        keeper = _Keeper(self, work_dir, averaged)
        state = keeper.resume()
        over = state.epoch >= epochs or (config.patience and state.stale >= config.patience)
        if not over:
            loop = _Loop(state, keeper, epochs, steps, title, validate, waited, goal)
            try:
                self.model.fit(
                    _distributed(batches, self.placement, state.epoch),
                    initial_epoch=state.epoch,
                    epochs=epochs,
                    steps_per_epoch=steps,
                    callbacks=[loop, *callbacks],
                    verbose=0,
                )
            finally:
                loop.close()
        keeper.restore_best(state)
        return state


def fit(
    model: Any,
    batches: Batches,
    config: TrainingConfig,
    *,
    placement: Placement,
    **settings: Any,
) -> Progress:
    """One fit of a model: :meth:`Trainer.fit`, which says what the settings are."""
    return Trainer(model, config, placement).fit(batches, **settings)


def _distributed(batches: Batches, placement: Placement, first_epoch: int) -> Any:
    if placement.replicas == 1 and placement.workers == 1:
        return batches.dataset(first_epoch)

    def mine(_: Any) -> Any:
        made = batches.dataset(first_epoch, placement.worker, placement.workers)
        # Said to be endless, or else several workers lose its static shapes.
        return made.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))

    return placement.strategy.distribute_datasets_from_function(mine)


class _Keeper:
    """Writes and reads what a training needs to go on.

    With several workers all must write, since reading a distributed variable takes all of them, but
    only what the chief wrote is ever read: the others get it from him.
    """

    def __init__(self, trainer: Trainer, work_dir: Path, averaged: bool) -> None:
        self.model, self.optimizer = trainer.model, trainer.optimizer
        self.config, self.placement = trainer.config, trainer.placement
        self.average = averaged
        chief = self.placement.chief
        self.folder = work_dir if chief else work_dir / f"worker-{self.placement.worker}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state_file = self.folder / "state.json"
        self.everything = tf.train.Checkpoint(model=self.model, optimizer=trainer.whole)
        self.weights = tf.train.Checkpoint(model=self.model)
        self.last_saved = time.monotonic()

    def resume(self) -> Progress:
        there = self.placement.chief and self.state_file.exists()
        told = json.loads(self.state_file.read_text("utf-8")) if there else {}
        state = Progress(**self.placement.from_chief(told))
        if state.checkpoint:
            self._read(self.everything, state.checkpoint)
        return state

    def save(self, state: Progress) -> None:
        name = f"epoch-{state.epoch}"
        self.everything.write(str(self.folder / name))
        state.checkpoint = name
        write_json(self.state_file, asdict(state))
        for file in self.folder.glob("*-*.*"):
            if file.name.split(".")[0] not in (name, f"best-{state.best_epoch}"):
                file.unlink(missing_ok=True)
        self.last_saved = time.monotonic()

    def due(self) -> bool:
        passed = time.monotonic() - self.last_saved
        return bool(self.placement.from_chief(passed >= 60 * self.config.checkpoint_minutes))

    def save_best(self, epoch: int) -> None:
        # Named by its epoch: a kill before the next state is written leaves the one before it.
        self.weights.write(str(self.folder / f"best-{epoch}"))

    def restore_best(self, state: Progress) -> None:
        if state.best_epoch:
            self._read(self.weights, f"best-{state.best_epoch}")
        elif self.average:
            self.optimizer.put_average(self.model.trainable_variables)

    def _read(self, checkpoint: Any, name: str) -> None:
        if self.placement.chief:
            checkpoint.read(str(self.folder / name)).expect_partial()
        self.placement.share([*self.model.variables, *self.model.optimizer.variables])

    def averaged(self) -> _Averaged:
        return _Averaged(self.model, self.optimizer, self.average)


class _Averaged:
    """Within the block the model has the moving average of its weights."""

    def __init__(self, model: Any, optimizer: Any, active: bool) -> None:
        self.model, self.optimizer, self.active = model, optimizer, active
        self.kept: list[Any] = []

    def __enter__(self) -> None:
        if self.active:
            self.kept = [v.numpy() for v in self.model.trainable_variables]
            self.optimizer.put_average(self.model.trainable_variables)

    def __exit__(self, *_: object) -> None:
        for variable, value in zip(self.model.trainable_variables, self.kept, strict=False):
            variable.assign(value)


class _Loop(tf_keras.callbacks.Callback):
    """Progress bar, validation, early stopping, checkpoints and the watch for NaN."""

    def __init__(
        self,
        state: Progress,
        keeper: _Keeper,
        epochs: int,
        steps: int,
        title: str,
        validate: Callable[[], Metrics] | None,
        waited: int,
        goal: str,
    ) -> None:
        super().__init__()
        self.goal = goal
        self.state, self.keeper, self.config = state, keeper, keeper.config
        self.epochs, self.steps, self.title, self.validate = epochs, steps, title, validate
        self.waited = waited
        self.bar: Any = None
        self.began = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self.bar = tqdm(
            total=self.epochs * self.steps,
            initial=self.state.epoch * self.steps,
            desc=self.title,
            unit="step",
            dynamic_ncols=True,
            disable=not self.keeper.placement.chief,
        )

    def on_train_end(self, logs: Any = None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the progress bar's line, so that what is said next, such as an error, is below."""
        if self.bar is not None:
            self.bar.close()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.began = time.monotonic()
        self.keeper.optimizer.begin_epoch(epoch + self.waited)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.bar.update(1)
        # Means over the epoch so far: they are not finite from the first step that is not.
        parts = {name: float(value) for name, value in (logs or {}).items()}
        if not all(map(math.isfinite, parts.values())):
            step = self.state.epoch * self.steps + batch + 1
            broken = [name for name, v in parts.items() if name != "loss" and not math.isfinite(v)]
            raise self._diverged(f"step {step}", broken)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        state = self.state
        state.epoch = epoch + 1
        state.seconds += time.monotonic() - self.began
        self._check()
        record = {
            "epoch": float(state.epoch),
            "step": float(state.epoch * self.steps),
            **{name: float(value) for name, value in logs.items()},
            "seconds": round(state.seconds, 3),
        }
        due = state.epoch % self.config.validate_every == 0 or state.epoch == self.epochs
        if self.validate is not None and due:
            record |= self._validated(self.validate)
        state.history.append(record)
        logs.update({k: v for k, v in record.items() if k not in ("epoch", "step", "seconds")})
        self._show(record)
        if due or self.keeper.due():
            self.keeper.save(state)
        if self.config.patience and state.stale >= self.config.patience:
            self.model.stop_training = True

    def _validated(self, validate: Callable[[], Metrics]) -> Metrics:
        placement = self.keeper.placement
        with self.keeper.averaged():
            metrics: Metrics = placement.from_chief(validate() if placement.chief else {})
            if metrics[self.goal] > self.state.best:
                self.state.best, self.state.best_epoch = metrics[self.goal], self.state.epoch
                self.state.stale = 0
                self.keeper.save_best(self.state.epoch)
            else:
                self.state.stale += 1
        return metrics

    def _show(self, record: dict[str, float]) -> None:
        shown = {"loss": f"{record['loss']:.3f}"}
        if self.state.best >= 0:
            shown[f"best {self.goal}"] = f"{self.state.best:.4f}"
        self.bar.set_postfix(shown, refresh=False)

    def _check(self) -> None:
        """A step whose loss is finite may still break the weights; the next would show it."""
        for variable in self.model.trainable_variables:
            if not np.isfinite(variable.numpy()).all():
                raise self._diverged(f"epoch {self.state.epoch}", [])

    def _diverged(self, when: str, broken: Sequence[str]) -> TrainingDivergedError:
        of = f" of {', '.join(broken)}" if broken else ""
        kept = (
            f"{self.keeper.folder} keeps the checkpoint {self.state.checkpoint} from before"
            if self.state.checkpoint
            else "no checkpoint was due before"
        )
        return TrainingDivergedError(
            f"{self.title}: the loss{of} became nan or infinite in {when}; {kept}; lower "
            "learning_rate or clip_norm and run again, which begins anew"
        )


def step_seconds(state: Progress) -> float:
    """Median over the epochs of the mean time of a step.

    The first epoch, in which the step is compiled, counts only where there is no other.
    """
    marks = [(0.0, 0.0), *((record["step"], record["seconds"]) for record in state.history)]
    means = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.pairwise(marks)]
    return round(float(np.median(means[1:] or means)), 5)


def peak_memory_mb() -> float:
    """The most memory that this process had so far; of the first GPU, where there is one."""
    if tf.config.list_logical_devices("GPU"):
        return round(float(tf.config.experimental.get_memory_info("GPU:0")["peak"]) / 1e6, 1)
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6, 1)


def discard(work_dir: Path) -> None:
    """Removes the checkpoints of a finished training."""
    shutil.rmtree(work_dir, ignore_errors=True)
