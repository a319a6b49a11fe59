"""Experiment tracking: each epoch's loss and metrics to TensorBoard, Weights & Biases or MLflow.

All three are optional listeners of ``fit``: training neither needs them nor waits for them, and a
training that was killed and continues goes on in the same run of each.

- TensorBoard writes under the run's own folder: ``tensorboard --logdir DIR/logs``.
- Weights & Biases obeys its own variables, such as ``WANDB_MODE=offline`` and ``WANDB_PROJECT``.
- MLflow writes to ``MLFLOW_TRACKING_URI`` or, without it, to ``DIR/logs/mlflow.db``.
"""

from __future__ import annotations

import atexit
import importlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tfrec.errors import ConfigError, SetupError
from tfrec.models.keras_bridge import tf, tf_keras

PROJECT = "tfrec"


def callbacks(
    trackers: Sequence[str], run_dir: Path, name: str, config: Mapping[str, Any]
) -> list[Any]:
    """Makes a ``tf_keras`` callback for each tracker.

    Args:
      trackers: Any of ``tensorboard``, ``wandb``, ``mlflow``.
      run_dir: The run's folder; local files go under its ``logs/``.
      name: What is trained, such as ``retrieval``: the run's name in each tracker. A training
        that goes on (its first epoch is not 0) continues the last run of this name.
      config: Plain nested settings, recorded with the run.

    Returns:
      Callbacks for ``fit``. Nothing is opened before training begins.

    Raises:
      ConfigError: a tracker is unknown.
      SetupError: the package of a tracker is not installed.
    """
    known = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": MLflow}
    unknown = [tracker for tracker in trackers if tracker not in known]
    if unknown:
        raise ConfigError(f"adapt.tracking = '{unknown[0]}' is none of {', '.join(known)}")
    return [known[tracker](Path(run_dir) / "logs", name, config) for tracker in trackers]


class Tracker(tf_keras.callbacks.Callback):
    """A callback that opens with the first epoch and is closed however the process ends.

    Subclasses write one epoch in ``write`` so that it survives a kill right after.
    """

    def __init__(self, logs: Path, name: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.logs, self.name, self.settings = logs, name, _flat(config)
        self._open = False

    def on_epoch_begin(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Opens a new run before the very first epoch, the same run again before a later one."""
        if self._open:
            return
        self.logs.mkdir(parents=True, exist_ok=True)
        self.open(fresh=epoch == 0)
        self._open = True
        # Keras calls no on_train_end when an exception or Ctrl-C ends the training.
        atexit.register(self.on_train_end)

    def on_epoch_end(self, epoch: int, logs: Mapping[str, Any] | None = None) -> None:
        """Writes the epoch's numbers; the first epoch is step 1."""
        values = {key: float(value) for key, value in (logs or {}).items()}
        if values:
            self.write(epoch + 1, values)

    def on_train_end(self, logs: Mapping[str, Any] | None = None) -> None:
        """Closes the run, once."""
        atexit.unregister(self.on_train_end)
        if self._open:
            self._open = False
            self.close()

    def open(self, fresh: bool) -> None:
        """Starts a run or continues the last one."""
        raise NotImplementedError

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Records one epoch durably."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the run."""
        raise NotImplementedError

    def _remembered(self, tracker: str, fresh: bool, make: Callable[[], str]) -> str:
        """The id of the last run, kept in a small file; of a new one if there is none."""
        path = self.logs / f".{self.name}.{tracker}"
        if fresh or not path.exists():
            path.write_text(make(), "utf-8")
        return path.read_text("utf-8").strip()


class TensorBoard(Tracker):
    """Scalars in ``logs/<name>/{train,validation}``, as TensorBoard's own users expect them.

    Not Keras's callback: that one also wants a graph, a profile and a Keras training loop.
    """

    def open(self, fresh: bool) -> None:
        """Opens one event file a side; TensorBoard joins those of one folder."""
        if fresh:
            shutil.rmtree(self.logs / self.name, ignore_errors=True)
        self._writers = {
            side: tf.summary.create_file_writer(str(self.logs / self.name / side))
            for side in ("train", "validation")
        }

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Puts ``val_x`` beside ``x`` in one plot."""
        for key, value in values.items():
            side = "validation" if key.startswith("val_") else "train"
            with self._writers[side].as_default(step=step):
                tf.summary.scalar(f"epoch_{key.removeprefix('val_')}", value)
        for writer in self._writers.values():
            writer.flush()

    def close(self) -> None:
        """Closes the event files."""
        for writer in self._writers.values():
            writer.close()


class WeightsAndBiases(Tracker):
    """A run of Weights & Biases in the project ``tfrec``, or in ``WANDB_PROJECT``."""

    def __init__(self, logs: Path, name: str, config: Mapping[str, Any]) -> None:
        super().__init__(logs, name, config)
        self._wandb = _import("wandb", "wandb")

    def open(self, fresh: bool) -> None:
        """Starts a run, or goes on with the last one under the id it had."""
        offline = os.environ.get("WANDB_MODE", "online") != "online"
        try:
            self._run = self._wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=self.name,
                id=self._remembered("wandb", fresh, lambda: uuid.uuid4().hex),
                # Offline there is no server to ask; the id joins the parts when they are synced.
                resume=None if offline else "allow",
                dir=str(self.logs),
                config=dict(self.settings),
            )
        except self._wandb.errors.Error as error:
            raise SetupError(
                f"Weights & Biases does not start ({error}); set WANDB_MODE=offline, or take "
                "'wandb' out of adapt.tracking"
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Hands the epoch to wandb's own process, which outlives a kill of ours."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Ends the run; wandb's own process writes out the rest within a moment."""
        self._run.finish()


class MLflow(Tracker):
    """A run in the MLflow experiment ``tfrec``, or in ``MLFLOW_EXPERIMENT_NAME``."""

    def __init__(self, logs: Path, name: str, config: Mapping[str, Any]) -> None:
        super().__init__(logs, name, config)
        self._mlflow = _import("mlflow", "mlflow")

    def open(self, fresh: bool) -> None:
        """Creates a run, or sets the last one to running again."""
        store = f"sqlite:///{(self.logs / 'mlflow.db').resolve()}"
        uri = os.environ.get("MLFLOW_TRACKING_URI", store)
        try:
            self._client = self._mlflow.MlflowClient(tracking_uri=uri)
            self._run_id = self._remembered("mlflow", fresh, self._create)
            self._client.update_run(self._run_id, status="RUNNING")
        except self._mlflow.exceptions.MlflowException as error:
            raise SetupError(
                f"MLflow does not start at {uri} ({error}); set MLFLOW_TRACKING_URI to a store "
                "that works, or take 'mlflow' out of adapt.tracking"
            ) from None

    def _create(self) -> str:
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        found = self._client.get_experiment_by_name(experiment)
        number = found.experiment_id if found else self._client.create_experiment(experiment)
        run_id = str(self._client.create_run(number, run_name=self.name).info.run_id)
        for key, value in self.settings.items():
            self._client.log_param(run_id, key, value)
        return run_id

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the epoch; MLflow's names may not hold an ``@``."""
        for key, value in values.items():
            plain = re.sub(r"[^\w./ -]", "_at_" if "@" in key else "_", key)
            self._client.log_metric(self._run_id, plain, value, step=step)

    def close(self) -> None:
        """Marks the run as finished."""
        self._client.set_terminated(self._run_id)


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat


def _import(module: str, setting: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SetupError(
            f"adapt.tracking names '{setting}', and {module} cannot be imported ({error}); "
            'install it with: pip install "tfrec[tracking]", or take it out of adapt.tracking'
        ) from None
