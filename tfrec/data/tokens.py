"""Texts -> token ids, exactly as Hugging Face's fast tokenizers make them.

Tokenising needs no TensorFlow, so training, serving and `tfrec doctor` share this module. A
tokenizer is read from a folder: its ``tokenizer.json``, or one built from ``vocab.txt`` with the
settings of ``tokenizer_config.json``, or the vocabulary of a keras-nlp preset.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tokenizers import Encoding, Tokenizer
from tokenizers.implementations import BertWordPieceTokenizer

from tfrec.errors import ConfigError, InputError

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
}

Role = Literal["", "query", "passage"]

DENSE = "2_Dense"
"""Folder of the linear layer after the pooling, where a model has one."""

BUCKETS = (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Widths to which token arrays are padded: few, so that a compiled step sees few shapes."""

_APART = -1e4  # added to the attention between tokens of different texts
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


@dataclass(frozen=True)
class TextSettings:
    """How a folder's model is used.

    Attributes:
      pooling: ``mean``, ``cls`` or ``max`` over the tokens.
      normalize: Whether vectors have length 1.
      lowercase: Whether texts are lowercased before the tokenizer sees them.
      prompts: Role -> what is put before a text in that role.
      activation: Activation of the feed-forward layers, in Hugging Face's words; empty: as loaded.
    """

    pooling: str = "mean"
    normalize: bool = True
    lowercase: bool = False
    prompts: Mapping[str, str] = field(default_factory=dict)
    activation: str = "gelu"

    @classmethod
    def read(cls, folder: Path) -> TextSettings:
        """Reads the files of sentence-transformers; without them: mean pooling, length 1.

        Raises:
          InputError: the folder wants something that is not built here.
        """
        modules = read_json(folder / "modules.json").get("items", [])
        kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
        unknown = set(kinds) - {"Transformer", "Pooling", "Dense", "Normalize"}
        if unknown:
            raise InputError(
                f"{folder} has a module {', '.join(sorted(unknown))} after the BERT; "
                "only Pooling, Dense and Normalize are supported"
            )
        if "Dense" in kinds and kinds[2:] not in (["Dense"], ["Dense", "Normalize"]):
            raise InputError(
                f"{folder} has the modules {', '.join(kinds)}; only one Dense is supported, "
                "after Pooling and before Normalize"
            )
        said = read_json(folder / "config_sentence_transformers.json")
        return cls(
            pooling=_pooling(folder),
            normalize="Normalize" in kinds or not kinds,
            lowercase=bool(read_json(folder / "sentence_bert_config.json").get("do_lower_case")),
            prompts={role: text for role, text in (said.get("prompts") or {}).items() if text},
            activation=str(read_json(folder / "config.json").get("hidden_act", "")),
        )

    def write(self, folder: Path, width: int, length: int, dense: bool = False) -> None:
        """Writes the files that :meth:`read` and sentence-transformers read.

        Args:
          folder: An existing folder.
          width: Length of a pooled vector.
          length: Tokens of a text that are read.
          dense: Whether a Dense module follows the pooling; whoever writes it does so into
            :data:`DENSE`.
        """
        kinds = ["Transformer", "Pooling"]
        kinds += ["Dense"] * dense + ["Normalize"] * self.normalize
        paths = {kind: f"{number}_{kind}" for number, kind in enumerate(kinds)}
        paths["Transformer"] = ""
        files: dict[str, Any] = {
            "modules.json": [
                {
                    "idx": number,
                    "name": str(number),
                    "path": paths[kind],
                    "type": f"sentence_transformers.models.{kind}",
                }
                for number, kind in enumerate(kinds)
            ],
            "1_Pooling/config.json": {
                "word_embedding_dimension": width,
                **{name: mode == self.pooling for name, mode in _MODES.items()},
            },
            "sentence_bert_config.json": {
                "max_seq_length": length,
                "do_lower_case": self.lowercase,
            },
            "config_sentence_transformers.json": {"prompts": dict(self.prompts)},
            "tokenizer_config.json": {
                "tokenizer_class": "PreTrainedTokenizerFast",
                "model_max_length": length,
            },
        }
        for name, content in files.items():
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content, indent=1), "utf-8")

    def prompt(self, role: Role) -> str:
        """What is put before a text in this role."""
        other = self.prompts.get("document", "") if role == "passage" else ""
        return self.prompts.get(role, other)

    def prepared(self, texts: Iterable[str], role: Role) -> list[str]:
        """The texts as the tokenizer gets them."""
        prompt = self.prompt(role)
        texts = [prompt + text for text in texts] if prompt else list(texts)
        return [text.lower() for text in texts] if self.lowercase else texts


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is no such file.

    Raises:
      InputError: the file is not JSON.
    """
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError:
        raise InputError(f"{path} is damaged: it is not valid JSON") from None
    return value if isinstance(value, dict) else {"items": value}


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

    @property
    def is_wordpiece(self) -> bool:
        """Whether words are cut into the longest pieces that a vocabulary has."""
        return bool(self.described["model"].get("type") == "WordPiece")

    @functools.cached_property
    def least(self) -> frozenset[int]:
        """Ids that :meth:`trimmed` never drops: special tokens and single characters, from which
        every word can still be put together.

        Raises:
          ConfigError: it is no WordPiece tokenizer.
        """
        model = self.described["model"]
        if model.get("type") != "WordPiece":
            raise ConfigError(
                f"only a WordPiece vocabulary can be trimmed, and this is {model.get('type')}"
            )
        prefix = model["continuing_subword_prefix"]
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        single = {i for token, i in vocabulary.items() if len(token.removeprefix(prefix)) == 1}
        return frozenset(single | set(self._tokenizer.get_added_tokens_decoder()))

    def trimmed(self, kept: Iterable[int]) -> TextTokenizer:
        """The same with fewer tokens: what is gone is cut into smaller pieces.

        Args:
          kept: Ids that stay, beside :attr:`least`.

        Returns:
          One in which those that stay are numbered anew, in their order.

        Raises:
          ConfigError: it is no WordPiece tokenizer.
        """
        number = {old: new for new, old in enumerate(sorted({*kept} | self.least))}
        told = self.described
        model = told["model"]
        model["vocab"] = {t: number[i] for t, i in model["vocab"].items() if i in number}
        for token in told["added_tokens"]:
            token["id"] = number[token["id"]]
        ends = told.get("post_processor") or {}
        for token in (ends.get("special_tokens") or {}).values():
            token["ids"] = [number[i] for i in token["ids"]]
        for name in ("sep", "cls"):
            if name in ends:
                ends[name] = [ends[name][0], number[ends[name][1]]]
        return TextTokenizer(Tokenizer.from_str(json.dumps(told)), self.length)

    def as_in(self, other: TextTokenizer) -> list[list[int]]:
        """For each token here the ids that it is in a trimmed vocabulary."""
        there = other._tokenizer.get_vocab(with_added_tokens=True)
        prefix = self.described["model"]["continuing_subword_prefix"]
        unknown = next(iter(other._unknown_ids))
        found: list[list[int]] = [[unknown]] * self.vocabulary_size
        for token, place in self._tokenizer.get_vocab(with_added_tokens=True).items():
            found[place] = _pieces(token, there, prefix) or [unknown]
        return found

    def save(self, path: Path) -> None:
        """Writes a ``tokenizer.json`` that :meth:`load` and Hugging Face read."""
        path.write_text(self._tokenizer.to_str(), "utf-8")

    @property
    def described(self) -> dict[str, Any]:
        """What Hugging Face's ``tokenizer.json`` says of it."""
        found: dict[str, Any] = json.loads(self._tokenizer.to_str())
        return found

    def words(self, text: str) -> list[str]:
        """What a text is normalised to and cut into before words are cut into tokens."""
        normalizer, cut = self._tokenizer.normalizer, self._tokenizer.pre_tokenizer
        text = normalizer.normalize_str(text) if normalizer is not None else text
        return [word for word, _ in cut.pre_tokenize_str(text)] if cut is not None else [text]

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


def packed(
    rows: Sequence[Sequence[int]], tokens: int
) -> Iterator[tuple[list[int], dict[str, NDArray[Any]]]]:
    """Puts texts one behind another, the longest first, as many together as fit.

    Args:
      rows: Token ids of each text.
      tokens: How many of them fit; a longer text comes alone.

    Yields:
      The places of the texts in ``rows``, and of their t tokens: int32 ``token_ids`` and
      ``positions`` (t,), the place of each in its text, and float32 ``mask`` (t, t) to add to the
      attention, 0 within a text.
    """
    lengths = np.array([len(row) for row in rows], np.int64)
    batch: list[int] = []
    held = 0
    for place in np.argsort(-lengths, kind="stable").tolist():
        if batch and held + lengths[place] > tokens:
            yield batch, _one_row([rows[i] for i in batch])
            batch, held = [], 0
        batch.append(place)
        held += int(lengths[place])
    if batch:
        yield batch, _one_row([rows[i] for i in batch])


def _one_row(rows: Sequence[Sequence[int]]) -> dict[str, NDArray[Any]]:
    text = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    apart = text[:, None] != text[None, :]
    return {
        "token_ids": np.concatenate([np.array(row, np.int32) for row in rows]),
        "positions": np.concatenate([np.arange(len(row), dtype=np.int32) for row in rows]),
        "mask": np.where(apart, np.float32(_APART), np.float32(0)),
    }


def _pieces(token: str, vocabulary: Mapping[str, int], prefix: str) -> list[int]:
    """Ids of the longest pieces of a token from its start on; empty if there are none."""
    if token in vocabulary:
        return [vocabulary[token]]
    before, rest = (prefix, token.removeprefix(prefix)) if token.startswith(prefix) else ("", token)
    found = []
    while rest:
        ends = range(len(rest), 0, -1)
        end = next((end for end in ends if before + rest[:end] in vocabulary), 0)
        if not end:
            return []
        found.append(vocabulary[before + rest[:end]])
        before, rest = prefix, rest[end:]
    return found


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
        settings = read_json(folder / "tokenizer.json").get("config", {})
        lowercase = settings.get("lowercase", True)
        return _wordpiece(preset, lowercase, settings.get("strip_accents", lowercase))
    if (folder / "tokenizer.json").is_file():
        text = (folder / "tokenizer.json").read_text("utf-8")
        try:
            return Tokenizer.from_str(text)
        except Exception as error:  # noqa: BLE001 - tokenizers raises nothing more special
            raise ValueError(error) from None
    settings = read_json(folder / "tokenizer_config.json")
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


def _pooling(folder: Path) -> str:
    said = read_json(folder / "1_Pooling" / "config.json")
    modes = said.get("pooling_mode") or [
        name for name, on in said.items() if name.startswith("pooling_mode_") and on
    ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    found = [_MODES.get(mode, mode) for mode in modes] or ["mean"]
    if len(found) > 1 or found[0] not in _MODES.values():
        raise InputError(
            f"{folder} pools by {' and '.join(found)}; only one of mean, cls and max is supported"
        )
    return str(found[0])
