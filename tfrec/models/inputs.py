"""What the models of a dataset read: its texts as vectors or tokens, its events in batches."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from tfrec.config import AdaptConfig
from tfrec.data.catalog import Table
from tfrec.data.dataset import Dataset
from tfrec.data.sequences import PackedSequences
from tfrec.models.text import TextEncoder

# Small data gets smaller batches, so that an epoch has at least so many updates.
LEAST_STEPS = 8


def text_encoder(
    config: AdaptConfig, dataset: Dataset, folder: str = "", trained: bool = False
) -> TextEncoder | None:
    """The BERT, or None where there is no text to read.

    Args:
      config: Names it.
      dataset: What it reads.
      folder: Where it is, if it was pretrained further.
      trained: Whether it is to be trained; then it computes in the precision of the training.
    """
    if config.text == "none" or not any((*dataset.catalog.texts, *dataset.users.texts)):
        return None
    return TextEncoder.load(
        folder or config.text,
        length=config.text_length,
        trainable=trained,
        dtype=None if trained else "float32",
    )


def encoded(
    encoder: TextEncoder | None, table: Table, role: Literal["passage", "query"]
) -> NDArray[np.float32]:
    """float32 (rows, text width); zero for rows without a text, width 0 if no row has one."""
    if encoder is None or not any(table.texts):
        return np.zeros((len(table), 0), np.float32)
    return vectors_of(lambda texts: encoder.encode_cached(texts, role=role, progress=True), table)


def vectors_of(encode: Any, table: Table) -> NDArray[np.float32]:
    """float32 (rows, text width), by ``encode`` of the texts that there are."""
    rows = [row for row, text in enumerate(table.texts) if text]
    found = encode([table.texts[row] for row in rows])
    out = np.zeros((len(table), found.shape[1]), np.float32)
    out[rows] = found
    return out


def tokens_of(
    encoder: TextEncoder | None, dataset: Dataset
) -> tuple[NDArray[np.int32], NDArray[np.int32]] | None:
    """Token ids and padding mask of the catalog's texts, each int32 (n + 1, tokens)."""
    return encoder.tokenize(dataset.catalog.texts, role="passage") if encoder else None


def fitting_batch_size(wanted: int, rows: PackedSequences, unit: int) -> int:
    """Rows of a batch: fewer than ``wanted`` where the data does not fill LEAST_STEPS of them.

    A multiple of ``unit``, the pieces that a batch is cut into.
    """
    room = len(rows.epoch(0)["item"]) // LEAST_STEPS
    return min(wanted, max(room // unit, 1) * unit)
