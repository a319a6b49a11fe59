"""The fit loop that every trained stage shares: checkpoints, resume, validation, tracking.

A training is a number of epochs over batches that are the same for the same seed. After an epoch
everything needed to go on is written to ``work_dir``: a process killed at any moment continues
from there with the same command and the same batches.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from tfrec.artifact import write_json
from tfrec.config import TrainingConfig
from tfrec.distribution import Placement
from tfrec.errors import TfrecError
from tfrec.models.keras_bridge import tf, tf_keras

GOAL = "ndcg@10"

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
      best: Best validation NDCG@10 so far; -1 before the first.
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


def optimizer(config: TrainingConfig, steps: int) -> Any:
    """AdamW with warm-up, schedule, clipping and moving average of the weights.

    Args:
      config: The training settings.
      steps: Updates of the whole training, for the schedules that end.

    Returns:
      A tf_keras optimizer; with mixed_float16 one that scales the loss.
    """
    made = tf_keras.optimizers.AdamW(
        learning_rate=Schedule(
            config.learning_rate, min(config.warmup_steps, steps), steps, config.schedule
        ),
        weight_decay=config.weight_decay,
        beta_2=0.98,
        global_clipnorm=config.clip_norm or None,
        use_ema=config.ema > 0,
        ema_momentum=config.ema or 0.99,
        ema_overwrite_frequency=None,
        jit_compile=False,
    )
    if config.precision == "mixed_float16":
        return tf_keras.mixed_precision.LossScaleOptimizer(made)
    return made


class Schedule(tf_keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then constant, or down to zero at ``steps`` by a line or a half cosine."""

    def __init__(self, peak: float, warmup: int, steps: int, shape: str) -> None:
        self.peak, self.warmup, self.steps, self.shape = peak, warmup, steps, shape

    def __call__(self, step: Any) -> Any:
        """Learning rate of an update, counted from 0."""
        now = tf.cast(step, tf.float32)
        rise = tf.minimum((now + 1) / max(self.warmup, 1), 1.0)
        done = tf.clip_by_value((now - self.warmup) / max(self.steps - self.warmup, 1), 0.0, 1.0)
        falls = {
            "constant": lambda: 1.0,
            "linear": lambda: 1 - done,
            "cosine": lambda: 0.5 * (1 + tf.cos(math.pi * done)),
        }
        return self.peak * rise * falls[self.shape]()

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {
            "peak": self.peak,
            "warmup": self.warmup,
            "steps": self.steps,
            "shape": self.shape,
        }


def fit(
    model: Any,
    batches: Batches,
    config: TrainingConfig,
    *,
    work_dir: Path,
    title: str,
    placement: Placement,
    epochs: int | None = None,
    validate: Callable[[], Metrics] | None = None,
    callbacks: Sequence[Any] = (),
) -> Progress:
    """Trains ``model`` and leaves it with the weights of its best validation.

    Without ``validate`` the weights at the end are kept. With a moving average, it is the averaged
    weights that are validated and kept.

    Args:
      model: A tf_keras model made under the placement's strategy, all weights built.
      batches: What it is trained on.
      config: How.
      work_dir: Where checkpoints are; a finished training found there is not repeated.
      title: What the progress bar says.
      placement: Where it runs.
      epochs: Instead of ``config.epochs``.
      validate: Returns metrics, among them ``ndcg@10``, of the model as it is.
      callbacks: Further tf_keras callbacks, for tracking; they see the metrics as logs.

    Returns:
      The state at the end, with a record of every epoch.

    Raises:
      TrainingDivergedError: the loss became NaN or infinite.
    """
    epochs = epochs or config.epochs
    steps = batches.steps_per_epoch
    with placement.strategy.scope():
        made = optimizer(config, epochs * steps)
        model.compile(optimizer=made, jit_compile=config.jit_compile and placement.compiles)
        inner = getattr(made, "inner_optimizer", made)
        inner.build(model.trainable_variables)
    keeper = _Keeper(model, inner, config, work_dir, placement)
    state = keeper.resume()
    over = state.epoch >= epochs or (config.patience and state.stale >= config.patience)
    if not over:
        loop = _Loop(state, keeper, config, epochs, steps, title, validate)
        model.fit(
            _distributed(batches, placement, state.epoch),
            initial_epoch=state.epoch,
            epochs=epochs,
            steps_per_epoch=steps,
            callbacks=[loop, *callbacks],
            verbose=0,
        )
    keeper.restore_best(state, averaged=validate is None)
    return state


def _distributed(batches: Batches, placement: Placement, first_epoch: int) -> Any:
    if placement.replicas == 1 and placement.workers == 1:
        return batches.dataset(first_epoch)
    return placement.strategy.distribute_datasets_from_function(
        lambda context: batches.dataset(first_epoch, placement.worker, placement.workers)
    )


class _Keeper:
    """Writes and reads what a training needs to go on."""

    def __init__(
        self, model: Any, inner: Any, config: TrainingConfig, work_dir: Path, placement: Placement
    ) -> None:
        self.model, self.inner, self.config = model, inner, config
        # Every worker has to write; only the chief's files are kept in the end.
        self.folder = work_dir if placement.chief else work_dir / f"worker-{placement.worker}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state_file = self.folder / "state.json"
        self.everything = tf.train.Checkpoint(model=model, optimizer=inner)
        self.weights = tf.train.Checkpoint(model=model)
        self.last_saved = time.monotonic()

    def resume(self) -> Progress:
        if not self.state_file.exists():
            return Progress()
        state = Progress(**json.loads(self.state_file.read_text("utf-8")))
        self.everything.restore(str(self.folder / state.checkpoint)).expect_partial()
        return state

    def save(self, state: Progress) -> None:
        old = state.checkpoint
        name = f"epoch-{state.epoch}"
        self.everything.write(str(self.folder / name))
        state.checkpoint = name
        write_json(self.state_file, asdict(state))
        if old and old != name:
            _remove(self.folder, old)
        self.last_saved = time.monotonic()

    def due(self) -> bool:
        return time.monotonic() - self.last_saved >= 60 * self.config.checkpoint_minutes

    def save_best(self) -> None:
        self.weights.write(str(self.folder / "best"))

    def restore_best(self, state: Progress, averaged: bool) -> None:
        if (self.folder / "best.index").exists():
            self.weights.read(str(self.folder / "best")).expect_partial()
        elif averaged and self.config.ema:
            self.inner.finalize_variable_values(self.model.trainable_variables)

    def averaged(self) -> _Averaged:
        return _Averaged(self.model, self.inner, self.config.ema > 0)


class _Averaged:
    """Within the block the model has the moving average of its weights."""

    def __init__(self, model: Any, inner: Any, active: bool) -> None:
        self.model, self.inner, self.active = model, inner, active
        self.kept: list[Any] = []

    def __enter__(self) -> None:
        if self.active:
            self.kept = [v.numpy() for v in self.model.trainable_variables]
            self.inner.finalize_variable_values(self.model.trainable_variables)

    def __exit__(self, *_: object) -> None:
        for variable, value in zip(self.model.trainable_variables, self.kept, strict=False):
            variable.assign(value)


class _Loop(tf_keras.callbacks.Callback):
    """Progress bar, validation, early stopping, checkpoints and the watch for NaN."""

    def __init__(
        self,
        state: Progress,
        keeper: _Keeper,
        config: TrainingConfig,
        epochs: int,
        steps: int,
        title: str,
        validate: Callable[[], Metrics] | None,
    ) -> None:
        super().__init__()
        self.state, self.keeper, self.config = state, keeper, config
        self.epochs, self.steps, self.title, self.validate = epochs, steps, title, validate
        self.bar: Any = None
        self.began = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self.bar = tqdm(
            total=self.epochs * self.steps,
            initial=self.state.epoch * self.steps,
            desc=self.title,
            unit="step",
            mininterval=0.5,
            dynamic_ncols=True,
        )

    def on_train_end(self, logs: Any = None) -> None:
        self.bar.close()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.began = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.bar.update(1)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        state = self.state
        state.epoch = epoch + 1
        state.seconds += time.monotonic() - self.began
        self._check(logs["loss"])
        record = {
            "epoch": float(state.epoch),
            "step": float(state.epoch * self.steps),
            "loss": float(logs["loss"]),
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
        with self.keeper.averaged():
            metrics = validate()
            if metrics[GOAL] > self.state.best:
                self.state.best, self.state.best_epoch = metrics[GOAL], self.state.epoch
                self.state.stale = 0
                self.keeper.save_best()
            else:
                self.state.stale += 1
        return metrics

    def _show(self, record: dict[str, float]) -> None:
        shown = {"loss": f"{record['loss']:.3f}"}
        if self.state.best >= 0:
            shown[f"best {GOAL}"] = f"{self.state.best:.4f}"
        self.bar.set_postfix(shown, refresh=False)

    def _check(self, loss: float) -> None:
        if math.isfinite(loss):
            return
        self.bar.close()
        raise TrainingDivergedError(
            f"{self.title}: the loss became {loss} in epoch {self.state.epoch}; the last good "
            f"state is in {self.keeper.folder}; lower learning_rate or clip_norm and run again"
        )


def _remove(folder: Path, checkpoint: str) -> None:
    for file in folder.glob(f"{checkpoint}.*"):
        file.unlink(missing_ok=True)


def discard(work_dir: Path) -> None:
    """Removes the checkpoints of a finished training."""
    shutil.rmtree(work_dir, ignore_errors=True)
