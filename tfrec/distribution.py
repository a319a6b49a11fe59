"""Configuration -> tf.distribute strategy."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import ConfigError, SetupError
from tfrec.models.keras_bridge import tf


@dataclass(frozen=True)
class Placement:
    """Where a training runs.

    Attributes:
      strategy: The tf.distribute strategy under which models and optimizers are made.
      worker: Which of the workers this process is.
      workers: How many processes train together.
    """

    strategy: Any
    worker: int = 0
    workers: int = 1

    @property
    def replicas(self) -> int:
        """Devices that share a batch."""
        return int(self.strategy.num_replicas_in_sync)

    @property
    def chief(self) -> bool:
        """Whether this process writes artifacts."""
        return self.worker == 0

    @property
    def compiles(self) -> bool:
        """Whether XLA may compile the whole step: on one device, and always on TPUs."""
        return self.replicas == 1

    def from_chief(self, value: Any) -> Any:
        """What the chief gives here; with one worker the value itself.

        All workers must call it at the same point.

        Args:
          value: What JSON can hold; only the chief's matters.
        """
        if self.workers == 1:
            return value
        given = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.int32)
        size = int(self._chiefs(np.array([len(given)], np.int32))[0])
        told = self._chiefs(np.resize(given, size))
        return json.loads(told.astype(np.uint8).tobytes())

    def share(self, variables: Sequence[Any]) -> None:
        """Gives the variables of all workers the values that those of the chief have."""
        for variable in variables if self.workers > 1 else ():
            variable.assign(self._chiefs(variable.numpy()))

    def _chiefs(self, values: NDArray[Any]) -> NDArray[Any]:
        def summed() -> Any:
            context = tf.distribute.get_replica_context()
            first = tf.equal(context.replica_id_in_sync_group, 0)
            own = tf.where(first, values, tf.zeros_like(values))
            return context.all_reduce(tf.distribute.ReduceOp.SUM, own)

        try:
            found = self.strategy.experimental_local_results(self.strategy.run(summed))[0]
        except tf.errors.UnavailableError:
            raise SetupError(
                f"worker {self.worker} lost the others; what ended them, the chief says"
            ) from None
        return np.asarray(found.numpy())


@functools.cache
def place(name: str) -> Placement:
    """Makes the strategy of ``adapt.distribution``.

    Args:
      name: ``one_device``; ``mirrored``, over all GPUs or else all logical CPUs of this machine;
        ``multi_worker``, over the machines that the environment variable TF_CONFIG names;
        ``tpu``; ``auto``, the widest of these that is there.

    Raises:
      ConfigError: TF_CONFIG is missing or broken.
      SetupError: there is no TPU.
    """
    if name == "auto":
        name = _widest()
    if name == "tpu":
        return Placement(_tpu())
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return Placement(tf.distribute.MirroredStrategy([d.name for d in devices]))
    if name == "multi_worker":
        return _workers()
    return Placement(tf.distribute.get_strategy())


def _widest() -> str:
    if os.environ.get("TF_CONFIG"):
        return "multi_worker"
    if os.environ.get("COLAB_TPU_ADDR") or os.environ.get("TPU_NAME"):
        return "tpu"
    return "mirrored" if len(tf.config.list_logical_devices("GPU")) > 1 else "one_device"


def _tpu() -> Any:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(
            tpu=os.environ.get("TPU_NAME", "local")
        )
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
        return tf.distribute.TPUStrategy(resolver)
    except (ValueError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        raise SetupError(
            f"distribution = tpu, and no TPU can be reached ({reason}); take a TPU runtime, or "
            "adapt.distribution=auto"
        ) from None


def _workers() -> Placement:
    try:
        told = json.loads(os.environ.get("TF_CONFIG", ""))
        workers = len(told["cluster"]["worker"])
        index = int(told["task"]["index"])
    except (ValueError, KeyError, TypeError):
        raise ConfigError(
            "distribution = multi_worker needs the environment variable TF_CONFIG with 'cluster' "
            "and 'task', as tf.distribute.MultiWorkerMirroredStrategy describes it"
        ) from None
    return Placement(tf.distribute.MultiWorkerMirroredStrategy(), index, workers)
