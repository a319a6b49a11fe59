"""WordPieces: the tokens of the tokenizer, in a graph."""

import json

import numpy as np
import pytest
from golden_texts import TEXTS
from tiny_bert import VOCABULARY, write_tiny_bert
from tokenizers import Tokenizer, models

from tfrec.data.tokens import TextSettings, TextTokenizer, padded
from tfrec.errors import InputError
from tfrec.models.keras_bridge import tf
from tfrec.models.wordpiece import WordPieces

PLAIN = TextSettings()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return TextTokenizer.load(folder, 16)


@pytest.fixture(scope="module")
def pieces(tokenizer):
    return WordPieces(tokenizer, PLAIN)


def tokens(pieces, texts, role=""):
    ids, mask = pieces(tf.constant(texts), role)
    assert ids.dtype == mask.dtype == tf.int32
    return [
        row[:length].tolist() for row, length in zip(ids.numpy(), mask.numpy().sum(1), strict=True)
    ]


def test_awkward_texts(pieces, tokenizer):
    found = tokens(pieces, TEXTS)
    assert found == list(tokenizer.ids(TEXTS))
    assert max(map(len, found)) == 16
    assert len({tuple(row) for row in found}) > 30


def test_characters_of_all_kinds(pieces):
    """Between letters, where it may cut the word, vanish in it or change it."""
    some = np.random.default_rng(0).integers(0x3100, 0x110000, 10_000).tolist()
    numbers = [*range(0x3100), *some, 0xFFFF, 0xFFFFF, 0x10FFFF]
    texts = [f"st{chr(number)}y" for number in numbers if not 0xD800 <= number < 0xE000]
    assert pieces.differing(texts) == []


def test_the_rows_are_padded_as_the_tokenizer_pads_them(pieces, tokenizer):
    texts = ["the film", "", "war of love"]
    ids, mask = (array.numpy() for array in pieces(tf.constant(texts)))
    expected = padded(list(tokenizer.ids(texts)))
    np.testing.assert_array_equal(ids, expected[0])
    np.testing.assert_array_equal(mask, expected[1])
    assert [part.shape[0] for part in pieces(tf.zeros([0], tf.string))] == [0, 0]


def test_bytes_that_are_no_characters_vanish(pieces):
    assert tokens(pieces, [b"the fi\xfflm"]) == tokens(pieces, ["the film"])


def test_added_tokens_are_found_where_they_stand(pieces, tokenizer):
    texts = ["the[MASK]film", "[[SEP]]", "[mask] [MAS K]", "\U000f0002the"]
    assert tokens(pieces, texts) == list(tokenizer.ids(texts))
    assert tokenizer.mask_token in tokens(pieces, texts)[0]


@pytest.mark.parametrize("keeps", [{}, {"strip_accents": False}, {"tokenize_chinese_chars": False}])
def test_case_accents_and_ideographs_as_the_model_wants_them(tmp_path, keeps):
    folder = write_tiny_bert(tmp_path / "tiny")
    words = [*VOCABULARY, "Film", "é", "##é", "日本", "日"]
    (folder / "vocab.txt").write_text("\n".join(words))
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, **keeps}))
    tokenizer = TextTokenizer.load(folder, 64)
    found = WordPieces(tokenizer, PLAIN)
    texts = [*TEXTS, "Film film", "filmé", "the日本film"]
    assert found.differing(texts) == []


def test_prompts_and_lowercasing_of_the_settings(folder, tokenizer):
    settings = TextSettings(prompts={"query": "war: ", "passage": "Love "}, lowercase=True)
    found = WordPieces(tokenizer, settings)
    texts = ["the FILM [MASK]", "Ünïcode İ", ""]
    for role in ("query", "passage"):
        expected = list(tokenizer.ids(settings.prepared(texts, role)))
        assert tokens(found, texts, role) == expected
        assert expected != list(tokenizer.ids(texts))


def test_the_end_of_a_word_in_greek_is_the_one_exception(tmp_path):
    """Python lowercases a last sigma by what stands beside it, and a table cannot."""
    folder = write_tiny_bert(tmp_path / "tiny")
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, "ος", "οσ"]))
    tokenizer = TextTokenizer.load(folder)
    assert WordPieces(tokenizer, PLAIN).differing(["ΟΣ"]) == []
    assert WordPieces(tokenizer, TextSettings(lowercase=True)).differing(["ΟΣ"]) == ["ΟΣ"]


def test_places_without_a_word(tmp_path):
    folder = write_tiny_bert(tmp_path / "tiny")
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, "", "", "newest"]))
    tokenizer = TextTokenizer.load(folder)
    assert tokens(WordPieces(tokenizer, PLAIN), ["newest 5"]) == list(tokenizer.ids(["newest 5"]))


def changed(folder, tmp_path, change):
    """The tokenizer with its JSON changed."""
    TextTokenizer.load(folder).save(tmp_path / "tokenizer.json")
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    change(told)
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    return TextTokenizer.load(tmp_path)


def test_another_model_is_refused(tmp_path):
    found = TextTokenizer(Tokenizer(models.Unigram([("<unk>", 0.0), ("the", -1.0)], 0)))
    with pytest.raises(InputError, match="model of its tokenizer is Unigram and not WordPiece"):
        WordPieces(found, PLAIN)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda told: told.update(normalizer={"type": "NFC"}), "is NFC and not BertNormalizer"),
        (lambda told: told.update(normalizer=None), "is none and not BertNormalizer"),
        (lambda told: told.update(pre_tokenizer={"type": "Whitespace"}), "is Whitespace and not"),
        (lambda told: told.update(post_processor=None), "one token before a text and one behind"),
        (lambda told: told["added_tokens"][4].update(lstrip=True), r"'\[MASK\]' in a way of its"),
        (lambda told: told["normalizer"].update(clean_text=False), "reads private characters"),
    ],
)
def test_what_would_give_other_tokens_is_refused(folder, tmp_path, change, reason):
    with pytest.raises(InputError, match=reason):
        WordPieces(changed(folder, tmp_path, change), PLAIN)
