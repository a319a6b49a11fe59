"""Kernels in int8 that lose little: a scale for each input, and rounding that knows the inputs.

LiteRT brings the activations to int8 as they come, one scale for each row, and keeps a kernel with
one scale for each column. So one large channel of a row takes the steps away from all others; what
is divided by a vector before, and multiplied into the kernel, makes the channels alike
(SmoothQuant: Xiao et al. 2023, arXiv:2211.10438). And a weight rounded up is made good by the
weights that are rounded after it, as far as their inputs go together (GPTQ: Frantar et al. 2023,
arXiv:2210.17323). NumPy alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float32]
Wide = NDArray[np.float64]
Settle = Callable[[int, Wide], Wide]

LARGEST = 127
_SHARE = 0.6  # of a channel's size that the kernel takes over
_DAMPING = 0.01  # of the mean of the diagonal, as in GPTQ
_A_STEP = 1e-3  # of rounding, in steps
_BLOCK = 128  # channels whose errors are made good together


class Inputs:
    """What is known of the inputs of a matrix product.

    Args:
      width: Channels of an input.

    Attributes:
      largest: float32 (width,), the largest absolute value of each channel.
      gram: float64 (width, width), the sum of the outer products of all inputs with themselves.
    """

    def __init__(self, width: int) -> None:
        self.largest = np.zeros(width, np.float32)
        self.gram = np.zeros((width, width))

    def add(self, values: NDArray[Any]) -> None:
        """Takes in float32 (n, width)."""
        self.largest = np.maximum(self.largest, np.abs(values).max(axis=0))
        self.gram += values.T @ values


def holds(kernel: Matrix) -> bool:
    """Whether int8 with a scale for each column holds float32 (in, out) as it is."""
    steps = np.abs(kernel).max(axis=0) / LARGEST
    codes = kernel / np.maximum(steps, 1e-12)
    return bool(np.abs(codes - np.round(codes)).max(initial=0) < _A_STEP)


def balanced(kernel: Matrix, largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """What to divide each input channel by, and to multiply its row of the kernel by.

    Args:
      kernel: float32 (in, out).
      largest: float32 (in,), how large the values of each channel become, in any unit.

    Returns:
      float32 (in,), positive; their product is 1.
    """
    rows = np.abs(kernel).max(axis=1)
    known = (largest > 0) & (rows > 0)
    sizes = np.where(known, largest, 1), np.where(known, rows, 1)
    logs = _SHARE * np.log(sizes[0]) - (1 - _SHARE) * np.log(sizes[1])
    logs[known] -= logs[known].mean()
    return np.exp(logs).astype(np.float32)


def rounded(kernel: Matrix, gram: NDArray[np.float64]) -> Matrix:
    """The kernel on its int8 grid, so that its product with the inputs changes little.

    Args:
      kernel: float32 (in, out).
      gram: float64 (in, in), see :class:`Inputs`.

    Returns:
      float32 (in, out): in each column whole multiples of a step, of which the largest is 127
      steps, so that whoever rounds it again to int8, symmetrically, finds the same. What is zero
      stays zero, however much of other weights' errors it could make good: it was pruned.
    """
    order = np.argsort(-np.diag(gram), kind="stable")
    largest = np.abs(kernel).max(axis=0)
    step = np.maximum(largest, 1e-12).astype(np.float64) / LARGEST
    ends = np.where(np.abs(kernel) == largest, np.sign(kernel) * LARGEST, 0)[order]
    gone = kernel[order] == 0

    def settle(block: slice, values: Wide, spread: Wide) -> Settle:
        def near(place: int, row: Wide) -> Wide:
            codes = np.clip(np.round(row / step), -LARGEST, LARGEST)
            codes[gone[place]] = 0
            found: Wide = np.where(ends[place], ends[place], codes) * step
            return found

        return near

    out = np.empty_like(kernel)
    out[order] = settled(kernel[order], gram[np.ix_(order, order)], settle)
    return out


def settled(kernel: Matrix, gram: Wide, settle: Callable[[slice, Wide, Wide], Settle]) -> Wide:
    """A kernel whose rows are settled one after another, what each loses being made good by those
    that come later, as far as their inputs go together (GPTQ, and SparseGPT: Frantar & Alistarh
    2023, arXiv:2301.00774).

    Args:
      kernel: float32 (in, out).
      gram: float64 (in, in), see :class:`Inputs`.
      settle: Is given a block of rows, what they are by then, and float64 (rows, 1), the larger
        the more of a row's error can be made good; returns what gives, for a row's place and what
        it is by then, what it is to be.

    Returns:
      float64 (in, out).
    """
    upper = _upper(gram)
    rest = kernel.astype(np.float64)
    out = np.empty_like(rest)
    for start in range(0, len(rest), _BLOCK):
        block = slice(start, min(start + _BLOCK, len(rest)))
        near = settle(block, rest[block], np.diag(upper)[block, None])
        errors = np.empty_like(rest[block])
        for place in range(block.start, block.stop):
            out[place] = near(place, rest[place])
            errors[place - start] = (rest[place] - out[place]) / upper[place, place]
            later = slice(place + 1, block.stop)
            rest[later] -= np.outer(upper[place, later], errors[place - start])
        rest[block.stop :] -= upper[block, block.stop :].T @ errors
    return out


def coded(table: Matrix) -> tuple[NDArray[np.int8], NDArray[np.int16], float]:
    """A table's rows in int8, and a scale for each in int16.

    Args:
      table: float32 (n, width).

    Returns:
      int8 codes (n, width), int16 scales (n, 1) and what to multiply the scales by.
    """
    scale = np.abs(table).max(axis=1, keepdims=True) / LARGEST
    most = np.iinfo(np.int16).max
    unit = max(float(scale.max()), 1e-12) / most
    scales = np.clip(np.ceil(scale / unit), 1, most)
    codes = np.clip(np.round(table / (scales * unit)), -LARGEST, LARGEST)
    return codes.astype(np.int8), scales.astype(np.int16), unit


def _upper(gram: NDArray[np.float64]) -> NDArray[np.float64]:
    """The upper Cholesky factor of the inverse."""
    damped = gram + max(_DAMPING * float(np.diag(gram).mean()), 1e-12) * np.eye(len(gram))
    return np.linalg.cholesky(np.linalg.inv(damped)).T
