"""Tracking for real: offline Weights & Biases, a local MLflow store, TensorBoard's own reader."""

import json
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tfrec import tracking
from tfrec.errors import ConfigError, SetupError
from tfrec.models.keras_bridge import tf_keras

CONFIG = {"adapt": {"epochs": 3, "retrieval": {"layers": 2}}, "seed": 1}


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def fit(tracker: str, run_dir: Path, epochs: int = 2, initial_epoch: int = 0) -> list[dict]:
    """Trains a tiny model; returns the logs of each epoch as Keras gave them to its callbacks."""
    model = tf_keras.Sequential([tf_keras.layers.Dense(1, kernel_initializer="zeros")])
    model.compile("sgd", "mse")
    x = np.linspace(0, 1, 8, dtype=np.float32)[:, None]
    seen: list[dict] = []
    spy = tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda _, logs: seen.append(dict(logs)))
    listeners = tracking.callbacks([tracker], run_dir, "retrieval", CONFIG)
    model.fit(
        x,
        2 * x,
        epochs=epochs,
        initial_epoch=initial_epoch,
        validation_split=0.5,
        verbose=0,
        callbacks=[spy, *listeners],
    )
    return seen


def scalars(run_dir: Path, side: str) -> dict[str, dict[int, float]]:
    """What TensorBoard reads: tag -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    reader = EventAccumulator(str(run_dir / "logs" / "retrieval" / side))
    reader.Reload()
    return {
        tag: {event.step: float(make_ndarray(event.tensor_proto)) for event in reader.Tensors(tag)}
        for tag in reader.Tags()["tensors"]
    }


class TestTensorBoard:
    def test_reads_each_epochs_loss_and_validation(self, tmp_path):
        first, second = fit("tensorboard", tmp_path)
        train, validation = scalars(tmp_path, "train"), scalars(tmp_path, "validation")
        assert train == {"epoch_loss": {1: first["loss"], 2: second["loss"]}}
        assert validation == {"epoch_loss": {1: first["val_loss"], 2: second["val_loss"]}}

    def test_a_continued_training_goes_on_in_the_same_curve(self, tmp_path):
        fit("tensorboard", tmp_path, epochs=2)
        fit("tensorboard", tmp_path, epochs=4, initial_epoch=2)
        assert list(scalars(tmp_path, "train")["epoch_loss"]) == [1, 2, 3, 4]

    def test_a_training_from_the_start_begins_a_new_curve(self, tmp_path):
        fit("tensorboard", tmp_path, epochs=2)
        fit("tensorboard", tmp_path, epochs=1)
        assert list(scalars(tmp_path, "train")["epoch_loss"]) == [1]

    @pytest.mark.slow
    def test_kill_9_loses_no_finished_epoch(self, tmp_path):
        code = (
            "import os, signal, sys; from tfrec import tracking\n"
            "(listener,) = tracking.callbacks(['tensorboard'], sys.argv[1], 'retrieval', {})\n"
            "listener.on_epoch_begin(0); listener.on_epoch_end(0, {'loss': 0.5})\n"
            "os.kill(os.getpid(), signal.SIGKILL)"
        )
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True)
        assert done.returncode == -signal.SIGKILL
        assert scalars(tmp_path, "train") == {"epoch_loss": {1: 0.5}}


class TestWeightsAndBiases:
    def test_offline_writes_every_epoch_and_the_settings(self, tmp_path):
        pytest.importorskip("wandb")
        logs = fit("wandb", tmp_path)
        (run,) = self.runs(tmp_path)
        assert run["config"]["adapt.retrieval.layers"] == "2"
        assert [row["_step"] for row in run["history"]] == [1, 2]
        for row, seen in zip(run["history"], logs, strict=True):
            assert {key: row[key] for key in seen} == pytest.approx(seen)

    def test_a_continued_training_keeps_the_id(self, tmp_path):
        pytest.importorskip("wandb")
        fit("wandb", tmp_path, epochs=1)
        fit("wandb", tmp_path, epochs=2, initial_epoch=1)
        first, second = self.runs(tmp_path)
        assert first["id"] == second["id"]
        assert [row["_step"] for row in first["history"] + second["history"]] == [1, 2]

    def test_one_that_does_not_start_is_an_error_of_the_machine(self, tmp_path, monkeypatch):
        wandb = pytest.importorskip("wandb")

        def fail(**settings):
            raise wandb.errors.UsageError("api_key not configured")

        monkeypatch.setattr(wandb, "init", fail)
        with pytest.raises(SetupError, match=r"api_key not configured.*WANDB_MODE=offline"):
            fit("wandb", tmp_path)

    def runs(self, run_dir: Path) -> list[dict]:
        """Every offline run, from the file that `wandb sync` would send, oldest first."""
        found = []
        for path in sorted((run_dir / "logs" / "wandb").glob("offline-run-*/run-*.wandb")):
            run: dict = {"history": [], "config": {}}
            for record in self.records(path):
                if record.HasField("run"):
                    run["id"] = record.run.run_id
                    for item in record.run.config.update:
                        run["config"][item.key] = json.loads(item.value_json)
                if record.HasField("history"):
                    items = record.history.item
                    row = {item.key or item.nested_key[0]: item.value_json for item in items}
                    run["history"].append({key: json.loads(text) for key, text in row.items()})
            found.append(run)
        return found

    def records(self, path: Path) -> list:
        """Everything in a run's file; wandb's own process may still be at its last line."""
        from wandb.proto.wandb_internal_pb2 import Record

        until = time.monotonic() + 30
        while time.monotonic() < until:
            found = [Record.FromString(data) for data in leveldb_log(path.read_bytes()[7:])]
            if any(record.HasField("exit") for record in found):
                return found
            time.sleep(0.05)
        raise AssertionError(f"{path} has no end after 30 s")


def leveldb_log(content: bytes, offset: int = 7, block: int = 32768) -> Iterator[bytes]:
    """Records of LevelDB's log format; ``offset`` bytes of the first block were a file header."""
    parts = b""
    while len(content) >= 7:
        if (left := block - offset % block) < 7:  # too short for a record: padding
            content, offset = content[left:], offset + left
            continue
        _, length, kind = struct.unpack("<IHB", content[:7])
        parts += content[7 : 7 + length]
        if kind in (1, 4):  # full, last
            yield parts
            parts = b""
        content, offset = content[7 + length :], offset + 7 + length


class TestMLflow:
    def test_a_local_store_holds_every_epoch_and_a_continued_training_is_the_same_run(
        self, tmp_path
    ):
        mlflow = pytest.importorskip("mlflow")
        logs = fit("mlflow", tmp_path, epochs=1)
        logs += fit("mlflow", tmp_path, epochs=2, initial_epoch=1)
        client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'logs' / 'mlflow.db'}")
        experiment = client.get_experiment_by_name("tfrec")
        (run,) = client.search_runs([experiment.experiment_id])
        assert (run.info.run_name, run.info.status) == ("retrieval", "FINISHED")
        assert run.data.params["adapt.retrieval.layers"] == "2"
        history = client.get_metric_history(run.info.run_id, "val_loss")
        assert {point.step: point.value for point in history} == pytest.approx(
            {1: logs[0]["val_loss"], 2: logs[1]["val_loss"]}
        )

    def test_a_store_of_the_users_choice_is_used_and_odd_names_are_kept_apart(
        self, tmp_path, monkeypatch
    ):
        mlflow = pytest.importorskip("mlflow")
        uri = f"sqlite:///{tmp_path / 'mine.db'}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "films")
        (listener,) = tracking.callbacks(["mlflow"], tmp_path, "ranking", {})
        listener.on_epoch_begin(0)
        listener.on_epoch_end(0, {"val_ndcg@10": 0.25})
        listener.on_train_end()
        client = mlflow.MlflowClient(uri)
        (run,) = client.search_runs([client.get_experiment_by_name("films").experiment_id])
        assert run.data.metrics == {"val_ndcg_at_10": 0.25}
        assert not (tmp_path / "logs" / "mlflow.db").exists()

    def test_one_that_does_not_start_is_an_error_of_the_machine(self, tmp_path, monkeypatch):
        pytest.importorskip("mlflow")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", "nonsense://nowhere")
        with pytest.raises(SetupError, match="nonsense://nowhere"):
            fit("mlflow", tmp_path)


class TestCallbacks:
    def test_none_open_anything_before_training(self, tmp_path):
        names = ["tensorboard", "wandb", "mlflow"]
        assert len(tracking.callbacks(names, tmp_path, "retrieval", CONFIG)) == 3
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("tracker", ["wandb", "mlflow"])
    def test_a_missing_package_is_an_error_of_the_machine(self, tracker, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, tracker, None)
        with pytest.raises(SetupError, match=rf"'{tracker}'.*tfrec\[tracking\]"):
            tracking.callbacks([tracker], tmp_path, "retrieval", {})

    def test_an_unknown_tracker_is_an_error_of_the_configuration(self, tmp_path):
        with pytest.raises(ConfigError, match="'comet' is none of tensorboard, wandb, mlflow"):
            tracking.callbacks(["comet"], tmp_path, "retrieval", {})
