"""Stored int8: a BERT whose large weights are variables of int8, for a SavedModel a quarter as big.

Weights alone: they are multiplied back to float32 in the graph, in stock operations, and everything
is computed as before. So this saves disk, transfer and memory of variables, and no time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.models.int8 import LARGEST, coded
from tfrec.models.keras_bridge import keras3, tf
from tfrec.models.text import TextEncoder


class StoredInt8:
    """A text encoder over weights in int8.

    Kernels have a scale for each output channel. The table of words has one for each row and one
    for each column, since a few columns are large in all rows.

    Args:
      encoder: Keeps its own weights.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        words = encoder.model.token_embedding
        self._table = _weight(words, "embeddings")
        self._kernels = []
        for layer in encoder.model._flatten_layers():
            if isinstance(layer, keras3.layers.Dense | keras3.layers.EinsumDense):
                kernel = _weight(layer, "kernel")
                self._kernels.append((kernel, *_rounded(kernel.numpy(), _inputs(layer))))
        table = self._table.numpy()
        columns = np.sqrt(np.square(table).mean(axis=0, keepdims=True))
        columns = np.maximum(columns, 1e-12).astype(np.float32)
        codes, scales, unit = coded(table / columns)
        self._codes, self._scales = _kept(codes), _kept(scales)
        self._columns = _kept(columns * np.float32(unit))

    @property
    def variables(self) -> list[Any]:
        """What is stored beside the encoder's small weights."""
        kernels = (variable for _, *stored in self._kernels for variable in stored)
        return [self._codes, self._scales, self._columns, *kernels]

    def __call__(self, token_ids: Any, padding_mask: Any) -> Any:
        """float32 (b, width), vectors of tokens int32 (b, t)."""
        # A table of the tokens that are there, since no call needs the whole one in float32.
        met = tf.reshape(token_ids, [-1])
        scale = tf.cast(tf.gather(self._scales, met), tf.float32) * self._columns
        words = tf.cast(tf.gather(self._codes, met), tf.float32) * scale
        places = tf.reshape(tf.range(tf.size(met)), tf.shape(token_ids))
        with keras3.StatelessScope() as scope:
            scope.add_update((self._table, words))
            for kernel, codes, scales in self._kernels:
                scope.add_update((kernel, tf.cast(codes, tf.float32) * scales))
            return self._encoder._vectors(places, padding_mask)


def _inputs(layer: Any) -> tuple[int, ...]:
    """The axes of a kernel that are summed over."""
    if isinstance(layer, keras3.layers.Dense):
        return (0,)
    given, out = layer.equation.split("->")
    kernel = given.split(",")[1]
    return tuple(axis for axis, letter in enumerate(kernel) if letter not in out)


def _rounded(kernel: NDArray[np.float32], inputs: tuple[int, ...]) -> tuple[Any, Any]:
    """A kernel in int8, and its scales."""
    largest = np.abs(kernel).max(axis=inputs, keepdims=True)
    scale = np.maximum(largest, 1e-12) / np.float32(LARGEST)
    return _kept(np.round(kernel / scale).astype(np.int8)), _kept(scale)


def _weight(layer: Any, name: str) -> Any:
    return next(weight for weight in layer.weights if weight.name == name)


def _kept(array: NDArray[Any]) -> Any:
    return tf.Variable(array, trainable=False)
