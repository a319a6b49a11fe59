"""Pretrainer: towers that learn from sequences by several objectives at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.config import PretrainConfig
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.objectives import (
    Contrastive,
    CoOccurrence,
    Denoising,
    Masked,
    NextItem,
    Objective,
    TextHistory,
    Variational,
)
from tfrec.models.retrieval import TwoTower
from tfrec.models.step import TaskModel


class Pretrainer(TaskModel):
    """A TwoTower trained by objectives that need no labels.

    Args:
      two_tower: What is trained; its own loss is not used.
      config: Weight of each objective, and its settings.
      anneal: Updates over which the divergence of ``vae`` grows.
      text_history: That objective, which needs texts of the data.
      known: int32, rows of the catalog that noise may put into a history; None: all.

    Attributes:
      objectives: The sequence objectives by name.
    """

    shared_keys = ("denominators", "items", "shift", "token_ids", "padding_mask")

    def __init__(
        self,
        two_tower: TwoTower,
        config: PretrainConfig,
        anneal: int = 1000,
        text_history: TextHistory | None = None,
        known: NDArray[np.int32] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(accumulate=config.accumulate, **kwargs)
        self.two_tower, self.config = two_tower, config
        self.temperature = two_tower.config.temperature
        width = two_tower.config.embedding_dim
        if known is None:
            known = np.arange(1, two_tower.candidate_tower.num_rows, dtype=np.int32)
        made: dict[str, Objective] = {
            "masked": Masked(config.mask_rate),
            "denoising": Denoising(known),
            "next_item": NextItem(),
            "contrastive": Contrastive(known),
            "co_occurrence": CoOccurrence(),
            "vae": Variational(width, config.latent, most=config.divergence, anneal=anneal),
        }
        if text_history is not None:
            made["text_history"] = text_history
        weights = {n: w for n, w in config.objectives.items() if w and n in made}
        if config.objectives.get("contrastive") and two_tower.has_text:
            weights["co_occurrence"] = config.objectives["contrastive"]
        self.weights_of = weights
        self.objectives = {name: made[name] for name in weights}
        self.vae = self.objectives.get("vae")
        self.mask = self.add_weight(
            name="mask", shape=(width,), initializer=tf_keras.initializers.RandomNormal(0.02)
        )
        self.part_means = {name: tf_keras.metrics.Mean(name=name) for name in weights}
        if isinstance(self.vae, Variational):
            self.vae(tf.zeros([1, width]))

    def compute_loss(self, inputs: Mapping[str, Any], training: bool = False) -> Any:
        """Weighted sum of the objectives, as a replica's share of the global batch's mean."""
        vectors = self.two_tower.candidates(inputs, training)
        self._inputs = inputs
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        total = tf.constant(0.0)
        for place, (name, objective) in enumerate(self.objectives.items()):
            if isinstance(objective, Variational):
                step = self.optimizer.iterations
                value = objective.loss_of(self, vectors, inputs, training, step)
            else:
                value = objective.loss(self, vectors, inputs, training)
            value /= inputs["denominators"][place]
            self.part_means[name].update_state(value * replicas * self.accumulate)
            total += self.weights_of[name] * value
        return total

    def hidden(
        self,
        vectors: Any,
        batch: Mapping[str, Any],
        *,
        causal: bool,
        training: bool,
        hide: Any = None,
        users: bool = True,
    ) -> Any:
        """See :class:`tfrec.models.objectives.Model`."""
        read = tf.gather(vectors, batch["item"])
        if hide is not None:
            hidden = tf.cast(hide, read.dtype)[:, :, None]
            read = read * (1 - hidden) + tf.cast(self.mask, read.dtype) * hidden
            shown = tf.cast(1 - hide, tf.int32)
            # The type of a hidden event is unknown (1) and not the start token's (0).
            event = batch["event"] * shown + (1 - shown)
            batch = {**batch, "event": event, "rating": batch["rating"] * shown}
        profile, attributes = batch["profile"], batch["attributes"]
        if not users:
            profile, attributes = profile[:, :, :0], attributes[:, :, :0]
        return self.two_tower.query_tower(
            read, batch, profile, attributes, training=training, causal=causal
        )

    @property
    def shift(self) -> Any:
        """See :class:`tfrec.models.objectives.Model`."""
        sampled = self._inputs.get("shift")
        return self.two_tower.shift if sampled is None else sampled

    def text_only(self, training: bool) -> Any:
        """See :class:`tfrec.models.objectives.Model`."""
        return self.two_tower.candidates(self._inputs, training, ids=False)
