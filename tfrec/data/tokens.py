"""Texts -> token ids, exactly as Hugging Face's fast tokenizers make them.

Tokenising needs no TensorFlow, so training, serving and `tfrec doctor` share this module. A
tokenizer is read from a folder: its ``tokenizer.json``, or one built from ``vocab.txt`` with the
settings of ``tokenizer_config.json``, or the vocabulary of a keras-nlp preset.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from tfrec.errors import ConfigError, InputError

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Widths to which token arrays are padded: few, so that a compiled step sees few shapes."""

_CHUNK = 4096  # texts tokenised at once, and
_CHARACTERS = 1 << 20  # characters, or the text that crosses this: bounds on memory


@dataclass(frozen=True)
class Coverage:
    """How well a vocabulary fits texts.

    Attributes:
      unknown: Share of the characters, spaces not counted, that are outside the vocabulary.
        Characters are counted, not tokens: a word of unknown characters is one token.
      characters_per_token: About 4 in a language that the tokenizer knows; near 1 where it knows
        only the letters; 0 where the texts hold no token.
      cut: Texts that have more than ``length`` tokens; of these only the start was looked at.
    """

    unknown: float
    characters_per_token: float
    cut: int = 0


class TextTokenizer:
    """Cuts texts into the tokens of a BERT.

    Args:
      tokenizer: A tokenizer that adds the model's own special tokens. It is changed and kept.
      length: Longest sequence of tokens, special ones included; the rest of a text is cut off.

    Attributes:
      length: As given.

    Raises:
      ConfigError: ``length`` leaves no room for a token between the special ones.
    """

    def __init__(self, tokenizer: Tokenizer, length: int = 256) -> None:
        if length < 3:
            raise ConfigError(f"a text length of {length} tokens is too short; give 3 or more")
        self.length = length
        self._tokenizer = tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(length)

    @classmethod
    def load(cls, folder: Path, length: int = 256) -> TextTokenizer:
        """Reads the tokenizer of a Hugging Face folder or of a keras-nlp preset.

        Raises:
          InputError: the folder holds no tokenizer that can be read.
          ConfigError: see above.
        """
        try:
            tokenizer = _read(Path(folder))
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"the tokenizer in {folder} cannot be read: {error}") from None
        return cls(tokenizer, length)

    @property
    def vocabulary_size(self) -> int:
        """One more than the largest token id."""
        return 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values())

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides about the tokens, as hex."""
        return hashlib.sha256(self._tokenizer.to_str().encode()).hexdigest()

    def save(self, path: Path) -> None:
        """Writes a ``tokenizer.json`` that :meth:`load` and Hugging Face read."""
        path.write_text(self._tokenizer.to_str(), "utf-8")

    def ids(self, texts: Iterable[str]) -> Iterator[list[int]]:
        """The token ids of each text, special tokens included, without padding."""
        for chunk in _chunks(texts):
            for encoding in self._tokenizer.encode_batch_fast(chunk):
                yield encoding.ids

    def tokenize(self, texts: Sequence[str]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Tokenises a whole catalog into two arrays.

        Args:
          texts: n texts.

        Returns:
          Token ids and padding mask (1 where there is a token), each int32 (n, L), where L is the
          smallest of :data:`BUCKETS` (or ``length``) that holds the longest text.
        """
        rows = list(self.ids(texts))
        return padded(rows, bucket(max(map(len, rows), default=1), self.length))

    def coverage(self, texts: Iterable[str]) -> Coverage:
        """How well the vocabulary fits the texts."""
        characters = unknown = tokens = cut = 0
        for chunk in _chunks(texts):
            for text, found in zip(chunk, self._tokenizer.encode_batch(chunk), strict=True):
                spans = _spans(found)
                # What was cut off after `length` tokens is not counted.
                end = max((end for _, _, end in spans), default=0)
                characters += sum(not c.isspace() for c in text[:end])
                unknown += sum(b - a for token, a, b in spans if token in self._unknown_ids)
                tokens += len(spans)
                cut += bool(found.overflowing)
        return Coverage(unknown / max(characters, 1), characters / max(tokens, 1), cut)

    @property
    def mask_token(self) -> int | None:
        """Id of the token that stands for a hidden one; None if the vocabulary has none."""
        found = (self._tokenizer.token_to_id(name) for name in ("[MASK]", "<mask>"))
        return next((token for token in found if token is not None), None)

    @property
    def special_tokens(self) -> tuple[int, ...]:
        """Ids of the tokens that stand for no part of a text."""
        added = self._tokenizer.get_added_tokens_decoder()
        return tuple(sorted(token for token, about in added.items() if about.special))

    @functools.cached_property
    def _unknown_ids(self) -> frozenset[int]:
        names = (self._tokenizer.token_to_id(name) for name in ("[UNK]", "<unk>"))
        return frozenset(token for token in names if token is not None)


def bucket(longest: int, limit: int) -> int:
    """The smallest width of :data:`BUCKETS` that holds ``longest`` tokens, ``limit`` at most."""
    return min(next((width for width in BUCKETS if width >= longest), limit), limit)


def padded(
    rows: Sequence[Sequence[int]], width: int = 0
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Puts rows of token ids into one array.

    Args:
      rows: Token ids.
      width: Width of the array; 0: that of the longest row.

    Returns:
      Token ids and padding mask (1 where there is a token), int32 (rows, width).
    """
    width = width or max(map(len, rows), default=1)
    ids = np.zeros((len(rows), width), np.int32)
    mask = np.zeros((len(rows), width), np.int32)
    for row, tokens in enumerate(rows):
        ids[row, : len(tokens)] = tokens
        mask[row, : len(tokens)] = 1
    return ids, mask


def _spans(encoding: Encoding) -> list[tuple[int, int, int]]:
    """Token, first and last character + 1, of all tokens but the special ones."""
    rows = zip(encoding.ids, encoding.offsets, encoding.special_tokens_mask, strict=True)
    return [(token, start, end) for token, (start, end), special in rows if not special]


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    characters = 0
    for text in texts:
        characters += len(text)
        # A lone surrogate is no character and cannot be written as UTF-8.
        chunk.append(text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8"))
        if len(chunk) == _CHUNK or characters > _CHARACTERS:
            yield chunk
            chunk, characters = [], 0
    if chunk:
        yield chunk


def _read(folder: Path) -> Tokenizer:
    preset = folder / "assets" / "tokenizer" / "vocabulary.txt"
    if preset.is_file():
        settings = _json(folder / "tokenizer.json").get("config", {})
        lowercase = settings.get("lowercase", True)
        return _wordpiece(preset, lowercase, settings.get("strip_accents", lowercase))
    if (folder / "tokenizer.json").is_file():
        text = (folder / "tokenizer.json").read_text("utf-8")
        try:
            return Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more special
            raise ValueError(error) from None
    settings = _json(folder / "tokenizer_config.json")
    return _wordpiece(
        folder / "vocab.txt",
        settings.get("do_lower_case", True),
        settings.get("strip_accents"),
        settings.get("tokenize_chinese_chars", True),
    )


def _wordpiece(
    vocabulary: Path, lowercase: bool, strip_accents: bool | None, chinese: bool = True
) -> Tokenizer:
    lines = vocabulary.read_text("utf-8").split("\n")
    words = {word.rstrip("\r"): row for row, word in enumerate(lines) if word.rstrip("\r")}
    missing = [token for token in ("[UNK]", "[CLS]", "[SEP]") if token not in words]
    if missing:
        raise ValueError(f"{vocabulary.name} lacks {', '.join(missing)}")
    made = BertWordPieceTokenizer(
        words, lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=chinese
    )
    return Tokenizer.from_str(made.to_str())


def _json(path: Path) -> dict[str, Any]:
    value = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    return value if isinstance(value, dict) else {}
