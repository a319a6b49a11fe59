"""TextEncoder: strings -> vectors, by a pretrained BERT that can be trained further.

The vectors equal those of sentence-transformers on the same folder (docs/text.md has the traps
that this takes). Tokenising happens on the host, in :mod:`tfrec.data.tokens`.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from tfrec.data.sources import cache_folder
from tfrec.data.tokens import DENSE, Role, TextSettings, TextTokenizer, padded
from tfrec.errors import ConfigError, InputError
from tfrec.models import weights
from tfrec.models.bert import load_backbone, save_backbone
from tfrec.models.keras_bridge import Hosted, tf, tf_keras
from tfrec.models.projection import Projection
from tfrec.models.text_cache import TextCache

_WINDOW = 8192  # texts tokenised together: a bound on memory
_KEPT = 2048  # texts that the cache takes in at once: what an interrupt costs at most


class TextEncoder(Hosted):
    """Strings -> float32 vectors, and a tf_keras layer over their tokens.

    Made by :meth:`load`. ``encoder.trainable = False`` freezes it; a frozen encoder never drops
    anything out. As a layer it maps ``(token_ids, padding_mask)``, each int32 (batch, tokens), to
    float32 (batch, width).

    Args:
      backbone: A keras-nlp ``BertBackbone``.
      tokenizer: Its tokenizer.
      settings: How tokens become one vector.
      projection: A linear layer after the pooling, or None.

    Attributes:
      tokenizer: As given; ``tokenizer.length`` tokens of a text are read.
      settings: As given.
      projection: The linear layer, a tf_keras Dense, or None.
      width: Length of a vector.

    Raises:
      ConfigError: more tokens are to be read than the BERT has positions.
      InputError: tokenizer, BERT and projection do not belong together.
    """

    def __init__(
        self,
        backbone: Any,
        tokenizer: TextTokenizer,
        settings: TextSettings,
        projection: Projection | None = None,
        **kwargs: Any,
    ) -> None:
        kwargs.setdefault("name", "text_encoder")
        super().__init__(backbone, dtype="float32", **kwargs)
        if tokenizer.length > backbone.max_sequence_length:
            raise ConfigError(
                f"a text length of {tokenizer.length} tokens is more than the "
                f"{backbone.max_sequence_length} positions of this BERT"
            )
        if tokenizer.vocabulary_size > backbone.vocabulary_size:
            raise InputError(
                f"the tokenizer knows {tokenizer.vocabulary_size} tokens and the BERT only "
                f"{backbone.vocabulary_size}: they do not belong together"
            )
        self.tokenizer = tokenizer
        self.settings = settings
        self.width = int(backbone.hidden_dim)
        self.projection: Any = None
        if projection is not None:
            self.projection = self._projection(projection)
            self.width = projection.kernel.shape[1]
        self.retrace()

    def _projection(self, given: Projection) -> Any:
        if len(given.kernel) != self.width:
            raise InputError(
                f"the Dense module reads vectors of {len(given.kernel)} numbers and the BERT gives "
                f"{self.width}: they do not belong together"
            )
        if self.settings.pooling == "max":
            raise InputError("a Dense module is supported after mean and cls pooling, not max")
        dense = tf_keras.layers.Dense(given.kernel.shape[1], dtype="float32", name="projection")
        dense.build((None, self.width))
        dense.set_weights(given)
        return dense

    def retrace(self) -> None:
        """Makes :meth:`encode` see that layers were added to the BERT or taken out."""
        signature = [tf.TensorSpec([None, None], tf.int32)] * 2
        compiled = tf.function(self._vectors, input_signature=signature)
        # Wrapped, so that it does not become part of checkpoints and saved models.
        self._compiled = functools.partial(compiled)

    @classmethod
    def load(
        cls,
        name: str | os.PathLike[str] = "all-MiniLM-L6-v2",
        *,
        length: int = 256,
        trainable: bool = True,
        dtype: str | None = "float32",
    ) -> TextEncoder:
        """Loads pretrained weights.

        Args:
          name: A name that :func:`tfrec.models.weights.find` knows, or a folder.
          length: Tokens of a text that are read, special ones included.
          trainable: Whether training changes the BERT.
          dtype: What the BERT computes in; None: the global policy.

        Raises:
          ConfigError: ``length`` does not fit the BERT.
          InputError: there is no such BERT, or it is not usable.
          SetupError: the weights cannot be obtained.
        """
        found = weights.find(name)
        settings = TextSettings.read(found)
        projection = Projection.load(found)
        backbone = load_backbone(found, dtype)
        tokenizer = TextTokenizer.load(found, length)
        return cls(backbone, tokenizer, settings, projection, trainable=trainable)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes a Hugging Face folder that :meth:`load` and sentence-transformers read.

        Args:
          folder: A folder that does not exist, or whose files of these names are replaced.
        """
        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        save_backbone(self.model, out, self.settings.activation or "gelu_new")
        self.tokenizer.save(out / "tokenizer.json")
        dense = self.projection is not None
        if dense:
            Projection(*self.projection.get_weights()).save(out / DENSE)
        width = int(self.model.hidden_dim)
        self.settings.write(out, width, self.tokenizer.length, dense)

    def call(self, token_ids: Any, padding_mask: Any, training: bool | None = None) -> Any:
        """Vectors of tokenised texts.

        Args:
          token_ids: int32 (batch, tokens).
          padding_mask: int32 (batch, tokens), 1 where there is a token.
          training: Whether dropout is active.

        Returns:
          float32 (batch, width).
        """
        return self._vectors(token_ids, padding_mask, training if self.trainable else False)

    def tokenize(
        self, texts: Sequence[str], role: Role = ""
    ) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokenises a whole catalog, for :meth:`call`.

        Args:
          texts: n texts.
          role: See :meth:`encode`.

        Returns:
          Token ids and padding mask, int32 (n, L), padded to the bucket of the longest text.
        """
        return self.tokenizer.tokenize(self.settings.prepared(texts, role))

    def encode(
        self,
        texts: Sequence[str],
        *,
        role: Role = "",
        tokens_per_batch: int = 1024,
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """Vectors of any number of texts; equal texts are encoded once.

        Args:
          texts: n texts.
          role: ``passage`` for what is looked for and ``query`` for what looks, which matters to
            models with prompts, such as multilingual-e5-small; empty: no prompt.
          tokens_per_batch: Tokens, padding included, in a batch: a bound on memory.
          progress: Whether to show a progress bar.

        Returns:
          float32 (n, width), in the order of ``texts``. Beside them and the texts, memory does not
          grow with n.
        """
        place: dict[str, int] = {}
        index = np.fromiter((place.setdefault(t, len(place)) for t in texts), np.int64, len(texts))
        distinct = self.settings.prepared(place, role)
        order = _long_first(distinct)
        out = np.empty((len(distinct), self.width), np.float32)
        with _bar(len(distinct), progress) as bar:
            for start in range(0, len(distinct), _WINDOW):
                window = order[start : start + _WINDOW]
                rows = list(self.tokenizer.ids(distinct[place] for place in window))
                for batch in _batches(rows, tokens_per_batch):
                    ids, mask = padded([rows[row] for row in batch])
                    out[window[batch]] = self._compiled(ids, mask).numpy()
                    bar.update(len(batch))
        return out[index]

    def encode_cached(
        self,
        texts: Sequence[str],
        folder: str | os.PathLike[str] | None = None,
        *,
        role: Role = "",
        progress: bool = False,
    ) -> NDArray[np.float32]:
        """:meth:`encode` that keeps vectors in a folder and encodes only texts new to it.

        The vectors are kept as they come, so that after an interrupt the same call continues.

        Args:
          texts: n texts.
          folder: The cache; several encoders and processes may share it. None: ``texts`` in
            tfrec's cache folder.
          role: As for :meth:`encode`.
          progress: Whether to show a progress bar.

        Returns:
          float32 (n, width).

        Raises:
          SetupError: the folder cannot be written.
        """
        prompted = [self.settings.prompt(role) + text for text in texts]
        cache = TextCache(folder or cache_folder() / "texts", self._maker(), self.width)
        vectors, found = cache.get(prompted)
        rows_of: dict[str, list[int]] = {}
        for row in np.flatnonzero(~found).tolist():
            rows_of.setdefault(prompted[row], []).append(row)
        missing = list(rows_of)
        order = _long_first(missing)
        with _bar(len(missing), progress and bool(missing)) as bar:
            for start in range(0, len(missing), _KEPT):
                block = [missing[place] for place in order[start : start + _KEPT]]
                new = self.encode(block)
                cache.add(block, new)
                for text, vector in zip(block, new, strict=True):
                    vectors[rows_of[text]] = vector
                bar.update(len(block))
        return vectors

    def digest(self) -> str:
        """SHA-256 of all that decides about the vectors: weights, tokenizer, settings; as hex."""
        hashed = hashlib.sha256(f"{self.tokenizer.digest}{self.settings}".encode())
        for variable in self.model.variables:
            # The states of random generators change and decide about nothing here.
            if "seed_generator" not in variable.path:
                hashed.update(np.ascontiguousarray(variable.value.numpy()).data)
        for array in self.projection.get_weights() if self.projection is not None else ():
            hashed.update(np.ascontiguousarray(array).data)
        return hashed.hexdigest()

    def _maker(self) -> str:
        """The digest of what made a vector to the last bit: with the precision."""
        computes = str(self.model.compute_dtype)
        if computes == "float32":
            return self.digest()
        return hashlib.sha256(f"{self.digest()} {computes}".encode()).hexdigest()

    def hidden(self, token_ids: Any, padding_mask: Any, training: bool | None = False) -> Any:
        """Every token encoded, before pooling: float32 (batch, tokens, width of the BERT)."""
        token_ids = tf.convert_to_tensor(token_ids)
        segments = tf.zeros_like(token_ids)
        features = {"token_ids": token_ids, "segment_ids": segments, "padding_mask": padding_mask}
        return tf.cast(self.model(features, training=training)["sequence_output"], tf.float32)

    def pooled(self, hidden: Any, padding_mask: Any) -> Any:
        """float32 (batch, width), the vectors of texts of which :meth:`hidden` gave the tokens."""
        vectors = self.projected(pool(hidden, padding_mask, self.settings.pooling))
        return tf.math.l2_normalize(vectors, -1, 1e-24) if self.settings.normalize else vectors

    def projected(self, vectors: Any) -> Any:
        """float32 (…, width) of (…, width of the BERT)."""
        return vectors if self.projection is None else self.projection(vectors)

    def _vectors(self, token_ids: Any, padding_mask: Any, training: bool | None = False) -> Any:
        padding_mask = tf.convert_to_tensor(padding_mask)
        return self.pooled(self.hidden(token_ids, padding_mask, training), padding_mask)


def pool(hidden: Any, padding_mask: Any, mode: str) -> Any:
    """float32 (batch, width) of (batch, tokens, width), by :attr:`TextSettings.pooling`."""
    mask = tf.cast(padding_mask, hidden.dtype)[:, :, None]
    if mode == "cls":
        return hidden[:, 0]
    if mode == "max":
        return tf.reduce_max(tf.where(mask > 0, hidden, hidden.dtype.min), 1)
    return tf.reduce_sum(hidden * mask, 1) / tf.maximum(tf.reduce_sum(mask, 1), 1e-9)


def _bar(total: int, progress: bool) -> Any:
    return tqdm(total=total, desc="encoding texts", disable=not progress)


def _long_first(texts: Sequence[str]) -> NDArray[np.int64]:
    """Places of the texts by number of characters, which goes with that of tokens."""
    lengths = np.fromiter(map(len, texts), np.int64, len(texts))
    return np.argsort(-lengths, kind="stable")


def _batches(rows: Sequence[Sequence[int]], tokens_per_batch: int) -> Iterator[NDArray[np.int64]]:
    """Places of the rows by length, so that next to nothing of a batch is padding."""
    lengths = np.array([len(row) for row in rows])
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        size = max(tokens_per_batch // int(lengths[order[start]]), 1)
        yield order[start : start + size]
        start += size
