"""smaller: what stays of a BERT, and how near it is to what it was."""

from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from text_models import text_model
from tiny_bert import write_tiny_bert

from tfrec.config import TuningConfig
from tfrec.errors import ConfigError, InputError
from tfrec.models import smaller as module
from tfrec.models.bert import heads_of
from tfrec.models.keras_bridge import tf
from tfrec.models.named import kernels, named_variables
from tfrec.models.pruning import Pruner, Sparsity
from tfrec.models.smaller import smaller, sparse, staying, thinned
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import tune_text

KINDS = ("weight", "bias")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"


def sentences(count, seed):
    """Random texts of words and letters that the tiny BERT knows."""
    rng = np.random.default_rng(seed)
    words = ["the", "film", "war", "love", "story", "of", "space", "ship", "1999", *LETTERS]
    return [" ".join(rng.choice(words, rng.integers(1, 12))) for _ in range(count)]


TEXTS, HELD = sentences(200, 1), sentences(50, 2)


def near(encoder, other):
    """Mean cosine of the vectors of texts that were not used."""
    return float((encoder.encode(HELD) * other.encode(HELD)).sum(axis=1).mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "tiny", num_hidden_layers=3)


@pytest.fixture(scope="module")
def encoder(folder):
    return TextEncoder.load(folder, length=16)


@pytest.fixture(scope="module")
def narrow(encoder):
    return smaller(encoder, TEXTS, width=16, neurons=48)


def changed(tmp_path, dead=(), plain=False):
    """The tiny BERT with parts of its weights at zero, (name, place) each.

    Args:
      dead: These parts.
      plain: Whether its layer norms neither scale nor shift, so that one after another is as one.
    """
    made = write_tiny_bert(tmp_path / "changed", num_hidden_layers=3)
    weights = load_file(made / "model.safetensors")
    for name, values in weights.items():
        if plain and "LayerNorm" in name:
            values[:] = name.endswith("weight")
    for name, place in dead:
        weights[name][place] = 0
    save_file(weights, made / "model.safetensors")
    return TextEncoder.load(made, length=16)


class TestExact:
    def test_nothing_removed_changes_nothing(self, encoder):
        found = smaller(encoder, TEXTS, layers=3, heads=2, neurons=64)
        assert found is not encoder
        assert found.digest() == encoder.digest()
        np.testing.assert_array_equal(found.encode(HELD), encoder.encode(HELD))

    def test_a_dead_head_can_go(self, tmp_path):
        name = "encoder.layer.{}.attention.output.dense.weight"
        dead = [(name.format(n), np.s_[:, 16 * (n % 2) : 16 * (n % 2) + 16]) for n in range(3)]
        whole = changed(tmp_path, dead)
        found = smaller(whole, TEXTS, heads=1)
        assert [heads_of(layer) for layer in found.model.transformer_layers] == [(1, 16)] * 3
        np.testing.assert_allclose(found.encode(HELD), whole.encode(HELD), atol=1e-5)

    def test_dead_neurons_can_go(self, tmp_path):
        gone = np.random.default_rng(3).permutation(64)[:40]
        dead = [(f"encoder.layer.{n}.output.dense.weight", np.s_[:, gone]) for n in range(3)]
        whole = changed(tmp_path, dead)
        found = smaller(whole, TEXTS, neurons=24)
        assert found.model.intermediate_dim == 24
        np.testing.assert_allclose(found.encode(HELD), whole.encode(HELD), atol=1e-5)

    @pytest.mark.parametrize("gone", [0, 1])
    def test_a_layer_that_does_nothing_can_go(self, tmp_path, gone):
        parts = [f"{p}.{k}" for p in ("attention.output.dense", "output.dense") for k in KINDS]
        dead = [(f"encoder.layer.{gone}.{part}", np.s_[:]) for part in parts]
        whole = changed(tmp_path, dead, plain=True)
        found = smaller(whole, TEXTS, layers=2)
        assert found.model.num_layers == 2
        np.testing.assert_allclose(found.encode(HELD), whole.encode(HELD), atol=1e-5)

    def test_the_given_one_stays_as_it_is(self, encoder):
        before = encoder.digest()
        smaller(encoder, TEXTS, layers=2, heads=1, neurons=8, width=16)
        assert encoder.digest() == before


class TestVocabulary:
    """Of 89 tokens 80 are special ones or characters; TEXTS hold nine words."""

    def test_vectors_of_words_that_stay_are_the_same(self, encoder):
        texts = ["the film of war", "the war of film", "of a b c", "love"]
        found = smaller(encoder, texts, vocabulary=84)
        assert found.model.vocabulary_size == found.tokenizer.vocabulary_size == 84
        kept = ["the war of film", "film a b", "日 c"]
        np.testing.assert_allclose(found.encode(kept), encoder.encode(kept), atol=1e-5)
        other = ["love story"]
        assert np.abs(found.encode(other) - encoder.encode(other)).max() > 1e-3
        assert encoder.tokenizer.vocabulary_size == 89

    def test_all_the_other_ways_go_with_it(self, encoder, tmp_path):
        found = smaller(encoder, TEXTS, layers=2, heads=1, neurons=32, width=16, vocabulary=86)
        assert found.encode(HELD).shape == (50, 32)
        found.save(tmp_path / "saved")
        again = TextEncoder.load(tmp_path / "saved", length=16)
        np.testing.assert_allclose(again.encode(HELD), found.encode(HELD), atol=1e-5)

    def test_the_graph_cuts_texts_as_it_does(self, encoder):
        from tfrec.models.wordpiece import WordPieces

        found = smaller(encoder, TEXTS, vocabulary=83)
        pieces = WordPieces(found.tokenizer, found.settings)
        assert pieces.differing([*HELD, "The warship, 1999!", "日本", ""]) == []


class TestFit:
    @pytest.mark.parametrize("numbers", [{"heads": 1}, {"neurons": 32}, {"layers": 2}])
    def test_it_beats_kernels_that_stay_as_they_are(self, encoder, monkeypatch, numbers):
        lost = 1 - near(smaller(encoder, TEXTS, **numbers), encoder)

        def alone(values, target, start):
            return start, target.mean(0) - values.mean(0) @ start

        monkeypatch.setattr(module, "_fitted", alone)
        assert lost < 0.6 * (1 - near(smaller(encoder, TEXTS, **numbers), encoder))

    def test_what_the_others_can_replace_goes_first(self):
        rng = np.random.default_rng(0)
        values = rng.normal(size=(500, 6)).astype(np.float32)
        values[:, 4] = values[:, 1] - 2 * values[:, 3]
        kernel = np.ones((6, 3), np.float32)
        assert set(range(6)) - set(staying(values, kernel, 5)) <= {1, 3, 4}
        kernel[[0, 5]] = 0.1
        assert staying(values[:, [0, 5, 1, 3]], kernel[[0, 5, 1, 3]], 1, 2).tolist() == [2, 3]

    def test_it_is_repeatable(self, encoder):
        once, again = (smaller(encoder, TEXTS, layers=2, neurons=32, width=16) for _ in range(2))
        assert once.digest() == again.digest()


class TestWidth:
    def test_vectors_have_the_width_they_had(self, encoder, narrow):
        assert (narrow.model.hidden_dim, narrow.model.num_heads, narrow.width) == (16, 1, 32)
        assert narrow.encode(HELD).shape == (50, 32)
        assert near(narrow, encoder) > 0.5

    def test_a_second_time_ends_in_the_same_space(self, encoder, narrow):
        again = smaller(narrow, TEXTS, layers=2)
        assert (again.model.num_layers, again.model.hidden_dim, again.width) == (2, 16, 32)
        assert near(again, narrow) > 0.5


@pytest.mark.parametrize(
    "numbers",
    [
        {"heads": 1, "neurons": 16, "layers": 2},
        {"width": 16, "layers": 2, "neurons": 48},
    ],
)
def test_a_folder_and_litert_give_it_back(encoder, tmp_path, numbers):
    found = smaller(encoder, TEXTS, **numbers)
    vectors = found.encode(HELD)
    found.save(tmp_path / "saved")
    again = TextEncoder.load(tmp_path / "saved", length=16)
    assert again.digest() == found.digest()
    np.testing.assert_array_equal(again.encode(HELD), vectors)
    lite = text_model(tmp_path / "float", found)
    np.testing.assert_allclose(lite.encode(HELD), vectors, atol=5e-6)
    for name, calibration in (("plain", ()), ("calibrated", TEXTS)):
        lite = text_model(tmp_path / name, found, True, calibration)
        assert (lite.encode(HELD) * vectors).sum(axis=1).mean() > 0.98


def test_every_weight_that_is_read_trains(encoder):
    found = smaller(encoder, TEXTS, heads=1, width=16)
    ids, mask = found.tokenize(HELD)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(found(ids, mask, training=True)[:, :7])
    names = {id(v): name for name, v in named_variables(found).items()}
    still = [
        names[id(v)]
        for v, g in zip(
            found.trainable_weights, tape.gradient(loss, found.trainable_weights), strict=True
        )
        if g is None
    ]
    assert still == []
    assert {"projection.kernel", "projection.bias"} <= set(names.values())


@pytest.mark.parametrize("method", ["full", "lora", "prompt"])
def test_tuning_works_on_it(encoder, tmp_path, method):
    found = smaller(encoder, TEXTS, heads=1, layers=2, width=16)
    before = found.encode(HELD)
    depths = tune_text(found, TuningConfig(text=method, rank=2, bottleneck=4, prompts=3))
    np.testing.assert_allclose(found.encode(HELD), before, atol=1e-6)
    moving = {id(v) for v in found.trainable_weights}
    assert set(depths) == moving
    projection = named_variables(found)["projection.kernel"]
    assert (id(projection) in moving) == (method == "full")
    rng = np.random.default_rng(1)
    for weight in found.trainable_weights:
        weight.assign_add(rng.normal(size=weight.shape, scale=0.1).astype(np.float32))
    lite = text_model(tmp_path, found)
    np.testing.assert_allclose(lite.encode(HELD), found.encode(HELD), atol=5e-6)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"layers": 0}, "layers = 0 is not possible: this BERT has 1 to 3"),
        ({"layers": 4}, "layers = 4 is not possible: this BERT has 1 to 3"),
        ({"heads": 3}, "heads = 3 is not possible: this BERT has 1 to 2"),
        ({"neurons": 65}, "neurons = 65 is not possible: this BERT has 1 to 64"),
        ({"width": 48}, "width = 48 is not possible: this BERT has 1 to 32"),
        ({"width": 24}, "width = 24 is not a multiple of 16"),
        ({"width": 16, "heads": 2}, "heads = 2 of size 16 do not fit in width = 16"),
    ],
)
def test_impossible_numbers_say_why(encoder, numbers, message):
    with pytest.raises(ConfigError, match=message):
        smaller(encoder, TEXTS, **numbers)


@pytest.mark.parametrize("vocabulary", [79, 90])
def test_an_impossible_vocabulary_says_what_must_stay(encoder, vocabulary):
    with pytest.raises(ConfigError, match="has 89 tokens, of which 80 are single characters"):
        smaller(encoder, TEXTS, vocabulary=vocabulary)


def test_without_texts_nothing_can_be_chosen(encoder):
    with pytest.raises(InputError, match="there are none"):
        smaller(encoder, [], layers=2)


def test_max_pooling_cannot_be_followed_by_a_projection(folder):
    encoder = TextEncoder.load(folder, length=16)
    encoder.settings = replace(encoder.settings, pooling="max")
    with pytest.raises(ConfigError, match="none can follow max pooling"):
        smaller(encoder, TEXTS, width=16)


class TestSparse:
    @pytest.mark.parametrize("share", [0.5, 0.8])
    def test_what_a_zero_costs_is_made_good(self, share):
        random = np.random.default_rng(0)
        values = random.normal(size=(400, 24)) @ random.normal(size=(24, 160))
        values = (values + 0.3 * random.normal(size=values.shape)).astype(np.float32)
        kernel = random.normal(size=(160, 40)).astype(np.float32)
        found = thinned(kernel, values, share, "unstructured")
        assert np.mean(found == 0) == pytest.approx(share, abs=0.01)
        plain = np.where(np.abs(kernel) > np.quantile(np.abs(kernel), share), kernel, 0)
        lost = [np.square(values @ (one - kernel)).mean() for one in (found, plain)]
        assert lost[0] < 0.6 * lost[1]

    def test_blocks(self):
        random = np.random.default_rng(0)
        values = random.normal(size=(100, 32)).astype(np.float32)
        found = thinned(random.normal(size=(32, 16)).astype(np.float32), values, 0.5, "block")
        assert set((found == 0).reshape(32, 4, 4).sum(axis=2).ravel()) == {0, 4}

    def test_two_of_four(self):
        random = np.random.default_rng(0)
        values = random.normal(size=(100, 32)).astype(np.float32)
        found = thinned(random.normal(size=(32, 16)).astype(np.float32), values, 0.5, "2:4")
        assert set((found == 0).reshape(8, 4, 16).sum(axis=1).ravel()) == {2}

    @pytest.mark.parametrize("pattern", ["unstructured", "block", "2:4"])
    def test_masks_by_magnitude_keep_its_zeros(self, encoder, pattern):
        found = sparse(encoder, TEXTS, 0.5, pattern)
        before = {name: v.numpy() == 0 for name, v in kernels(found).items()}
        assert min(np.mean(zeros) for zeros in before.values()) > 0.45
        Pruner(kernels(found), Sparsity(0.5, pattern, "constant"), 10)(tf.constant(0.0))
        for name, kernel in kernels(found).items():
            gone = kernel.numpy() == 0
            assert gone[before[name]].all()
            assert np.mean(gone) == pytest.approx(0.5, abs=0.01)

    def test_it_is_nearer_than_magnitude_alone(self, encoder):
        plain = smaller(encoder, TEXTS)
        Pruner(kernels(plain), Sparsity(0.5, schedule="constant"), 10)(tf.constant(0.0))
        assert near(encoder, sparse(encoder, TEXTS, 0.5)) > near(encoder, plain)

    def test_the_given_one_stays_as_it_is(self, encoder):
        before = encoder.digest()
        sparse(encoder, TEXTS, 0.5)
        assert encoder.digest() == before
