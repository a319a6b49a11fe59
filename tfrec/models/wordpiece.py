"""Wordpiece: a BERT's tokenizer in a graph, by TensorFlow Text, with the tokens of Hugging Face's.

TensorFlow Text's own BERT tokenizers normalise otherwise (NFKD and case folding, by which "½" and
"ß" come apart, and control characters cut words), so that they differ from the tokenizer the BERT
was trained with on thousands of characters. Here a table says what each character becomes, as that
tokenizer itself says when it is asked, and TensorFlow Text only cuts words into pieces.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.data.tokens import Role, TextSettings, TextTokenizer
from tfrec.errors import InputError
from tfrec.models.keras_bridge import tf, tf_text

_CHARACTERS, _PAGE = 0x110000, 256
_BLOCK = 2048  # characters asked about at a time
_SURROGATES = 0xD800  # the block of halves of characters
_ALIKE = (*range(4, 14), 15, 16)  # planes of 65,536 without a character, or all of them private
_STAYS, _APART = 0, 1  # codes of characters that stay: in their word, or as a word of their own
_BETWEEN = " bb "  # a word between them that no character becomes
_MARKS = 0xF0000  # the first of the private characters that stand for added tokens
_PLAIN = ("single_word", "lstrip", "rstrip", "normalized")


class WordPieces:
    """Strings -> token ids, in TensorFlow.

    Args:
      tokenizer: A WordPiece tokenizer with the normaliser and the words of BERT.
      settings: Prompts, and whether texts are lowercased before.

    Raises:
      InputError: it is another tokenizer, and its tokens would not be these; says why.
    """

    def __init__(self, tokenizer: TextTokenizer, settings: TextSettings) -> None:
        told = tokenizer.described
        ends = next(tokenizer.ids([""]))
        _check(told, ends, settings.lowercase)
        self._tokenizer, self._settings, self._ends = tokenizer, settings, ends
        model, added = told["model"], told["added_tokens"]
        self._unknown = model["unk_token"]
        self._longest = int(model["max_input_chars_per_word"])
        # A place without a word holds what no text gives: no word has a space.
        pieces = [f" {place}" for place in range(tokenizer.vocabulary_size)]
        for word, place in [*model["vocab"].items(), *((a["content"], a["id"]) for a in added)]:
            pieces[place] = word
        self._pieces = tf_text.FastWordpieceTokenizer(
            pieces,
            suffix_indicator=model["continuing_subword_prefix"],
            max_bytes_per_word=4 * self._longest,
            token_out_type=tf.int32,
            unknown_token=self._unknown,
            no_pretokenization=True,
        )
        # The longest name first: it is taken where several fit.
        names = sorted((token["content"] for token in added), key=len, reverse=True)
        names = [] if settings.lowercase else names  # a name in capitals is never met then
        self._marks = {chr(_MARKS + number): name for number, name in enumerate(names)}
        codes, becomes = self._marked()
        pages, page = np.unique(codes.reshape(-1, _PAGE), axis=0, return_inverse=True)
        self._pages = tf.constant(pages.reshape(-1))
        self._page = tf.constant(page.reshape(-1), tf.int32)
        self._becomes = tf.constant(becomes)

    def __call__(self, texts: Any, role: Role = "") -> tuple[Any, Any]:
        """Token ids and padding mask of texts.

        Args:
          texts: string (n,), UTF-8.
          role: See :meth:`tfrec.models.text.TextEncoder.encode`.

        Returns:
          int32 (n, t) each, t being the length of the longest.
        """
        texts = tf.strings.join([self._settings.prompt(role), texts])
        if self._marks:
            texts = tf.strings.regex_replace(texts, f"[{''.join(self._marks)}]", "")
        for mark, name in self._marks.items():
            texts = tf.strings.regex_replace(texts, re.escape(name), mark)
        words = self._words(texts)
        too_long = tf.strings.length(words.flat_values, "UTF8_CHAR") > self._longest
        words = words.with_flat_values(tf.where(too_long, self._unknown, words.flat_values))
        first, last = self._ends
        ids = self._pieces.tokenize(words).merge_dims(1, 2)
        ids = ids[:, : self._tokenizer.length - len(self._ends)]
        end = tf.ones([ids.nrows(), 1], tf.int32)
        ids = tf.concat([end * first, ids, end * last], axis=1)
        return ids.to_tensor(), tf.sequence_mask(ids.row_lengths(), dtype=tf.int32)

    def differing(self, texts: Sequence[str], role: Role = "") -> list[str]:
        """Those of the texts whose tokens are not those of the tokenizer."""
        if not texts:
            return []
        expected = self._tokenizer.ids(self._settings.prepared(texts, role))
        ids, mask = (array.numpy() for array in self(tf.constant(list(texts)), role))
        found = (row[:length].tolist() for row, length in zip(ids, mask.sum(axis=1), strict=True))
        told = zip(texts, found, expected, strict=True)
        return [text for text, mine, its in told if mine != its]

    def _words(self, texts: Any) -> Any:
        """string (n, words), ragged: normalised and cut at spaces and punctuation."""
        numbers = tf.strings.unicode_decode(texts, "UTF-8")
        itself = tf.strings.unicode_split(texts, "UTF-8").flat_values
        flat = numbers.flat_values
        code = tf.gather(self._pages, tf.gather(self._page, flat // _PAGE) * _PAGE + flat % _PAGE)
        apart = tf.strings.join([" ", itself, " "])
        stays = tf.where(code == _APART, apart, itself)
        becomes = tf.where(code > _APART, tf.gather(self._becomes, code), stays)
        return tf.strings.split(tf.strings.reduce_join(numbers.with_flat_values(becomes), axis=1))

    def _marked(self) -> tuple[NDArray[np.int32], list[str]]:
        """The table of characters, in which marks become the added tokens that they stand for."""
        found, told = _characters(self._tokenizer, self._settings.lowercase)
        codes, becomes = found.copy(), list(told)
        for mark, name in self._marks.items():
            if codes[ord(mark)] <= _APART or becomes[codes[ord(mark)]]:
                raise InputError("its tokenizer reads private characters")
            codes[ord(mark)] = len(becomes)
            becomes.append(f" {name} ")
        return codes, becomes


@lru_cache(maxsize=1)
def _characters(tokenizer: TextTokenizer, lowercase: bool) -> tuple[NDArray[np.int32], list[str]]:
    """int32 (all characters,) the code of each, and what those with a code above 1 become."""
    codes = np.zeros(_CHARACTERS, np.int32)
    place: dict[str, int] = {}
    settings = TextSettings(lowercase=lowercase)
    for start in range(0, _CHARACTERS, _BLOCK):
        if start == _SURROGATES:
            continue
        # The last block of a plane has two places that never become characters.
        alike = start >> 16 in _ALIKE and (start + _BLOCK) % 0x10000 != 0
        block = range(start, start + (1 if alike else _BLOCK))
        asked = settings.prepared((f"a{chr(number)}a" for number in block), "")
        words = " ".join(tokenizer.words(_BETWEEN.join(asked)))
        for number, found in zip(block, words.split(_BETWEEN), strict=True):
            inner, itself = found[1:-1], chr(number)
            if inner != itself:
                apart = inner == f" {itself} "
                codes[number] = _APART if apart else place.setdefault(inner, 2 + len(place))
        if alike:
            codes[start : start + _BLOCK] = codes[start]
    return codes, ["", "", *place]


def _check(told: Mapping[str, Any], ends: Sequence[int], lowercase: bool) -> None:
    parts = {
        "model": "WordPiece",
        "normalizer": "BertNormalizer",
        "pre_tokenizer": "BertPreTokenizer",
    }
    for part, wanted in parts.items():
        kind = (told.get(part) or {}).get("type", "none")
        if kind != wanted:
            raise InputError(f"the {part} of its tokenizer is {kind} and not {wanted}")
    if len(ends) != 2 or told["truncation"]["direction"] != "Right":
        raise InputError("its tokenizer does not put one token before a text and one behind it")
    for token in told["added_tokens"]:
        name = token["content"]
        if any(token[flag] for flag in _PLAIN) or (lowercase and name == name.lower()):
            raise InputError(f"its tokenizer looks for '{name}' in a way of its own")
