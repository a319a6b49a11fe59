"""The one recommendation chain: encode, retrieve, filter, rank, over the Engine protocol.

A trained run and a deployed bundle recommend through this same code; only the Engine differs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class TopK:
    """Results, best first: the one shape in which they travel.

    Attributes:
      scores: float32 (batch, k), higher is better; -inf where there are fewer than k results.
      ids: int32 (batch, k), catalog rows; 0 where there are fewer than k results.
    """

    scores: NDArray[np.float32]
    ids: NDArray[np.int32]
