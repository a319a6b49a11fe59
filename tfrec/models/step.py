"""TaskModel: the training step that every tfrs.Model of ours shares."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

from tfrec.errors import ConfigError
from tfrec.models.dropout import drawing
from tfrec.models.keras_bridge import tf, tf_keras, tfrs


class TaskModel(tfrs.Model):
    """A tfrs.Model whose loss is a replica's share of the global batch's mean.

    The optimizer sums gradients over replicas, so the update is the same however many there are.

    Args:
      accumulate: Pieces a batch is cut into along its rows; their gradients make one update, with
        the memory of one piece. Only for losses that are sums over rows.

    Attributes:
      row_key: An input whose first axis are the rows that ``accumulate`` cuts.
      shared_keys: Inputs that have no such axis and go whole with every piece.
      part_means: Mean of each part of the loss by name, where ``compute_loss`` tells them.
    """

    row_key = "segment"
    shared_keys: tuple[str, ...] = ("denominator",)

    def __init__(self, accumulate: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.accumulate = accumulate
        self._seed = random.getrandbits(31)  # Python's generator: `set_seed` decides it.
        self.loss_mean = tf_keras.metrics.Mean(name="loss")
        self.part_means: dict[str, Any] = {}

    @property
    def metrics(self) -> list[Any]:
        """The mean loss of the epoch, and of each of its parts."""
        return [self.loss_mean, *self.part_means.values()]

    def train_step(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """One update of the weights."""
        loss, gradients = self._gradients(inputs)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self.loss_mean.update_state(loss * replicas)
        return {metric.name: metric.result() for metric in self.metrics}

    def test_step(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The loss without an update."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self.loss_mean.update_state(self.compute_loss(inputs, training=False) * replicas)
        return {metric.name: metric.result() for metric in self.metrics}

    def _gradients(self, inputs: Mapping[str, Any]) -> tuple[Any, list[Any]]:
        if self.accumulate == 1:
            return self._piece_gradients(inputs)

        def add(piece: Any, total: Any, *sums: Any) -> tuple[Any, ...]:
            loss, gradients = self._piece_gradients(self._piece(inputs, piece), piece)
            return piece + 1, total + loss, *(a + b for a, b in zip(sums, gradients, strict=True))

        state = (0, tf.constant(0.0), *(tf.zeros_like(v) for v in self.trainable_variables))
        if tf.distribute.get_strategy().num_replicas_in_sync > 1:
            # Replicas that gather from each other cannot do so within a loop.
            for _ in range(self.accumulate):
                state = add(*state)
        else:
            state = tf.while_loop(
                lambda piece, *_: piece < self.accumulate, add, state, parallel_iterations=1
            )
        return state[1], list(state[2:])

    def _piece_gradients(self, inputs: Mapping[str, Any], piece: Any = 0) -> tuple[Any, list[Any]]:
        variables = self.trainable_variables
        scaling = hasattr(self.optimizer, "get_scaled_loss")
        replica = tf.distribute.get_replica_context().replica_id_in_sync_group
        step = drawing(self._seed, self.optimizer.iterations, replica, piece)
        with step, tf.GradientTape() as tape:
            loss = tf.cast(self.compute_loss(inputs, training=True), tf.float32)
            goal = self.optimizer.get_scaled_loss(loss) if scaling else loss
        gradients = tape.gradient(goal, variables, unconnected_gradients="zero")
        if scaling:
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        # Sparse gradients are made dense: merging their rows has no static shape for XLA.
        return loss, [tf.convert_to_tensor(g) for g in gradients]

    def _piece(self, inputs: Mapping[str, Any], piece: Any) -> dict[str, Any]:
        rows, pieces = inputs[self.row_key].shape[0], self.accumulate
        if rows % pieces:
            raise ConfigError(
                f"accumulate = {pieces} does not divide a replica's {rows} rows; "
                "change adapt's accumulate or batch_size"
            )
        return {
            name: value
            if name in self.shared_keys
            else tf.reshape(value, [pieces, rows // pieces, *value.shape[1:]])[piece]
            for name, value in inputs.items()
        }
