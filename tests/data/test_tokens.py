"""Texts -> token ids: exactly those of the Hugging Face tokenizer in a folder."""

import json
from pathlib import Path

import numpy as np
import pytest
from tiny_bert import VOCABULARY, write_tiny_bert

from tfrec.data import tokens
from tfrec.data.tokens import BUCKETS, TextTokenizer, bucket, padded
from tfrec.errors import ConfigError, InputError

ID = {token: row for row, token in enumerate(VOCABULARY)}


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_tiny_bert(tmp_path / "tiny")


@pytest.fixture
def tokenizer(folder) -> TextTokenizer:
    return TextTokenizer.load(folder, 16)


def ids(*tokens: str) -> list[int]:
    return [ID["[CLS]"], *(ID[token] for token in tokens), ID["[SEP]"]]


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", ()),
        (" \t\n", ()),
        ("The FILM", ("the", "film")),
        ("Thé fïlm", ("the", "film")),
        ("the\u200b film\x00", ("the", "film")),
        ("(1999).", ("(", "1999", ")", ".")),
        ("warship", ("war", "##s", "##h", "##i", "##p")),
        ("日本", ("[UNK]", "[UNK]")),
        ("the [MASK] film", ("the", "[MASK]", "film")),
        ("a" * 101, ("[UNK]",)),
    ],
)
def test_word_pieces_are_those_of_the_paper(tokenizer, text, tokens):
    assert list(tokenizer.ids([text])) == [ids(*tokens)]


def test_what_is_too_long_is_cut_before_the_closing_token(folder):
    assert list(TextTokenizer.load(folder, 4).ids(["the film war love"])) == [ids("the", "film")]


def test_case_and_accents_are_kept_where_the_model_wants_them(folder):
    settings = {"do_lower_case": False, "strip_accents": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert list(TextTokenizer.load(folder).ids(["The film"])) == [ids("[UNK]", "film")]
    assert list(TextTokenizer.load(folder).ids(["thé film"])) == [ids("[UNK]", "film")]


def test_a_saved_tokenizer_is_read_back_and_gives_the_same(tokenizer, tmp_path):
    (tmp_path / "saved").mkdir()
    tokenizer.save(tmp_path / "saved" / "tokenizer.json")
    again = TextTokenizer.load(tmp_path / "saved", 16)
    texts = ["The warship (1999).", "", "日本 [SEP]"]
    assert list(again.ids(texts)) == list(tokenizer.ids(texts))
    assert again.digest == tokenizer.digest


def test_padding_and_truncation_of_a_tokenizer_file_are_overruled(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer.json")
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["padding"] = {
        "strategy": {"Fixed": 9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "[PAD]",
    }
    content["truncation"]["max_length"] = 3
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    assert list(TextTokenizer.load(tmp_path).ids(["the film"])) == [ids("the", "film")]


class TestTrimmed:
    @pytest.fixture
    def trimmed(self, tokenizer):
        return tokenizer.trimmed([ID["film"], ID["1999"]])

    def words(self, tokenizer, text):
        """The tokens of a text, as words."""
        places = {place: word for word, place in tokenizer.described["model"]["vocab"].items()}
        return [places[token] for token in next(tokenizer.ids([text]))]

    def test_what_is_gone_is_cut_into_letters(self, trimmed):
        found = self.words(trimmed, "the film (1999) 日")
        inner = ["t", "##h", "##e", "film", "(", "1999", ")", "[UNK]"]
        assert found == ["[CLS]", *inner, "[SEP]"]

    def test_those_that_stay_are_numbered_anew_without_gaps(self, tokenizer, trimmed):
        numbers = trimmed.described["model"]["vocab"]
        assert sorted(numbers.values()) == list(range(trimmed.vocabulary_size))
        assert trimmed.vocabulary_size == len(tokenizer.least) + 2
        assert sorted(numbers, key=numbers.get) == [w for w in VOCABULARY if w in numbers]
        assert trimmed.mask_token == numbers["[MASK]"]
        assert set(trimmed.special_tokens) == {numbers[w] for w in numbers if w[0] == "["}

    def test_it_cuts_texts_at_the_same_length_and_is_read_back(self, trimmed, tmp_path):
        assert len(next(trimmed.ids(["the " * 20]))) == 16
        trimmed.save(tmp_path / "tokenizer.json")
        read = TextTokenizer.load(tmp_path, 16)
        assert list(read.ids(["The film, 1999"])) == list(trimmed.ids(["The film, 1999"]))

    def test_where_everything_stays_nothing_changes(self, tokenizer):
        found = tokenizer.trimmed(range(tokenizer.vocabulary_size))
        assert list(found.ids(["the warship"])) == list(tokenizer.ids(["the warship"]))

    def test_each_token_is_what_it_is_cut_into(self, tokenizer, trimmed):
        found = tokenizer.as_in(trimmed)
        for text in ("film", "the", "1999", "love", "(", "s"):
            own = next(trimmed.ids([text]))[1:-1]
            assert found[ID[text]] == own, text
        numbers = trimmed.described["model"]["vocab"]
        assert found[ID["##s"]] == [numbers["##s"]]
        assert found[ID["[SEP]"]] == [numbers["[SEP]"]]

    def test_pieces_within_words_stay_within(self, tmp_path):
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "b", "##a", "##b", "##ab", "ab"]
        (tmp_path / "vocab.txt").write_text("\n".join(words))
        whole = TextTokenizer.load(tmp_path)
        assert whole.as_in(whole.trimmed([]))[8:] == [[6, 7], [4, 7]]

    def test_other_tokenizers_are_refused(self, tmp_path):
        from tokenizers import Tokenizer
        from tokenizers.models import Unigram

        with pytest.raises(ConfigError, match="this is Unigram"):
            TextTokenizer(Tokenizer(Unigram([("<unk>", 0.0), ("a", -1.0)], 0)), 8).trimmed([])


def test_the_digest_tells_lengths_and_vocabularies_apart(folder):
    first = TextTokenizer.load(folder, 16).digest
    assert TextTokenizer.load(folder, 16).digest == first
    assert TextTokenizer.load(folder, 17).digest != first
    (folder / "vocab.txt").write_text("\n".join([*VOCABULARY, "new"]))
    assert TextTokenizer.load(folder, 16).digest != first


def test_a_catalog_is_padded_to_the_bucket_of_its_longest_text(tokenizer):
    tokens, mask = tokenizer.tokenize(["the film", "", "war " * 9])
    assert tokens.shape == mask.shape == (3, 16)
    assert tokens.dtype == mask.dtype == np.int32
    assert tokens[0].tolist() == ids("the", "film") + [0] * 12
    assert mask.sum(1).tolist() == [4, 2, 11]
    assert tokenizer.tokenize(["the film"])[0].shape == (1, 8)
    assert tokenizer.tokenize([])[0].shape == (0, 8)


@pytest.mark.parametrize(
    ("longest", "limit", "width"),
    [(1, 256, 8), (8, 256, 8), (9, 256, 16), (97, 256, 128), (97, 100, 100), (600, 600, 600)],
)
def test_a_bucket_is_the_smallest_that_holds_and_never_above_the_limit(longest, limit, width):
    assert bucket(longest, limit) == width


def test_buckets_are_few_and_grow():
    assert len(BUCKETS) <= 16
    assert list(BUCKETS) == sorted(set(BUCKETS))


def test_rows_without_a_given_width_are_as_wide_as_the_longest():
    tokens, mask = padded([[5, 6, 7], [8]])
    assert tokens.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


def test_texts_come_in_any_iterable_and_any_number(tokenizer):
    texts = ("the film" for _ in range(5000))
    assert sum(row == ids("the", "film") for row in tokenizer.ids(texts)) == 5000


def test_coverage_counts_characters_not_tokens(tokenizer):
    cover = tokenizer.coverage(["the film", "千と千尋の神隠し ship"])
    # Known: the, film, ship = 11 characters, 3 tokens. Unknown: 8 characters, of which the five
    # ideographs are a token each, and the three others (each between ideographs) one each.
    assert cover.unknown == pytest.approx(8 / 19)
    assert cover.characters_per_token == pytest.approx(19 / 11)


def test_coverage_counts_the_texts_that_are_cut_off(folder):
    short = TextTokenizer.load(folder, 5)
    assert short.coverage(["the film war", "the film war love", "film " * 20_000]).cut == 2


def test_long_texts_are_tokenised_a_few_at_a_time(tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "_CHARACTERS", 10)
    texts = ["the", "the film war", "film " * 30, "", "war"]
    sizes = [len(chunk) for chunk in tokens._chunks(texts)]
    assert sizes == [2, 1, 2]
    assert len(list(tokenizer.ids(texts))) == 5


def test_coverage_of_nothing_is_nothing(tokenizer):
    assert tokenizer.coverage([]).unknown == 0
    assert tokenizer.coverage(["", " "]).unknown == 0


def test_a_length_without_room_is_refused(folder):
    with pytest.raises(ConfigError, match="a text length of 2 tokens is too short"):
        TextTokenizer.load(folder, 2)


@pytest.mark.parametrize(
    ("file", "content"),
    [("tokenizer.json", "{}"), ("tokenizer_config.json", "{"), ("vocab.txt", "the\n")],
)
def test_a_damaged_tokenizer_is_one_line(folder, file, content):
    (folder / file).write_text(content)
    with pytest.raises(InputError, match=r"the tokenizer in .* cannot be read"):
        TextTokenizer.load(folder)
