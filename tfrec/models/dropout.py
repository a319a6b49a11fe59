"""Dropout that follows the seed: compiled or not, on any device, and after a kill.

Under XLA the random operations of TensorFlow heed no seed, and no checkpoint holds their state. So
a training step says which step it is (:func:`drawing`), and a mask is a hash of that, of the place
in the model and of the place in the array. There is no state to save, and on a CPU the hash takes
about half the time of TensorFlow's generators.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from tfrec.models.keras_bridge import tf, tf_keras

_GOLDEN = 0x9E3779B9


class _Draws:
    """The masks of one step, numbered in the order in which the model asks for them."""

    def __init__(self, identity: tuple[Any, ...]) -> None:
        self.count = 0
        self.key = [_number(0x243F6A88), _number(0x85A308D3)]
        for part in identity:
            self.key = [_hash(k + tf.cast(part, tf.uint32), _number(_GOLDEN)) for k in self.key]

    def next(self) -> tuple[Any, Any]:
        self.count += 1
        first, second = (_hash(k, _number(self.count * _GOLDEN)) for k in self.key)
        return first, second


_draws: ContextVar[_Draws | None] = ContextVar("_draws", default=None)


@contextmanager
def drawing(*identity: Any) -> Iterator[None]:
    """Masks made within the block depend on ``identity`` and on nothing else.

    Args:
      identity: Integers or scalar integer tensors that tell this step from every other, such as
        seed, number of the update and replica.
    """
    token = _draws.set(_Draws(identity))
    try:
        yield
    finally:
        _draws.reset(token)


def keep_mask(shape: Any, rate: float) -> Any:
    """bool array of a shape, false in a random share ``rate`` of its places.

    Outside of :func:`drawing` it comes from TensorFlow's generator.
    """
    draws = _draws.get()
    if draws is None:
        return tf.random.uniform(shape) >= rate
    return _bits(shape, draws) >= _number(round(rate * 2**32))


def standard_normal(shape: Any) -> Any:
    """float32 array of a shape, drawn from the standard normal distribution (Box and Muller 1958).

    It follows :func:`drawing` as :func:`keep_mask` does.
    """
    draws = _draws.get()
    if draws is None:
        return tf.random.normal(shape)
    first, second = (_uniform(shape, draws) for _ in range(2))
    return tf.sqrt(-2 * tf.math.log(first)) * tf.cos(2 * math.pi * second)


def _uniform(shape: Any, draws: _Draws) -> Any:
    """float32 in (0, 1]."""
    bits = tf.bitwise.right_shift(_bits(shape, draws), _number(8))
    return (tf.cast(bits, tf.float32) + 1) / 2**24


def _bits(shape: Any, draws: _Draws) -> Any:
    first, second = draws.next()
    places = tf.cast(tf.range(tf.reduce_prod(shape)), tf.uint32)
    return _hash(tf.bitwise.bitwise_xor(tf.reshape(places, shape), first), second)


class Dropout(tf_keras.layers.Layer):
    """Sets a random share of the inputs to zero in training and scales up the others.

    Args:
      rate: That share, below 1.
    """

    def __init__(self, rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rate = rate

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Same shape and dtype as ``inputs``."""
        if not training or not self.rate:
            return inputs
        kept = keep_mask(tf.shape(inputs), self.rate)
        return tf.where(kept, inputs * tf.cast(1 / (1 - self.rate), inputs.dtype), 0)

    def get_config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().get_config(), "rate": self.rate}


def _hash(values: Any, key: Any) -> Any:
    """Mixes uint32 values: the hash "lowbias32" of C. Wellons, keyed in its middle."""
    values = _fold(values, 16) * _number(0x7FEB352D) + key
    return _fold(_fold(values, 15) * _number(0x846CA68B), 16)


def _fold(values: Any, bits: int) -> Any:
    shifted = tf.bitwise.right_shift(values, _number(bits))
    return tf.bitwise.bitwise_xor(values, shifted)


def _number(value: int) -> Any:
    return tf.constant(value % 2**32, tf.uint32)
