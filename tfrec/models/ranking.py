"""Ranker: what a user would do with each of his candidates, as a multi-task tfrs.Model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.config import TASKS, RankingConfig
from tfrec.errors import ConfigError, InputError
from tfrec.models.dropout import Dropout
from tfrec.models.keras_bridge import tf, tf_keras, tfrs
from tfrec.models.step import TaskModel

# Scalars further from their mean, in standard deviations, count as this far.
_SCALAR_LIMIT = 10.0

# Adam moves a weight by about a learning rate a step, which is little for a log-variance.
_VARIANCE_SCALE = 10.0


class Ranker(TaskModel):
    """Multi-task ranking model over the candidates of retrieval.

    It reads four sources: the scores of retrieval; behaviour (the query, the candidate and target
    attention over the history, and products of these); the user (profile text, attributes, and the
    product of profile and item text); the item (text, attributes). ``config.fusion`` says how they
    become what each task says: :class:`LinearFusion`, :class:`GatedFusion` or
    :class:`MixtureFusion`. Conversion is trained over all exposures as p(click) *
    p(conversion | click) (ESMM, Ma et al. 2018, "Entire Space Multi-Task Model", arXiv:1804.07931).

    The losses of the tasks are weighed as ``config.task_weights`` says, or by learned uncertainty
    (Kendall, Gal and Cipolla 2018, "Multi-Task Learning Using Uncertainty to Weigh Losses",
    arXiv:1705.07115): with ``s`` the logarithm of a task's variance, an exposure's loss ``l``
    counts ``exp(-s) * l + s / 2``, and half of ``l`` where it is a squared error.

    Batches come from :class:`~tfrec.models.exposures.RankingBatches`. As half of their exposures
    are sampled on purpose, ``click`` and ``conversion`` are probabilities among such exposures, not
    rates of a running service; ``like`` and ``rating`` are learned from rated events only.

    Args:
      config: Sizes, ``history`` among them: the most places a history may have.
      embedding_dim: Width of query and candidate vectors, d.
      attributes_width: Width of the items' attributes, F; may be 0.
      user_attributes_width: Width of the users' attributes; may be 0.
      num_scalars: How many further numbers each candidate has, S; may be 0.
      text_width: Width of the items' texts, P; may be 0.
      profile_width: Width of the users' profile texts, P or 0.
      tasks: Distinct names among :data:`tfrec.config.TASKS`; ``conversion`` needs ``click``.
      rating_mean: Mean rating of the training events, in stars.
      rating_std: Their standard deviation; 0 counts as 1.

    Raises:
      ConfigError: the tasks are not as said.
    """

    row_key = "query"

    def __init__(
        self,
        config: RankingConfig,
        *,
        embedding_dim: int,
        attributes_width: int,
        user_attributes_width: int,
        num_scalars: int,
        text_width: int = 0,
        profile_width: int = 0,
        tasks: Sequence[str] = ("click", "like", "rating"),
        rating_mean: float = 0.0,
        rating_std: float = 1.0,
        **kwargs: Any,
    ) -> None:
        # The numbers keep float32 on their way in, whatever the precision of the layers.
        super().__init__(accumulate=config.accumulate, autocast=False, **kwargs)
        self.config = config
        self.tasks = checked_tasks(tasks)
        self.rating_mean, self.rating_std = rating_mean, rating_std or 1.0
        self.widths = {
            "candidates": embedding_dim,
            "attributes": attributes_width,
            "user_attributes": user_attributes_width,
            "text": text_width,
            "profile": profile_width,
            "scalars": num_scalars,
        }
        self.query_norm = tf_keras.layers.LayerNormalization(epsilon=1e-6, name="query_norm")
        self.item_norm = tf_keras.layers.LayerNormalization(epsilon=1e-6, name="item_norm")
        self.attention = TargetAttention(config.history, name="attention")
        self.fusion = FUSIONS[config.fusion](config, len(self.tasks), name="fusion")
        self.log_variance = None
        if config.task_weighting == "uncertainty":
            self.log_variance = self.add_weight(
                name="log_variance", shape=(len(self.tasks),), dtype="float32", initializer="zeros"
            )
        self.scalar_mean = self._constant("scalar_mean", "zeros")
        self.scalar_std = self._constant("scalar_std", "ones")
        self._touch()

    def call(self, inputs: Mapping[str, Any], training: bool = False) -> dict[str, Any]:
        """What each task says of each candidate.

        Args:
          inputs: float32 ``query`` (B, d), query vectors; ``history`` (B, H, d), candidate vectors
            of the last events, a later place being a later event; ``history_mask`` (B, H), 1 where
            there is an event; ``candidates`` (B, C, d); ``attributes`` (B, C, F);
            ``user_attributes`` (B, user attribute width); ``text`` (B, C, P); ``profile`` (B, P);
            ``scalars`` (B, C, S).
          training: Whether dropout is on.

        Returns:
          Task -> float32 (B, C): ``click``, ``like`` and ``conversion`` in [0, 1], ``rating`` in
          stars, which may lie somewhat outside the scale.
        """
        logits = self._logits(inputs, training)
        out = {task: tf.sigmoid(value) for task, value in logits.items()}
        if "rating" in out:
            out["rating"] = logits["rating"] * self.rating_std + self.rating_mean
        if "conversion" in out:
            out["conversion"] = out["click"] * out["conversion"]
        return out

    def compute_loss(self, inputs: Mapping[str, Any], training: bool = False) -> Any:
        """Loss of one replica's part: a mean over examples of sums over exposures and tasks.

        A sum over a row's exposures keeps the one event that is liked or rated as heavy as the one
        that is clicked, however many exposures are sampled beside it.

        Args:
          inputs: Those of :meth:`call` and float32 ``label_click``, ``label_like``,
            ``label_rating`` (stars), ``label_conversion`` (B, C) of the tasks; ``mask_like``,
            ``mask_rating`` (B, C), 1 where the label is known; ``weight`` (B,), weights of the
            rows; ``denominator`` (1,), the sum of the weights of the whole global batch.
          training: Whether dropout is on.

        Returns:
          float32 scalar; the sum over the replicas is the loss of the batch.
        """
        logits = self._logits(inputs, training)
        total = sum(self._weighed(task, logits, inputs) for task in self.tasks)
        rows = tf.reduce_sum(total, axis=1) * inputs["weight"]
        return tf.reduce_sum(rows) / inputs["denominator"][0]

    @property
    def task_weights(self) -> dict[str, float]:
        """How much each task's loss counts: as the configuration says, or as learned."""
        if self.log_variance is None:
            return {task: self.config.task_weights.get(task, 1.0) for task in self.tasks}
        learned = np.exp(-_VARIANCE_SCALE * self.log_variance.numpy())
        return {task: float(w) for task, w in zip(self.tasks, learned, strict=True)}

    def adapt_scalars(self, sample: NDArray[np.float32]) -> None:
        """Learns the mean and the spread with which scalars are normalised.

        Args:
          sample: float32 (..., S), such as :meth:`RankingBatches.sample_scalars
            <tfrec.models.exposures.RankingBatches.sample_scalars>` gives.

        Raises:
          InputError: the width is another, there is no row, or a value is not finite.
        """
        rows = np.asarray(sample, np.float64).reshape(-1, sample.shape[-1])
        width = self.widths["scalars"]
        if rows.shape[1] != width or not len(rows):
            raise InputError(
                f"scalars to learn from are (n, {width}) with n above 0, and not {rows.shape}"
            )
        if not np.isfinite(rows).all():
            raise InputError("a scalar to learn from is not finite; check what makes the scores")
        spread = rows.std(axis=0)
        # A scalar that never changes, such as the score of a model that is off, stays at zero.
        flat = spread < 1e-6 * np.maximum(1.0, np.abs(rows.mean(axis=0)))
        self.scalar_mean.assign(rows.mean(axis=0))
        self.scalar_std.assign(np.where(flat, 1.0, spread))

    def _constant(self, name: str, start: str) -> Any:
        return self.add_weight(
            name=name,
            shape=(self.widths["scalars"],),
            dtype="float32",
            initializer=start,
            trainable=False,
            experimental_autocast=False,
        )

    def _logits(self, inputs: Mapping[str, Any], training: bool) -> dict[str, Any]:
        logits = self.fusion(self._sources(inputs), training=training)
        shape = tf.shape(inputs["candidates"])[:2]
        return {task: tf.reshape(logits[:, i], shape) for i, task in enumerate(self.tasks)}

    def _sources(self, inputs: Mapping[str, Any]) -> list[list[Any]]:
        """float (B, C, width), the parts of each source that there is."""
        candidates = self.item_norm(inputs["candidates"])
        history = self.item_norm(inputs["history"])
        attended = self.attention(candidates, history, inputs["history_mask"])
        query = _for_each(self.query_norm(inputs["query"]), candidates)
        behaviour = [query, candidates, attended, query * candidates, attended * candidates]
        # LiteRT and XLA dislike arrays of width 0, so those are left out.
        there = {name: inputs[name] for name, width in self.widths.items() if width}
        for name in ("user_attributes", "profile"):
            if name in there:
                there[name] = _for_each(there[name], candidates)
        if "scalars" in there:
            there["scalars"] = self._normalised(there["scalars"])
        if "text" in there and "profile" in there:
            there["match"] = there["text"] * there["profile"]
        groups = [behaviour]
        for names in (
            ("scalars",),
            ("user_attributes", "profile", "match"),
            ("attributes", "text"),
        ):
            groups.append([there[name] for name in names if name in there])
        return [[tf.cast(part, self.compute_dtype) for part in group] for group in groups if group]

    def _normalised(self, scalars: Any) -> Any:
        z = (tf.cast(scalars, tf.float32) - self.scalar_mean) / self.scalar_std
        return tf.clip_by_value(z, -_SCALAR_LIMIT, _SCALAR_LIMIT)

    def _weighed(self, task: str, logits: Mapping[str, Any], inputs: Mapping[str, Any]) -> Any:
        """float32 (B, C), what each exposure adds to the loss; 0 where the label is not known."""
        loss = self._task_loss(task, inputs[f"label_{task}"], logits)
        if self.log_variance is None:
            loss *= self.config.task_weights.get(task, 1.0)
        else:
            s = _VARIANCE_SCALE * self.log_variance[self.tasks.index(task)]
            loss = tf.exp(-s) * loss * (0.5 if task == "rating" else 1.0) + s / 2
        return loss * inputs[f"mask_{task}"] if task in ("like", "rating") else loss

    def _task_loss(self, task: str, label: Any, logits: Mapping[str, Any]) -> Any:
        if task == "rating":
            return tf.square(logits[task] - (label - self.rating_mean) / self.rating_std)
        if task == "conversion":
            return product_cross_entropy(label, logits["click"], logits[task])
        return tf.nn.sigmoid_cross_entropy_with_logits(label, logits[task])

    def _touch(self) -> None:
        """Builds every weight, so that checkpoints and optimizers know them all."""
        d = self.widths["candidates"]
        shapes = {
            "query": [1, d],
            "history": [1, self.config.history, d],
            "history_mask": [1, self.config.history],
        }
        for name, width in self.widths.items():
            shapes[name] = [1, width] if name in ("user_attributes", "profile") else [1, 1, width]
        self({name: tf.zeros(shape) for name, shape in shapes.items()})


class TargetAttention(tf_keras.layers.Layer):
    """What of a history matters for a candidate.

    Deep Interest Network (Zhou et al. 2018) with a scaled inner product, and a learned weight for
    how long ago, in events, something happened.

    Args:
      length: Most places of a history.
    """

    def __init__(self, length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length = length

    def build(self, shape: Any) -> None:
        """Makes the weights for candidates of the given shape."""
        width = shape[-1]
        # One projection says as much as one for each side, and this side is the shorter one.
        self.project = tf_keras.layers.Dense(width, name="project")
        self.project.build(shape)
        self.recency = self.add_weight(name="recency", shape=(self.length,), initializer="zeros")
        super().build(shape)

    def call(self, candidates: Any, history: Any, mask: Any) -> Any:
        """Averages the history for each candidate.

        Args:
          candidates: float (B, C, d).
          history: float (B, H, d), H at most ``length``.
          mask: float (B, H), 1 where there is an event.

        Returns:
          float (B, C, d); zeros where the history is empty.
        """
        mask = tf.cast(mask, tf.float32)
        age = tf.cast(tf.cumsum(mask, axis=1, reverse=True), tf.int32)
        age = tf.clip_by_value(age, 1, self.length)
        recency = tf.gather(tf.cast(self.recency, tf.float32), age - 1)
        asked = self.project(tf.reshape(candidates, [-1, candidates.shape[-1]]))
        asked = tf.reshape(asked, tf.shape(candidates))
        scores = tf.matmul(asked, history, transpose_b=True)
        scores = tf.cast(scores, tf.float32) * float(history.shape[-1]) ** -0.5
        scores += (recency + (mask - 1) * 1e9)[:, None]
        weights = tf.nn.softmax(scores) * mask[:, None]
        return tf.matmul(tf.cast(weights, history.dtype), history)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "length": self.length}


class Fusion(tf_keras.layers.Layer):
    """Sources in, a logit of each task out.

    Args:
      config: ``hidden``, ``dropout`` and what a fusion says.
      tasks: How many.
    """

    def __init__(self, config: RankingConfig, tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.config, self.tasks = config, tasks
        self.dropout = Dropout(config.dropout)

    def call(self, sources: Sequence[Sequence[Any]], training: bool = False) -> Any:
        """float (B, C, width), the parts of each source -> float32 (B * C, tasks)."""
        raise NotImplementedError


class LinearFusion(Fusion):
    """A weighted sum of all features for each task: (logistic) regression."""

    def __init__(self, config: RankingConfig, tasks: int, **kwargs: Any) -> None:
        super().__init__(config, tasks, **kwargs)
        # From zero: a sum has no symmetry to break, and what is random would only be noise.
        self.logits = tf_keras.layers.Dense(
            tasks, kernel_initializer="zeros", dtype="float32", name="logits"
        )

    def call(self, sources: Sequence[Sequence[Any]], training: bool = False) -> Any:
        """See :class:`Fusion`."""
        return self.logits(self.dropout(_rows(*sources), training=training))


class GatedFusion(Fusion):
    """An expert for each source, mixed for each task by a gate that reads all of them.

    The gated multimodal unit (Arevalo et al. 2017, "Gated Multimodal Units for Information Fusion",
    arXiv:1702.01992) with a gate and a tower for each task.
    """

    def __init__(self, config: RankingConfig, tasks: int, **kwargs: Any) -> None:
        super().__init__(config, tasks, **kwargs)
        self.towers = [TaskHead(config.hidden, name=f"tower_{i}") for i in range(tasks)]

    def build(self, shapes: Sequence[Sequence[Any]]) -> None:
        """Makes an expert for each of the sources."""
        self.experts = [
            tf_keras.layers.Dense(self.config.hidden, activation="relu", name=f"expert_{i}")
            for i in range(len(shapes))
        ]
        self.gates = tf_keras.layers.Dense(self.tasks * len(shapes), name="gates")
        super().build(shapes)

    def call(self, sources: Sequence[Sequence[Any]], training: bool = False) -> Any:
        """See :class:`Fusion`."""
        experts = zip(self.experts, sources, strict=True)
        made = [expert(_rows(source)) for expert, source in experts]
        gates = self.gates(_rows(*sources))
        mixed = [self.dropout(one, training=training) for one in _mixed(gates, made, self.tasks)]
        return _towers(self.towers, mixed)


class MixtureFusion(Fusion):
    """All features crossed, then experts that the tasks share, mixed by a gate a task.

    DCN-v2 (Wang et al. 2021, arXiv:2008.13535) and MMoE (Ma et al. 2018, "Modeling Task
    Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts").
    """

    def __init__(self, config: RankingConfig, tasks: int, **kwargs: Any) -> None:
        super().__init__(config, tasks, **kwargs)
        self.mixture = GatedExperts(config.experts, config.hidden, tasks, name="mixture")
        self.towers = [TaskHead(config.hidden, name=f"tower_{i}") for i in range(tasks)]

    def build(self, shapes: Sequence[Sequence[Any]]) -> None:
        """Makes cross layers for sources with parts of these shapes."""
        hidden = self.config.hidden
        width = sum(shape[-1] for parts in shapes for shape in parts)
        self.cross = [
            tfrs.layers.dcn.Cross(
                projection_dim=hidden if hidden < width / 2 else None,
                kernel_initializer="glorot_uniform",
                name=f"cross_{i}",
            )
            for i in range(self.config.cross_layers)
        ]
        super().build(shapes)

    def call(self, sources: Sequence[Sequence[Any]], training: bool = False) -> Any:
        """See :class:`Fusion`."""
        crossed = features = _rows(*sources)
        for layer in self.cross:
            crossed = layer(features, crossed)
        mixed = self.mixture(self.dropout(crossed, training=training))
        return _towers(self.towers, [self.dropout(one, training=training) for one in mixed])


FUSIONS: Mapping[str, type[Fusion]] = {
    "linear": LinearFusion,
    "gated": GatedFusion,
    "mmoe": MixtureFusion,
}
"""The values of ``adapt.ranking.fusion``."""


class GatedExperts(tf_keras.layers.Layer):
    """Experts that all tasks share, mixed for each task by its own gate (MMoE).

    Args:
      experts: How many.
      hidden: Width of each.
      tasks: How many gates.
    """

    def __init__(self, experts: int, hidden: int, tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts, self.hidden, self.tasks = experts, hidden, tasks
        self.expand = tf_keras.layers.Dense(experts * hidden, activation="relu", name="experts")
        self.gates = tf_keras.layers.Dense(tasks * experts, name="gates")

    def call(self, inputs: Any) -> Any:
        """float (n, width) -> float (n, hidden) of each task."""
        made = tf.split(self.expand(inputs), self.experts, axis=-1)
        return _mixed(self.gates(inputs), made, self.tasks)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        sizes = {"experts": self.experts, "hidden": self.hidden, "tasks": self.tasks}
        return {**super().get_config(), **sizes}


class TaskHead(tf_keras.layers.Layer):
    """A task's tower: one hidden layer of half the width, and its float32 logit."""

    def __init__(self, hidden: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = hidden
        self.narrow = tf_keras.layers.Dense(hidden // 2, activation="relu", name="narrow")
        self.logit = tf_keras.layers.Dense(1, dtype="float32", name="logit")

    def call(self, inputs: Any) -> Any:
        """float (n, hidden) -> float32 (n, 1)."""
        return self.logit(self.narrow(inputs))

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "hidden": self.hidden}


def _rows(*sources: Sequence[Any]) -> Any:
    """float (B, C, width) each -> float (B * C, all widths): the candidates of all users one below
    another, since products of matrices are what every runtime is fastest at."""
    joined = tf.concat([part for parts in sources for part in parts], axis=-1)
    return tf.reshape(joined, [-1, joined.shape[-1]])


def _mixed(gates: Any, experts: Sequence[Any], tasks: int) -> list[Any]:
    """For each task the sum of the experts, float (n, width) each, by the softmax of its part of
    ``gates``, float (n, tasks * experts)."""
    count = len(experts)
    weights = tf.nn.softmax(tf.reshape(gates, [-1, tasks, count]))
    # In columns: LiteRT is slow at arrays with an axis for the tasks between the others.
    columns = tf.split(tf.reshape(weights, [-1, tasks * count]), tasks * count, axis=-1)
    return [
        sum(columns[task * count + i] * expert for i, expert in enumerate(experts))
        for task in range(tasks)
    ]


def _towers(towers: Sequence[Any], mixed: Sequence[Any]) -> Any:
    """float (n, hidden) of each task -> float32 (n, tasks), each through its own tower."""
    found = [tower(of_task) for tower, of_task in zip(towers, mixed, strict=True)]
    return tf.concat(found, axis=-1)


def product_cross_entropy(label: Any, first: Any, second: Any) -> Any:
    """Cross-entropy of the probability sigmoid(first) * sigmoid(second), finite for all logits.

    ``1 - p`` is taken as ``p * (exp(-a) + exp(-b) + exp(-a - b))`` in logarithms, which loses
    nothing where ``p`` is near 1.
    """
    log_yes = tf.math.log_sigmoid(first) + tf.math.log_sigmoid(second)
    log_no = log_yes + tf.reduce_logsumexp(tf.stack([-first, -second, -first - second]), axis=0)
    return -label * log_yes - (1 - label) * log_no


def checked_tasks(tasks: Sequence[str]) -> tuple[str, ...]:
    """The tasks as a tuple.

    Raises:
      ConfigError: one is not in :data:`tfrec.config.TASKS` or comes twice, there is none, or there
        is ``conversion`` without ``click``.
    """
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise ConfigError(f"ranking task '{unknown[0]}' is not one of {', '.join(TASKS)}")
    if not tasks or len(set(tasks)) < len(tasks):
        raise ConfigError(f"ranking tasks must be distinct and at least one; got {list(tasks)}")
    if "conversion" in tasks and "click" not in tasks:
        raise ConfigError("ranking task 'conversion' needs 'click': add it to the tasks")
    return tuple(tasks)


def _for_each(rows: Any, candidates: Any) -> Any:
    """(B, width) -> (B, C, width), the same for each candidate of a row."""
    # Not tf.broadcast_to, which takes LiteRT thirty times as long.
    return tf.tile(tf.expand_dims(rows, 1), [1, tf.shape(candidates)[1], 1])
