"""LiteRT engines: the same numbers as the TensorFlow models, and no TensorFlow in the process."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import checkerboard as board
import numpy as np
import pytest
from ai_edge_litert.interpreter import Interpreter
from safetensors.numpy import load_file, save_file
from text_models import text_model
from tiny_bert import write_tiny_bert
from toys import make_interactions, small_config

from tfrec.config import RankingConfig, TuningConfig
from tfrec.data.sequences import EventCoding, Histories
from tfrec.engines import LiteRTEngine, LiteRTModel
from tfrec.errors import ArtifactError, InputError, SetupError
from tfrec.models import litert
from tfrec.models.bert import tensors
from tfrec.models.engine import load_recommender
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.ranking import Ranker
from tfrec.models.retrieval import TwoTower
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import tune_text

SOME = ["the film", "A story of war, love (1999).", "", "space ship space ship", "日本", "the film"]
DOCS = Path(__file__).parents[2] / "docs"
TEXTS = [
    f"{a} {b} ({n})" for n, a in enumerate(SOME) for b in ("war", "of the ship", "caf\u00e9" * 9)
]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "tiny")


@pytest.fixture(scope="module")
def minilm():
    try:
        return TextEncoder.load("all-MiniLM-L6-v2")
    except SetupError as error:
        pytest.skip(f"the weights of MiniLM cannot be had here: {error}")


def tuned(encoder, method):
    tune_text(encoder, TuningConfig(text=method, rank=2, bottleneck=4, prompts=3))
    rng = np.random.default_rng(1)
    for weight in encoder.trainable_weights:
        weight.assign_add(rng.normal(size=weight.shape, scale=0.3).astype(np.float32))


@pytest.fixture
def outlying(tmp_path):
    """An encoder in which two channels of each layer norm are far larger than the others."""
    folder = write_tiny_bert(tmp_path / "outlying")
    weights = load_file(folder / "model.safetensors")
    for name, values in weights.items():
        if name.endswith("LayerNorm.weight"):
            values[[3, 17]] *= 12
    save_file(weights, folder / "model.safetensors")
    return TextEncoder.load(folder, length=32)


class TestText:
    def test_it_reads_as_the_keras_model(self, bert, tmp_path):
        encoder = TextEncoder.load(bert, length=32)
        found = text_model(tmp_path, encoder)
        for texts in (SOME, TEXTS, SOME[:1], [" ".join(["war"] * 100)] * 3):
            np.testing.assert_allclose(found.encode(texts), encoder.encode(texts), atol=2e-6)
        assert found.encode([]).shape == (0, encoder.width)

    @pytest.mark.parametrize("pooling", ["cls", "max"])
    @pytest.mark.parametrize("normalize", [True, False])
    def test_other_poolings(self, bert, tmp_path, pooling, normalize):
        encoder = TextEncoder.load(bert, length=32)
        encoder.settings = replace(encoder.settings, pooling=pooling, normalize=normalize)
        encoder.retrace()
        found = text_model(tmp_path, encoder)
        np.testing.assert_allclose(found.encode(SOME), encoder.encode(SOME), atol=3e-6)

    @pytest.mark.parametrize("activation", ["gelu_new", "relu"])
    def test_other_activations(self, tmp_path, activation):
        folder = write_tiny_bert(tmp_path / "bert", hidden_act=activation)
        encoder = TextEncoder.load(folder, length=32)
        found = text_model(tmp_path / "lite", encoder)
        np.testing.assert_allclose(found.encode(SOME), encoder.encode(SOME), atol=2e-6)

    @pytest.mark.parametrize("method", ["lora", "adapter", "prompt", "bitfit"])
    def test_what_tuning_added_is_in_it(self, bert, tmp_path, method):
        encoder = TextEncoder.load(bert, length=32)
        before = encoder.encode(SOME)
        tuned(encoder, method)
        found = text_model(tmp_path, encoder).encode(SOME)
        np.testing.assert_allclose(found, encoder.encode(SOME), atol=3e-6)
        assert np.abs(found - before).max() > 1e-2

    def test_int8_is_smaller_and_near(self, bert, tmp_path):
        encoder = TextEncoder.load(bert, length=32)
        small, large = (
            text_model(tmp_path / "8", encoder, True),
            text_model(tmp_path / "32", encoder),
        )
        cosine = (small.encode(TEXTS) * encoder.encode(TEXTS)).sum(axis=1)
        assert 0.99 < cosine.min() < 1 - 1e-6
        sizes = [(tmp_path / name / "model.tflite").stat().st_size for name in ("8", "32")]
        assert sizes[0] < sizes[1]
        assert large.width == small.width == encoder.width

    def test_the_kernels_are_rounded_as_they_are(self, outlying):
        """The converter would fold the scale of a layer norm into them, and round that."""
        lite = Interpreter(model_content=litert.text_model(outlying), num_threads=1)
        told = [d for d in lite.get_tensor_details() if d["dtype"] is np.int8]
        kept = [
            lite.get_tensor(d["index"]) * d["quantization_parameters"]["scales"][:, None]
            for d in told
            if len(d["quantization_parameters"]["scales"]) == d["shape"][0]
        ]
        weights = tensors(outlying.model)
        for name in ("0.intermediate.dense", "1.output.dense", "1.attention.output.dense"):
            kernel = weights[f"encoder.layer.{name}.weight"]
            step = np.abs(kernel).max(axis=1, keepdims=True) / 127
            assert any(
                k.shape == kernel.shape and (abs(k - kernel) <= 0.51 * step).all() for k in kept
            )

    def test_calibration_makes_large_channels_harmless(self, outlying, tmp_path):
        expected = outlying.encode(TEXTS)

        def lost(name, calibration):
            found = text_model(tmp_path / name, outlying, True, calibration).encode(TEXTS)
            return 1 - (found * expected).sum(axis=1).mean()

        # 0.18 when written; 0.66 if the channels are not made alike.
        assert lost("calibrated", TEXTS) < 0.4 * lost("plain", ())

    @pytest.mark.parametrize("method", ["lora", "adapter", "prompt"])
    def test_calibration_of_what_was_tuned(self, bert, tmp_path, method):
        encoder = TextEncoder.load(bert, length=32)
        before = encoder.encode(TEXTS)
        tuned(encoder, method)
        found = text_model(tmp_path, encoder, True, TEXTS).encode(TEXTS)
        lost = [1 - (found * v).sum(axis=1).mean() for v in (encoder.encode(TEXTS), before)]
        assert lost[0] < 0.1 * lost[1]

    @pytest.mark.slow
    def test_minilm_on_real_sentences(self, minilm, tmp_path):
        lines = [
            line
            for page in sorted(DOCS.glob("*.md"))
            for line in page.read_text("utf-8").splitlines()
            if len(line) > 60
        ]
        texts, others = lines[::3], [line for i, line in enumerate(lines) if i % 3]
        expected = minilm.encode(texts)
        found = {}
        for name, calibration in (("plain", ()), ("calibrated", others)):
            model = text_model(tmp_path / name, minilm, True, calibration)
            found[name] = (model.encode(texts) * expected).sum(axis=1)
            assert (tmp_path / name / "model.tflite").stat().st_size < 23e6
        assert found["plain"].mean() > 0.998
        assert found["plain"].min() > 0.995
        assert found["calibrated"].mean() > 0.9994
        assert found["calibrated"].min() > 0.998

    def test_calibration_is_repeatable(self, outlying):
        once, again = (litert.text_model(outlying, True, TEXTS) for _ in range(2))
        assert once == again

    def test_roles_and_lower_case(self, bert, tmp_path):
        encoder = TextEncoder.load(bert, length=32)
        prompts = {"query": "the war of ", "document": "space "}
        encoder.settings = replace(encoder.settings, prompts=prompts, lowercase=True)
        found = text_model(tmp_path, encoder)
        for role in ("", "query", "passage"):
            asked = encoder.encode(["LOVE story"], role=role)
            np.testing.assert_allclose(found.encode(["LOVE story"], role), asked, atol=2e-6)

    def test_weights_that_are_not_finite_are_refused(self, bert):
        encoder = TextEncoder.load(bert, length=32)
        weight = encoder.trainable_weights[-1]
        weight.assign(np.full(weight.shape, np.nan, np.float32))
        for calibration in ((), SOME):
            with pytest.raises(InputError, match="not finite"):
                litert.text_model(encoder, True, calibration)


def queries(config, text_width=5, profile=3, attributes=2, counts=(3, 0, 12, 1, 7)):
    """A random two-tower over 12 items, and what users with so many events ask it."""
    tf_keras.utils.set_random_seed(1)
    rng = np.random.default_rng(1)
    events = make_interactions(list(counts), 12)
    coding = EventCoding.of(events)
    text = rng.normal(size=(13, text_width)).astype(np.float32)
    features = rng.normal(size=(13, 4)).astype(np.float32)
    model = TwoTower(config, text, features, coding, profile, attributes)
    for weight in model.trainable_variables:
        weight.assign_add(rng.normal(size=weight.shape, scale=0.1).astype(np.float32))
    vectors = model.encode_candidate(text, features, np.arange(13, dtype=np.int32))
    asked = (
        Histories.of(events, coding),
        vectors,
        rng.normal(size=(len(counts), profile)).astype(np.float32),
        rng.normal(size=(len(counts), attributes)).astype(np.float32),
    )
    return model, asked


def engine(folder, model, **more):
    folder.mkdir(exist_ok=True)
    (folder / "query.tflite").write_bytes(litert.query_model(model))
    return LiteRTEngine(folder, model.config.history, threads=1, **more)


class TestTowers:
    @pytest.mark.parametrize(
        "settings",
        [
            {},
            {"events": False, "time_gaps": False},
            {"request_time": True, "layers": 2, "feed_forward": 2},
        ],
    )
    def test_queries(self, tmp_path, settings):
        model, asked = queries(small_config(**settings))
        times = asked[0].timestamp.max() + np.arange(5) * 86_400
        found = engine(tmp_path, model)
        for extra in ((), (times,)):
            expected = model.encode_query(*asked, *extra)
            np.testing.assert_allclose(found.encode_query(*asked, *extra), expected, atol=1e-5)

    def test_histories_of_all_lengths(self, tmp_path):
        counts = (0, 1, 15, 16, 17, 31, 32, 39, 40, 41, 60, 2, 3)
        model, asked = queries(small_config(history=40), counts=counts)
        found = engine(tmp_path, model)
        np.testing.assert_allclose(
            found.encode_query(*asked), model.encode_query(*asked), atol=1e-5
        )
        for user in range(len(counts)):
            histories, vectors, profile, attributes = asked
            row = slice(user, user + 1)
            alone = (histories.take(np.array([user])), vectors, profile[row], attributes[row])
            np.testing.assert_allclose(
                found.encode_query(*alone), model.encode_query(*alone), atol=1e-5
            )

    def test_a_model_of_whole_rows_is_read_as_well(self, tmp_path):
        model, asked = queries(small_config(history=40), counts=(0, 3, 40, 60, 1))
        call, signature = litert.query_function(model)
        whole = {
            name: tf.TensorSpec([None, *(size or 40 for size in spec.shape[1:])], spec.dtype)
            for name, spec in signature.items()
        }
        (tmp_path / "query.tflite").write_bytes(litert.convert(call, whole, False))
        found = LiteRTEngine(tmp_path, 40, copies=2)
        np.testing.assert_allclose(
            found.encode_query(*asked), model.encode_query(*asked), atol=1e-5
        )

    def test_without_profiles_and_attributes(self, tmp_path):
        model, asked = queries(small_config(), profile=0, attributes=0)
        found = engine(tmp_path, model).encode_query(*asked)
        np.testing.assert_allclose(found, model.encode_query(*asked), atol=1e-5)

    @pytest.mark.parametrize("hidden", [0, 6])
    @pytest.mark.parametrize("widths", [(5, 4), (0, 4), (5, 0)])
    def test_new_items(self, tmp_path, hidden, widths):
        model, _ = queries(small_config(text_hidden=hidden), text_width=widths[0])
        text, features = (np.ones((3, w), np.float32) * np.arange(3)[:, None] for w in widths)
        text, features = text.astype(np.float32), features.astype(np.float32)
        blob = litert.candidate_model(model, *widths)
        found = engine(tmp_path, model)
        with pytest.raises(InputError, match="no new items"):
            found.encode_candidate(text, features, np.zeros(3, np.int32))
        (tmp_path / "candidate.tflite").write_bytes(blob)
        found = engine(tmp_path, model)
        expected = (
            model.encode_candidate(text, features, np.zeros(3, np.int32))
            if widths[1]
            else model.encode_candidate(text, np.zeros((3, 4), np.float32), np.zeros(3, np.int32))
        )
        given = found.encode_candidate(text, features, np.zeros(3, np.int32))
        np.testing.assert_allclose(given, expected, atol=1e-6)
        with pytest.raises(InputError, match="new items alone"):
            found.encode_candidate(text, features, np.arange(3, dtype=np.int32))

    def test_a_two_tower_of_ids_alone_knows_no_new_items(self):
        model, _ = queries(small_config())
        assert litert.candidate_model(model, 0, 0) is None

    @pytest.mark.parametrize("fusion", ["linear", "gated", "mmoe"])
    @pytest.mark.parametrize("width", [0, 3])
    def test_the_ranker(self, tmp_path, fusion, width):
        tf_keras.utils.set_random_seed(3)
        config = RankingConfig(history=5, hidden=8, experts=2, dropout=0.0, fusion=fusion)
        tasks = ("click", "like", "rating", "conversion")
        ranker = Ranker(
            config,
            embedding_dim=6,
            attributes_width=2,
            user_attributes_width=width,
            num_scalars=2,
            text_width=width,
            profile_width=width,
            tasks=tasks,
            rating_mean=3.5,
        )
        rng = np.random.default_rng(1)
        for weight in ranker.trainable_variables:
            weight.assign_add(rng.normal(size=weight.shape, scale=0.2).astype(np.float32))
        shapes = {
            "query": (4, 6),
            "history": (4, 5, 6),
            "history_mask": (4, 5),
            "candidates": (4, 7, 6),
            "attributes": (4, 7, 2),
            "text": (4, 7, width),
            "user_attributes": (4, width),
            "profile": (4, width),
            "scalars": (4, 7, 2),
        }
        given = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        given["history_mask"] = (given["history_mask"] > 0).astype(np.float32)
        model, _ = queries(small_config())
        engine(tmp_path, model)
        (tmp_path / "rank.tflite").write_bytes(litert.rank_model(ranker))
        found = LiteRTEngine(tmp_path, 8, tasks, threads=1).rank(given)
        assert tuple(found) == tasks
        for task, expected in ranker(given).items():
            np.testing.assert_allclose(found[task], expected, atol=1e-5, err_msg=task)

    @pytest.mark.parametrize("users", [1, 2, 7])
    @pytest.mark.parametrize("candidates", [1, 129])
    def test_copies_side_by_side_say_what_one_says(self, tmp_path, users, candidates):
        tf_keras.utils.set_random_seed(3)
        config = RankingConfig(history=5, hidden=8, experts=2, dropout=0.0)
        widths = {"attributes_width": 2, "user_attributes_width": 0, "num_scalars": 2}
        ranker = Ranker(config, embedding_dim=8, tasks=("click", "rating"), **widths)
        model, arguments = queries(small_config())
        engine(tmp_path, model)
        (tmp_path / "rank.tflite").write_bytes(litert.rank_model(ranker))
        rng = np.random.default_rng(1)
        shapes = {
            "query": (users, 8),
            "history": (users, 5, 8),
            "history_mask": (users, 5),
            "candidates": (users, candidates, 8),
            "attributes": (users, candidates, 2),
            "scalars": (users, candidates, 2),
        }
        given = {n: rng.normal(size=s).astype(np.float32) for n, s in shapes.items()}
        one = LiteRTEngine(tmp_path, 8, ("click", "rating"), threads=1)
        several = LiteRTEngine(tmp_path, 8, ("click", "rating"), copies=3)
        for task, expected in one.rank(given).items():
            assert expected.shape == (users, candidates)
            np.testing.assert_allclose(several.rank(given)[task], expected, atol=1e-6)
        np.testing.assert_allclose(
            several.encode_query(*arguments), one.encode_query(*arguments), atol=1e-6
        )


class TestAsOneEngine:
    def test_a_trained_run_recommends_the_same(self, tmp_path_factory, tmp_path):
        recommender = load_recommender(board.trained(tmp_path_factory))
        told = recommender.engine
        folder = tmp_path / "models"
        text_model(folder / "text", told.text_encoder)
        (folder / "query.tflite").write_bytes(litert.query_model(told.two_tower))
        (folder / "rank.tflite").write_bytes(litert.rank_model(told.ranker))
        found = LiteRTEngine(folder, told.two_tower.config.history, told.ranker.tasks, threads=1)
        users = np.arange(board.USERS, dtype=np.int32)
        asked = recommender.who(recommender.interactions, users)
        policy = replace(
            recommender.policy,
            score={"retrieval": 1.0, "linear": 1.0, "text": 1.0, "popularity": 0.1, "click": 1.0},
        )
        expected = recommender.chain(asked, 5, asked.seen, recommender.index, policy)
        recommender.engine = found
        again = recommender.chain(asked, 5, asked.seen, recommender.index, policy)
        np.testing.assert_allclose(again.scores, expected.scores, rtol=1e-4, atol=1e-4)
        assert (again.ids == expected.ids).mean() > 0.95


class TestDamage:
    def test_a_file_that_is_no_model(self, tmp_path):
        (tmp_path / "query.tflite").write_bytes(b"not a model at all" * 10)
        with pytest.raises(ArtifactError, match="not a LiteRT model"):
            LiteRTEngine(tmp_path, 8)

    def test_no_model(self, tmp_path):
        with pytest.raises(ArtifactError, match=r"no query\.tflite"):
            LiteRTEngine(tmp_path, 8)

    def test_no_ranker_where_one_is_needed(self, tmp_path):
        model, _ = queries(small_config())
        with pytest.raises(ArtifactError, match=r"no rank\.tflite"):
            engine(tmp_path, model, tasks=("click",))

    def test_no_texts(self, tmp_path):
        model, _ = queries(small_config())
        found = engine(tmp_path, model)
        with pytest.raises(InputError, match="reads no texts"):
            found.encode_text(["war"])
        assert found.rank({}) == {}

    def test_without_litert_it_says_what_to_install(self, monkeypatch, tmp_path):
        monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
        with pytest.raises(SetupError, match="pip install"):
            LiteRTModel(tmp_path / "x.tflite")


def test_it_runs_without_tensorflow(bert, tmp_path):
    text_model(tmp_path, TextEncoder.load(bert, length=32))
    code = (
        "import sys; from tfrec.engines import TextModel; "
        f"print(TextModel({str(tmp_path)!r}).encode(['the film']).shape); "
        "sys.exit('tensorflow' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(1, 32)"
