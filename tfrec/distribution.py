"""Configuration -> tf.distribute strategy."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import Any

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
