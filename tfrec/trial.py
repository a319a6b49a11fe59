"""trial: one training of a search for settings, in a process of its own.

``python -m tfrec.trial FOLDER`` does what ``FOLDER/order.json`` says and leaves ``ending.json``.
TensorFlow keeps some hundred megabytes of every training until its process ends, and a process that
the system kills for its memory must not take the search with it.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna

from tfrec.artifact import write_json
from tfrec.config import Config
from tfrec.errors import TfrecError
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.stages import adapt
from tfrec.training import GOAL

ORDER, ENDING = "order.json", "ending.json"

LEAST_PRUNING = 3
"""Complete trials before one is ended early."""


def run(order: Mapping[str, Any]) -> dict[str, Any]:
    """Trains as ordered.

    Args:
      order: ``config``, ``task``, ``out`` (where the model goes) and ``inputs`` (the run's folder);
        for a trial also ``database``, ``study``, ``trial``, and its ``pruner``, ``validate_every``.

    Returns:
      How it ended: ``state`` (complete, pruned, failed), with ``metrics`` or with ``kind``, the
      name of the error, ``reason`` in one line, and the ``traceback``.
    """
    try:
        made = adapt.run(
            Config.parse(order["config"]),
            Path(order["out"]),
            order["task"],
            inputs=Path(order["inputs"]),
            watching=[Watch(*_trial(order))] if "trial" in order else [],
        )
    except optuna.TrialPruned:
        return {"state": "pruned"}
    except Exception as error:  # noqa: BLE001 - whatever it is, the search is told
        return {
            "state": "failed",
            "kind": type(error).__name__ if isinstance(error, TfrecError) else "",
            "reason": reason_of(error),
            "traceback": traceback.format_exc(),
        }
    return {"state": "complete", "metrics": dict(made.metrics)}


def reason_of(error: Exception) -> str:
    """What went wrong, in one line."""
    if isinstance(error, MemoryError | tf.errors.ResourceExhaustedError):
        return "not enough memory"
    first = next(iter(str(error).splitlines()), "")[:300]
    return first if isinstance(error, TfrecError) else f"{type(error).__name__}: {first}"


class Watch(tf_keras.callbacks.Callback):
    """Tells the study each validation, and ends the training if the study says so.

    Trial 0, with which all are compared, is never ended, nor any after its last epoch.
    """

    def __init__(self, study: optuna.Study, trial: optuna.Trial) -> None:
        super().__init__()
        self.trial = trial
        self.known = set(study.trials[trial.number].intermediate_values)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        """Called by Keras."""
        if GOAL not in logs or epoch + 1 in self.known:
            return
        self.trial.report(logs[GOAL], epoch + 1)
        at_the_end = epoch + 1 == self.params["epochs"]
        if self.trial.number and not at_the_end and self.trial.should_prune():
            raise optuna.TrialPruned


def _trial(order: Mapping[str, Any]) -> tuple[optuna.Study, optuna.Trial]:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.load_study(
        study_name=order["study"],
        storage=optuna.storages.RDBStorage(
            f"sqlite:///{order['database']}", engine_kwargs={"connect_args": {"timeout": 60}}
        ),
        sampler=optuna.samplers.RandomSampler(),
        pruner=pruner_of(order),
    )
    return study, optuna.Trial(study, order["trial"])


def pruner_of(order: Mapping[str, Any]) -> optuna.pruners.BasePruner:
    """The pruner of an order."""
    settings = getattr(Config.parse(order["config"]).adapt, order["task"])
    epochs, every = settings.epochs, order["validate_every"]
    if order["pruner"] == "median":
        return optuna.pruners.MedianPruner(
            n_startup_trials=LEAST_PRUNING, n_warmup_steps=max(every, epochs // 4)
        )
    if order["pruner"] == "hyperband":
        return optuna.pruners.HyperbandPruner(
            min_resource=min(every, epochs), max_resource=epochs, reduction_factor=3
        )
    return optuna.pruners.NopPruner()


def _end_with_the_search() -> None:
    """Ends this process when the one that started it is gone, which closes standard input."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def main(folder: Path) -> int:
    """The process."""
    _end_with_the_search()
    write_json(folder / ENDING, run(json.loads((folder / ORDER).read_text("utf-8"))))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
