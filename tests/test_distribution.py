"""The same training on one device, on two, and in two processes, gives the same model.

Compared are trainings without dropout, since each replica drops out other things; negatives and
everything else that the host draws are the same. Adam divides gradients by their own size, so that
rounding is not small where a gradient is next to nothing: weights agree to 2e-3, losses to 1e-4.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import training_process

from tfrec.distribution import Placement, place
from tfrec.errors import ConfigError, SetupError

TESTS = Path(__file__).parent
LOSSES = ["full_softmax", "sampled", training_process.PRETRAINING]
HALF, PIECES, TEXTS = training_process.HALF, training_process.PIECES, training_process.TEXTS
DEVICES = [*LOSSES, PIECES, HALF, TEXTS]
WEIGHTS, LOSS = 2e-3, 1e-4


class Process:
    """A training_process.py, which ends with the test at the latest."""

    def __init__(self, told: dict, **environment: str) -> None:
        self.log = Path(told["out"]) / f"log-{len(list(Path(told['out']).glob('log-*')))}"
        paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(TESTS / "training_process.py"), json.dumps(told)],
                env={**os.environ, "PYTHONPATH": paths, **environment},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def finish(self) -> None:
        try:
            assert self.process.wait(timeout=600) == 0, self.log.read_text()[-5000:]
        finally:
            self.kill()

    def wait_for(self, condition: Callable[[], bool]) -> None:
        while not condition():
            assert self.process.poll() is None, self.log.read_text()[-5000:]
            time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The trainings of one device, in this process."""
    folder = tmp_path_factory.mktemp("alone")
    return {
        loss: training_process.report(
            *training_process.train(place("one_device"), loss, folder / loss)
        )
        for loss in DEVICES
    }


@pytest.fixture(scope="module")
def mirrored(tmp_path_factory):
    out = tmp_path_factory.mktemp("mirrored")
    Process({"distribution": "mirrored", "losses": DEVICES, "out": str(out)}).finish()
    return json.loads((out / "worker-0.json").read_text())


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    out = tmp_path_factory.mktemp("workers")
    told = {
        "distribution": "multi_worker",
        "losses": LOSSES,
        "interrupted": "full_softmax",
        "out": str(out),
    }
    cluster = {"worker": [f"127.0.0.1:{port}" for port in free_ports(2)]}
    tasks = [{"type": "worker", "index": index} for index in range(2)]
    processes = [
        Process(told, TF_CONFIG=json.dumps({"cluster": cluster, "task": task})) for task in tasks
    ]
    try:
        for process in processes:
            process.finish()
    finally:
        for process in processes:
            process.kill()
    return [json.loads((out / f"worker-{index}.json").read_text()) for index in range(2)]


def assert_agree(found: dict, expected: dict) -> None:
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=LOSS)
    np.testing.assert_allclose(found["weights"], expected["weights"], atol=WEIGHTS)
    assert found["best_epoch"] == expected["best_epoch"] == 2


def assert_gathers_own_first(gathered: list[dict], values: list[list], gradients: list) -> None:
    assert [part["values"] for part in gathered] == values
    assert [part["gradient"] for part in gathered] == gradients


# Replica 0 holds 1, 2 and replica 1 holds 11, 12. The loss of replica 0 is its four values times
# 1, 10, 100, 1000; that of replica 1 the same times two.
VALUES = [[1, 2, 11, 12], [11, 12, 1, 2]]
GRADIENTS = [[1 + 2 * 100, 10 + 2 * 1000], [100 + 2 * 1, 1000 + 2 * 10]]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [loss for loss in DEVICES if loss != HALF])
def test_two_devices_train_as_one_with_the_same_global_batch(mirrored, alone, loss):
    assert mirrored["replicas"] == 2
    assert_agree(mirrored[loss], alone[loss])


@pytest.mark.slow
def test_in_half_precision_they_train_nearly_so_and_in_pieces_as_without(mirrored, alone):
    """Sums in 16 bits are not the same in another order."""
    np.testing.assert_allclose(mirrored[HALF]["losses"], alone[HALF]["losses"], rtol=0.02)
    np.testing.assert_allclose(alone[HALF]["losses"], alone["sampled"]["losses"], rtol=0.05)
    np.testing.assert_allclose(alone[PIECES]["losses"], alone["full_softmax"]["losses"], rtol=LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("loss", LOSSES)
def test_two_processes_train_as_one_and_end_with_equal_weights(workers, alone, loss):
    # The full softmax was interrupted on the way, and both went on from the chief's checkpoint.
    assert [worker["replicas"] for worker in workers] == [2, 2]
    assert workers[0][loss] == workers[1][loss]
    assert_agree(workers[0][loss], alone[loss])


@pytest.mark.slow
def test_each_replica_gathers_its_own_values_first_and_gets_their_gradients(mirrored, workers):
    assert_gathers_own_first(mirrored["gathered"], VALUES, GRADIENTS)
    assert_gathers_own_first([w["gathered"][0] for w in workers], VALUES, GRADIENTS)


@pytest.mark.slow
def test_every_worker_is_told_what_the_chief_says(workers):
    assert [worker["told"] for worker in workers] == [{"worker": 0, "n": [1.5, "é", None]}] * 2


@pytest.mark.slow
def test_a_training_killed_with_signal_9_goes_on_with_the_same_command(tmp_path, alone):
    told = {"distribution": "one_device", "losses": ["full_softmax"], "out": str(tmp_path)}
    state = tmp_path / "full_softmax" / "state.json"
    process = Process({**told, "pause": 2})
    try:
        process.wait_for(lambda: state.exists() and json.loads(state.read_text())["epoch"] == 2)
    finally:
        process.kill()
    assert not (tmp_path / "worker-0.json").exists()
    Process(told).finish()
    found = json.loads((tmp_path / "worker-0.json").read_text())["full_softmax"]
    assert found["losses"] == alone["full_softmax"]["losses"]
    assert found["weights"] == alone["full_softmax"]["weights"]
    assert found["best_epoch"] == 2


# --- choosing a strategy ---


def test_one_device_is_the_default_without_more(monkeypatch):
    for name in ("TF_CONFIG", "COLAB_TPU_ADDR", "TPU_NAME"):
        monkeypatch.delenv(name, raising=False)
    found = place("auto")
    assert (found.replicas, found.worker, found.workers) == (1, 0, 1)
    assert found.chief
    assert found.compiles


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", '{"cluster": {}}'])
def test_a_missing_or_broken_tf_config_is_told(monkeypatch, text):
    monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(ConfigError, match="needs the environment variable TF_CONFIG"):
        place("multi_worker")


def test_a_tpu_that_is_not_there_is_told(monkeypatch):
    monkeypatch.setenv("TPU_NAME", "local")
    with pytest.raises(SetupError, match="no TPU can be reached"):
        place("tpu")


def test_a_single_worker_hears_itself():
    only = Placement(place("one_device").strategy)
    assert only.from_chief({"a": [1]}) == {"a": [1]}
    only.share([])
