"""Pruning: kernels of any model, Keras 2 or Keras 3, made sparse while it trains, by TF-MOT.

TF-MOT wraps layers that it knows, of models that it can clone: it refuses a BERT of keras-hub, and
subclassed models. What it does to a kernel needs neither, so it is applied to the variables
themselves: its schedules, and its masks by magnitude (Zhu & Gupta 2017, arXiv:1710.01878), of
single weights, of blocks, and of two in any four (Mishra et al. 2021, arXiv:2104.08378). Where it
is known how large a kernel's inputs are, what counts is the size of a weight times that of its
input (Sun et al. 2023, "Wanda", arXiv:2306.11695).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import ConfigError
from tfrec.models.keras_bridge import tf, tf_keras, tfmot, tfmot_pruning
from tfrec.models.named import kernels

Pattern = Literal["unstructured", "block", "2:4"]
Shape = Literal["polynomial", "constant"]

_BLOCK = (1, 4)
_UPDATES = 30  # of the masks, in a training
_RISE = 0.6  # of a training's steps; the rest heals


@dataclass(frozen=True)
class Sparsity:
    """How much of the kernels becomes zero, where, and when.

    Attributes:
      share: Of each kernel's weights, in (0, 1); 2:4 is always one half.
      pattern: ``unstructured``: any weights; ``block``: four in a row of a kernel at a time;
        ``2:4``: two of every four along the inputs.
      schedule: ``polynomial``: rising over the first part of the training; ``constant``: all from
        its start on, as 2:4 always is.

    Raises:
      ConfigError: the share is no share.
    """

    share: float = 0.5
    pattern: Pattern = "unstructured"
    schedule: Shape = "polynomial"

    def __post_init__(self) -> None:
        if not 0 < self.share < 1:
            raise ConfigError(
                f"a share of {self.share:g} of the weights cannot be pruned: between 0 and 1"
            )
        if self.pattern == "2:4" and self.share != 0.5:
            raise ConfigError(f"the pattern 2:4 prunes 0.5 of the weights, not {self.share:g}")

    def over(self, steps: int) -> Any:
        """TF-MOT's schedule for a training of so many steps."""
        every = max(int(_RISE * steps) // _UPDATES, 1)
        # The last update falls on the end, or the share would not be reached.
        end = max(int(_RISE * steps) // every, 1) * every
        if self.schedule == "constant" or self.pattern == "2:4":
            return tfmot.ConstantSparsity(self.share, begin_step=1, end_step=1, frequency=1)
        return tfmot.PolynomialDecay(0.0, self.share, begin_step=0, end_step=end, frequency=every)


def zeros_of(model: Any) -> dict[str, float]:
    """Share of zeros in each kernel."""
    return {name: float(np.mean(v.numpy() == 0)) for name, v in kernels(model).items()}


class Pruner(tf_keras.layers.Layer):
    """Masks of kernels, kept up to date by TF-MOT.

    Part of the model that is trained, so its checkpoints hold masks and the place in the schedule:
    a training that was killed goes on with the same masks.

    Args:
      kernels: What is pruned, by name.
      sparsity: How.
      steps: Of the whole training.
      inputs: id of a kernel -> float32 (in,), how large its inputs are; ones where it is not there.
    """

    def __init__(
        self,
        kernels: Mapping[str, Any],
        sparsity: Sparsity,
        steps: int,
        inputs: Mapping[int, NDArray[np.float32]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        masks, thresholds = [], []
        for number, variable in enumerate(kernels.values()):
            masks.append(self._state(f"mask_{number}", variable.shape, "ones"))
            thresholds.append(self._state(f"threshold_{number}", (), "zeros"))
        # Under a name that is not tracked: the kernels belong to the model that is pruned.
        self._masks, self._thresholds = masks, thresholds
        self._step = self.add_weight(
            name="step", shape=(), dtype=tf.int64, initializer="zeros", trainable=False
        )
        self._pruning = _pruning(
            list(zip(kernels.values(), masks, thresholds, strict=True)),
            sparsity.over(steps),
            sparsity.pattern,
            self._step,
            inputs or {},
        )

    def _state(self, name: str, shape: Any, initializer: str) -> Any:
        return self.add_weight(
            name=name,
            shape=shape,
            initializer=initializer,
            trainable=False,
            aggregation=tf.VariableAggregation.MEAN,
        )

    def call(self, inputs: Any) -> Any:
        """To be called once after each update of the weights, in the replica's context: updates
        the masks where that is due, and applies them. Returns ``inputs``."""
        self._step.assign_add(1)
        with tf.control_dependencies([self._pruning.conditional_mask_update()]):
            applied = self._pruning.weight_mask_op()
        with tf.control_dependencies([applied] if applied is not None else []):
            return tf.identity(inputs)


def _pruning(
    variables: list[Any],
    schedule: Any,
    pattern: Pattern,
    step: Any,
    inputs: Mapping[int, NDArray[np.float32]],
) -> Any:
    """TF-MOT's pruning of (kernel, mask, threshold), to which every kernel is a matrix."""

    class Pruning(tfmot_pruning.Pruning):
        def _validate_block(self) -> None:
            """Nothing: heads of attention are seen as the matrix that they are together."""

        def _maybe_update_block_mask(self, weights: Any) -> Any:
            matrix = tf.reshape(tf.convert_to_tensor(weights), _matrix(weights.shape))
            if id(weights) in inputs:
                matrix *= inputs[id(weights)][:, None]
            threshold, mask = super()._maybe_update_block_mask(matrix)
            return threshold, tf.reshape(mask, weights.shape)

    return Pruning(
        training_step_fn=lambda: step,
        pruning_vars=variables,
        pruning_schedule=schedule,
        block_size=_BLOCK if pattern == "block" else (1, 1),
        block_pooling_type="AVG",
        sparsity_m_by_n=(2, 4) if pattern == "2:4" else None,
    )


def _matrix(shape: Any) -> tuple[int, int]:
    """(inputs, outputs) of a kernel: of heads, the axis of the residual stream is alone."""
    if len(shape) == 2:
        return int(shape[0]), int(shape[1])
    first, last = int(shape[0]), int(shape[-1])
    size = int(shape.num_elements())
    # (width, heads, size) gives queries, keys and values; (heads, size, width) takes them in.
    return (first, size // first) if first >= last else (size // last, last)
