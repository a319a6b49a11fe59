"""TextEncoder: the vectors that sentence-transformers gives, and a BERT that trains."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from golden_texts import TEXTS
from safetensors.numpy import load_file, save_file
from tiny_bert import VOCABULARY, write_tiny_bert

from tfrec.data.tokens import BUCKETS
from tfrec.errors import ConfigError, InputError, SetupError
from tfrec.models import text as text_module
from tfrec.models import weights
from tfrec.models.bert import heads_of
from tfrec.models.keras_bridge import keras3, keras_hub, tf, tf_keras, tfrs
from tfrec.models.named import named_variables
from tfrec.models.text import TextEncoder

LENGTH = 32
SOME = ["the film", "A story of war, love (1999).", "", "space ship space ship", "日本", "the film"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "tiny")


@pytest.fixture
def encoder(folder) -> TextEncoder:
    return TextEncoder.load(folder, length=LENGTH)


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    try:
        return TextEncoder.load("all-MiniLM-L6-v2")
    except SetupError as error:
        pytest.skip(f"the weights of MiniLM cannot be had here: {error}")


# ---- the numbers are right


def reference_hidden(folder: Path, ids: list[int], epsilon: float, activation) -> np.ndarray:
    """BERT as in the paper (Devlin et al., 2018), in NumPy, for one text without padding."""
    w = {name: t.astype(np.float64) for name, t in load_file(folder / "model.safetensors").items()}

    def dense(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon)
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embeddings.word_embeddings.weight"][ids]
    x = x + w["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm("embeddings.LayerNorm", x + w["embeddings.token_type_embeddings.weight"][0])
    for layer in ("encoder.layer.0.", "encoder.layer.1."):
        heads = [
            dense(f"{layer}attention.self.{part}", x).reshape(len(ids), 2, 16).swapaxes(0, 1)
            for part in ("query", "key", "value")
        ]
        scores = np.exp(heads[0] @ heads[1].swapaxes(1, 2) / 4)
        mixed = (scores / scores.sum(-1, keepdims=True)) @ heads[2]
        mixed = mixed.swapaxes(0, 1).reshape(len(ids), 32)
        x = norm(
            f"{layer}attention.output.LayerNorm", x + dense(f"{layer}attention.output.dense", mixed)
        )
        inner = activation(dense(f"{layer}intermediate.dense", x))
        x = norm(f"{layer}output.LayerNorm", x + dense(f"{layer}output.dense", inner))
    return x


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def gelu_by_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


TEXT = "a story of war, love"
TOKENS = ["[CLS]", "a", "story", "of", "war", "[UNK]", "love", "[SEP]"]
IDS = [VOCABULARY.index(token) for token in TOKENS]


@pytest.mark.parametrize(
    ("name", "activation"),
    [("gelu", gelu), ("gelu_new", gelu_by_tanh), ("relu", lambda x: np.maximum(x, 0))],
)
def test_each_activation_is_the_one_the_checkpoint_means(tmp_path, name, activation):
    made = write_tiny_bert(tmp_path / "bert", hidden_act=name)
    hidden = reference_hidden(made, IDS, 1e-12, activation)
    want = hidden.mean(0) / np.linalg.norm(hidden.mean(0))
    got = TextEncoder.load(made, length=LENGTH).encode([TEXT])[0]
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_the_epsilon_of_the_layer_norms_is_that_of_the_checkpoint(tmp_path):
    made = write_tiny_bert(tmp_path / "bert", layer_norm_eps=0.1)
    hidden = reference_hidden(made, IDS, 0.1, gelu)
    want = hidden.mean(0) / np.linalg.norm(hidden.mean(0))
    got = TextEncoder.load(made, length=LENGTH).encode([TEXT])[0]
    np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize(
    ("mode", "pool"),
    [("cls_token", lambda x: x[0]), ("max_tokens", lambda x: x.max(0)), ("mean_tokens", None)],
)
def test_pooling_and_length_follow_the_files_of_sentence_transformers(tmp_path, mode, pool):
    made = write_tiny_bert(tmp_path / "bert")
    (made / "1_Pooling").mkdir()
    (made / "1_Pooling" / "config.json").write_text(json.dumps({f"pooling_mode_{mode}": True}))
    parts = [{"type": f"sentence_transformers.models.{x}"} for x in ("Transformer", "Pooling")]
    (made / "modules.json").write_text(json.dumps(parts))
    hidden = reference_hidden(made, IDS, 1e-12, gelu)
    want = hidden.mean(0) if pool is None else pool(hidden)
    got = TextEncoder.load(made, length=LENGTH).encode([TEXT, "the " * 20])[0]
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_minilm_equals_sentence_transformers_on_tricky_strings(minilm):
    golden = np.load(Path(__file__).parent / "golden_minilm.npz", allow_pickle=False)
    tokens = np.split(golden["tokens"], np.cumsum(golden["lengths"])[:-1])
    for text, ours, theirs in zip(TEXTS, minilm.tokenizer.ids(TEXTS), tokens, strict=True):
        assert ours == theirs.tolist(), text[:40]
    np.testing.assert_allclose(minilm.encode(TEXTS), golden["vectors"], rtol=0, atol=1e-5)


def test_the_gelu_that_keras_hub_takes_would_miss_sentence_transformers(minilm):
    golden = np.load(Path(__file__).parent / "golden_minilm.npz", allow_pickle=False)
    layers = minilm.model.transformer_layers
    exact = layers[0]._feedforward_intermediate_dense.activation
    assert exact is keras3.activations.gelu
    ids, mask = minilm.tokenize(TEXTS[:8])
    try:
        for layer in layers:
            layer._feedforward_intermediate_dense.activation = lambda x: exact(x, approximate=True)
        missed = np.abs(minilm(ids, mask).numpy() - golden["vectors"][:8]).max()
    finally:
        for layer in layers:
            layer._feedforward_intermediate_dense.activation = exact
    assert missed > 1e-5


# ---- batches, order, odd input


def test_a_batch_equals_its_texts_one_by_one(encoder):
    together = encoder.encode(SOME, tokens_per_batch=20)
    alone = np.concatenate([encoder.encode([text]) for text in SOME])
    assert together.dtype == np.float32
    assert together.shape == (6, 32)
    np.testing.assert_allclose(together, alone, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    np.testing.assert_array_equal(together[0], together[5])


def test_the_layer_gives_what_encode_gives(encoder):
    np.testing.assert_allclose(encoder(*encoder.tokenize(SOME)), encoder.encode(SOME), atol=1e-6)


def test_padding_to_a_wider_bucket_changes_nothing(encoder):
    ids, mask = encoder.tokenize(SOME)
    wider = [np.pad(x, ((0, 0), (0, 13))) for x in (ids, mask)]
    np.testing.assert_allclose(encoder(*wider), encoder(ids, mask), atol=1e-6)


def test_no_texts_give_no_vectors(encoder):
    assert encoder.encode([]).shape == (0, 32)
    assert encoder.encode_cached([], "/nonexistent").shape == (0, 32)
    assert encoder.tokenize([])[0].shape == (0, BUCKETS[0])


def test_a_lone_surrogate_is_read_like_the_replacement_it_is_written_as(encoder):
    np.testing.assert_array_equal(encoder.encode(["a\ud800b"]), encoder.encode(["a?b"]))


def test_a_progress_bar_is_shown_only_when_asked_for(encoder, capsys):
    encoder.encode(SOME)
    assert capsys.readouterr().err == ""
    encoder.encode(SOME, progress=True)
    assert "encoding texts: 100%" in capsys.readouterr().err


def test_prompts_are_put_before_texts_in_their_role(tmp_path):
    made = write_tiny_bert(tmp_path / "bert")
    prompts = {"prompts": {"query": "war: ", "document": "love: "}}
    (made / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    encoder = TextEncoder.load(made, length=LENGTH)
    plain = encoder.encode(["war: the film", "love: the film", "the film"])
    got = [encoder.encode(["the film"], role=role)[0] for role in ("query", "passage", "")]
    np.testing.assert_allclose(got, plain, atol=1e-6)
    np.testing.assert_array_equal(
        encoder.tokenize(["a"], role="query")[0], encoder.tokenize(["war: a"])[0]
    )


def test_a_model_that_wants_lower_case_gets_it(tmp_path):
    made = write_tiny_bert(tmp_path / "bert")
    (made / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    (made / "sentence_bert_config.json").write_text('{"do_lower_case": true}')
    encoder = TextEncoder.load(made, length=LENGTH)
    np.testing.assert_array_equal(encoder.encode(["THE film"]), encoder.encode(["the film"]))


# ---- training


class Rating(tfrs.Model):
    def __init__(self, encoder: TextEncoder) -> None:
        super().__init__()
        self.encoder, self.head = encoder, tf_keras.layers.Dense(1)

    def call(self, batch):
        return self.head(self.encoder(batch["ids"], batch["mask"]))

    def compute_loss(self, batch, training=False):
        vectors = self.encoder(batch["ids"], batch["mask"], training=training)
        return tf.reduce_mean(tf.square(self.head(vectors) - batch["rating"]))


def batch_of(encoder: TextEncoder) -> dict[str, np.ndarray]:
    ids, mask = encoder.tokenize(SOME)
    return {"ids": ids, "mask": mask, "rating": np.arange(6, dtype=np.float32)[:, None]}


def fitted(encoder: TextEncoder, **compile_arguments) -> Rating:
    model = Rating(encoder)
    model.compile(tf_keras.optimizers.Adam(1e-2), **compile_arguments)
    model.fit(tf.data.Dataset.from_tensors(batch_of(encoder)), verbose=0)
    return model


def nudged(encoder: TextEncoder) -> TextEncoder:
    for variable in encoder.trainable_weights:
        variable.assign_add(tf.random.normal(variable.shape, stddev=0.1, seed=1))
    return encoder


def weights_of(encoder: TextEncoder) -> dict[str, np.ndarray]:
    return {v.path: v.value.numpy().copy() for v in encoder.model.trainable_variables}


@pytest.mark.parametrize("jit_compile", [False, True])
def test_one_training_step_changes_every_weight_of_the_bert(tmp_path, jit_compile):
    made = write_tiny_bert(tmp_path / "bert", num_hidden_layers=1)
    encoder = TextEncoder.load(made, length=LENGTH)
    before = weights_of(encoder)
    fitted(encoder, jit_compile=jit_compile)
    after = weights_of(encoder)
    unchanged = [path for path in before if (before[path] == after[path]).all()]
    assert len(before) == 21  # 5 of the embeddings, 16 of the layer; the pooler is never read
    # Whatever is added to all keys alike leaves attention as it is, so their bias has no gradient.
    assert all("key/bias" in path for path in unchanged)


def test_a_frozen_bert_stays_as_it_is_and_drops_nothing_out(folder):
    encoder = TextEncoder.load(folder, length=LENGTH, trainable=False)
    before = encoder.digest()
    model = fitted(encoder)
    assert encoder.trainable_weights == []
    assert len(model.trainable_weights) == 2
    assert encoder.digest() == before
    ids, mask = encoder.tokenize(SOME)
    np.testing.assert_array_equal(encoder(ids, mask, training=True), encoder(ids, mask))


def test_a_trained_bert_drops_out_in_training_only(encoder):
    ids, mask = encoder.tokenize(SOME)
    assert (encoder(ids, mask, training=True).numpy() != encoder(ids, mask).numpy()).any()
    np.testing.assert_array_equal(encoder(ids, mask), encoder(ids, mask))


def test_a_checkpoint_of_a_trained_bert_is_exact(encoder, folder, tmp_path):
    path = tf.train.Checkpoint(text=nudged(encoder)).save(str(tmp_path / "checkpoint"))
    other = TextEncoder.load(folder, length=LENGTH)
    tf.train.Checkpoint(text=other).restore(path).assert_consumed()
    np.testing.assert_array_equal(other.encode(SOME), encoder.encode(SOME))
    assert other.digest() == encoder.digest()


def test_a_trained_bert_is_saved_as_a_folder_that_loads_to_the_same_vectors(encoder, tmp_path):
    nudged(encoder).save(tmp_path / "saved")
    again = TextEncoder.load(tmp_path / "saved", length=LENGTH)
    np.testing.assert_array_equal(again.encode(SOME), encoder.encode(SOME))
    assert again.settings == encoder.settings
    assert again.digest() == encoder.digest()


def test_a_saved_model_gives_the_same_vectors(encoder, tmp_path):
    module = tf.Module()
    module.encoder = encoder
    spec = [tf.TensorSpec([None, None], tf.int32)] * 2
    serve = tf.function(lambda ids, mask: {"vectors": encoder(ids, mask)}, input_signature=spec)
    tf.saved_model.save(module, str(tmp_path / "saved"), signatures=serve.get_concrete_function())
    ids, mask = encoder.tokenize(SOME)
    signature = tf.saved_model.load(str(tmp_path / "saved")).signatures["serving_default"]
    want = encoder(ids, mask)
    got = signature(ids=tf.constant(ids), mask=tf.constant(mask))["vectors"]
    np.testing.assert_allclose(got, want, atol=1e-6)


# ---- folders


def test_weights_without_a_pooler_are_read(tmp_path, encoder):
    bare = write_tiny_bert(tmp_path / "bert", pooler=False)
    tensors = load_file(bare / "model.safetensors")
    assert "pooler.dense.weight" not in tensors
    hidden = reference_hidden(bare, IDS, 1e-12, gelu).mean(0)
    got = TextEncoder.load(bare, length=LENGTH).encode([TEXT])[0]
    np.testing.assert_allclose(got, hidden / np.linalg.norm(hidden), atol=2e-6)


def test_weights_with_one_segment_are_read(tmp_path):
    made = write_tiny_bert(tmp_path / "bert", type_vocab_size=1)
    assert TextEncoder.load(made, length=LENGTH).encode(SOME).shape == (6, 32)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_keras_nlp_preset_folder_is_read(tmp_path):
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=len(VOCABULARY),
        num_layers=1,
        num_heads=2,
        hidden_dim=8,
        intermediate_dim=16,
        max_sequence_length=LENGTH,
    )
    backbone.save_to_preset(str(tmp_path))
    keras_hub.models.BertTokenizer(VOCABULARY, lowercase=True).save_to_preset(str(tmp_path))
    encoder = TextEncoder.load(tmp_path, length=LENGTH)
    assert list(encoder.tokenizer.ids([TEXT])) == [IDS]
    feed = {"token_ids": [IDS], "segment_ids": [[0] * 8], "padding_mask": [[1] * 8]}
    hidden = backbone({k: np.array(v) for k, v in feed.items()})["sequence_output"][0]
    want = np.mean(hidden, 0) / np.linalg.norm(np.mean(hidden, 0))
    np.testing.assert_allclose(encoder.encode([TEXT])[0], want, atol=1e-6)


def test_a_length_beyond_the_positions_of_the_bert_is_refused(folder):
    with pytest.raises(ConfigError, match="65 tokens is more than the 64 positions"):
        TextEncoder.load(folder, length=65)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", '{"model_type": "gpt2"}', "holds a model that is gpt2, not a BERT"),
        ("config.json", "{", "is damaged: it is not valid JSON"),
        ("model.safetensors", "nonsense", "cannot be loaded"),
        ("tokenizer.json", "{}", "the tokenizer in .* cannot be read"),
        ("modules.json", '[{"type": "x.models.CNN"}]', "a module CNN after the BERT"),
        ("modules.json", '[{"type": "x.models.Dense"}]', "only one Dense is supported, after Pool"),
        ("1_Pooling/config.json", '{"pooling_mode": "lasttoken"}', "pools by lasttoken"),
        ("vocab.txt", "the\na\n", r"lacks \[UNK\], \[CLS\], \[SEP\]"),
        ("vocab.txt", "\n".join([*VOCABULARY, "more"]), "do not belong together"),
    ],
)
def test_a_folder_that_cannot_be_used_says_why(tmp_path, file, content, message):
    made = write_tiny_bert(tmp_path / "bert")
    (made / file).parent.mkdir(exist_ok=True)
    (made / file).write_text(content)
    with pytest.raises(InputError, match=message):
        TextEncoder.load(made, length=LENGTH)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"hidden_act": "swish"}, "the activation 'swish'"),
        ({"position_embedding_type": "relative_key"}, "has relative_key positions"),
    ],
)
def test_a_bert_that_keras_nlp_cannot_be_is_refused(tmp_path, setting, message):
    made = write_tiny_bert(tmp_path / "bert", **setting)
    with pytest.raises(InputError, match=message):
        TextEncoder.load(made, length=LENGTH)


# ---- a linear layer after the pooling


def with_dense(folder: Path, pooling: str = "mean_tokens", **config: object) -> Path:
    """A tiny BERT with a Dense module of 32 x 5, as sentence-transformers writes it."""
    made = write_tiny_bert(folder)
    kinds = ("Transformer", "Pooling", "Dense", "Normalize")
    modules = [
        {"type": f"sentence_transformers.models.{kind}", "path": f"{place}_{kind}"}
        for place, kind in enumerate(kinds)
    ]
    rng = np.random.default_rng(3)
    dense = {
        "linear.weight": rng.normal(size=(5, 32)).astype(np.float32),
        "linear.bias": rng.normal(size=5).astype(np.float32),
    }
    said = {
        "in_features": 32,
        "out_features": 5,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
        **config,
    }
    if not said["bias"]:
        del dense["linear.bias"]
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {f"pooling_mode_{pooling}": True},
        "2_Dense/config.json": said,
    }
    for name, content in files.items():
        (made / name).parent.mkdir(exist_ok=True)
        (made / name).write_text(json.dumps(content))
    save_file(dense, made / "2_Dense" / "model.safetensors")
    return made


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pooling", ["mean_tokens", "cls_token"])
def test_a_dense_module_is_applied_to_the_pooled_vector(tmp_path, pooling, bias):
    made = with_dense(tmp_path / "bert", pooling, bias=bias)
    dense = load_file(made / "2_Dense" / "model.safetensors")
    hidden = reference_hidden(made, IDS, 1e-12, gelu)
    pooled = hidden[0] if pooling == "cls_token" else hidden.mean(0)
    want = dense["linear.weight"] @ pooled + dense.get("linear.bias", 0)
    encoder = TextEncoder.load(made, length=LENGTH)
    np.testing.assert_allclose(encoder.encode([TEXT])[0], want / np.linalg.norm(want), atol=2e-6)
    assert encoder.width == 5
    assert encoder.encode_cached([TEXT], tmp_path / "cache").shape == (1, 5)
    assert encoder.hidden(*map(tf.constant, encoder.tokenize([TEXT]))).shape == (1, 8, 32)


def test_a_dense_module_trains_and_is_saved(tmp_path):
    encoder = TextEncoder.load(with_dense(tmp_path / "bert"), length=LENGTH)
    before = encoder.digest()
    kernel = named_variables(encoder)["projection.kernel"]
    assert id(kernel) in {id(v) for v in encoder.trainable_weights}
    old = kernel.numpy()
    fitted(encoder)
    assert (kernel.numpy() != old).all()
    assert encoder.digest() != before
    encoder.save(tmp_path / "saved")
    again = TextEncoder.load(tmp_path / "saved", length=LENGTH)
    np.testing.assert_array_equal(again.encode(SOME), encoder.encode(SOME))
    assert again.digest() == encoder.digest()
    modules = json.loads((tmp_path / "saved" / "modules.json").read_text())
    assert [m["path"] for m in modules] == ["", "1_Pooling", "2_Dense", "3_Normalize"]
    path = tf.train.Checkpoint(text=encoder).save(str(tmp_path / "checkpoint"))
    other = TextEncoder.load(tmp_path / "bert", length=LENGTH)
    tf.train.Checkpoint(text=other).restore(path).assert_consumed()
    assert other.digest() == encoder.digest()


def test_a_frozen_encoder_freezes_its_dense_module(tmp_path):
    encoder = TextEncoder.load(with_dense(tmp_path / "bert"), length=LENGTH, trainable=False)
    assert encoder.trainable_weights == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "torch.nn.modules.activation.Tanh"}, "has the activation Tanh"),
        ({"out_features": 6}, "does not hold the 32 x 6 weights"),
        ({"pooling": "max_tokens"}, "after mean and cls pooling, not max"),
    ],
)
def test_a_dense_module_that_cannot_be_used_says_why(tmp_path, change, message):
    made = with_dense(tmp_path / "bert", **change)
    with pytest.raises(InputError, match=message):
        TextEncoder.load(made, length=LENGTH)


def test_a_dense_module_without_its_weights_says_why(tmp_path):
    made = with_dense(tmp_path / "bert")
    (made / "2_Dense" / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        TextEncoder.load(made, length=LENGTH)


# ---- layers that lost heads


def without_head(folder: Path, layer: int, head: int, prefix: str = "") -> Path:
    """The tiny BERT in a folder without a head, in the form of Hugging Face."""
    weights = load_file(folder / "model.safetensors")
    name, gone = f"encoder.layer.{layer}.attention.", slice(head * 16, head * 16 + 16)
    for part in ("query", "key", "value"):
        for kind in ("weight", "bias"):
            inner = f"{name}self.{part}.{kind}"
            weights[inner] = np.delete(weights[inner], gone, axis=0)
    outer = f"{name}output.dense.weight"
    weights[outer] = np.ascontiguousarray(np.delete(weights[outer], gone, axis=1))
    save_file({prefix + k: v for k, v in weights.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["pruned_heads"] = {str(layer): [head]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_pruned_head_is_a_head_that_says_nothing(tmp_path, prefix):
    made = write_tiny_bert(tmp_path / "bert")
    weights = load_file(made / "model.safetensors")
    weights["encoder.layer.1.attention.output.dense.weight"][:, :16] = 0
    save_file(weights, made / "model.safetensors")
    want = TextEncoder.load(made, length=LENGTH).encode(SOME)
    encoder = TextEncoder.load(without_head(made, 1, 0, prefix), length=LENGTH)
    assert [heads_of(layer) for layer in encoder.model.transformer_layers] == [(2, 16), (1, 16)]
    np.testing.assert_allclose(encoder.encode(SOME), want, atol=2e-6)
    fitted(encoder)
    encoder.save(tmp_path / "saved")
    again = TextEncoder.load(tmp_path / "saved", length=LENGTH)
    np.testing.assert_array_equal(again.encode(SOME), encoder.encode(SOME))
    assert again.digest() == encoder.digest()
    path = tf.train.Checkpoint(text=encoder).save(str(tmp_path / "checkpoint"))
    other = TextEncoder.load(made, length=LENGTH)
    tf.train.Checkpoint(text=other).restore(path).assert_consumed()
    assert other.digest() == encoder.digest()


def test_the_weights_of_a_layer_that_lost_heads_have_its_name(tmp_path):
    made = write_tiny_bert(tmp_path / "bert")
    whole = set(named_variables(TextEncoder.load(made, length=LENGTH)))
    assert set(named_variables(TextEncoder.load(without_head(made, 0, 1), length=LENGTH))) == whole


def test_kernels_that_do_not_fit_the_pruned_heads_say_so(tmp_path):
    made = without_head(write_tiny_bert(tmp_path / "bert"), 1, 0)
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps({**config, "pruned_heads": {"0": [1]}}))
    with pytest.raises(InputError, match=r"layer.0.attention.self.query.weight' is \(32, 32\) and"):
        TextEncoder.load(made, length=LENGTH)


# ---- the cache of vectors


@pytest.fixture
def counted(encoder, monkeypatch) -> list[str]:
    seen: list[str] = []
    plain = encoder.encode

    def counting(texts, **arguments):
        seen.extend(texts)
        return plain(texts, **arguments)

    monkeypatch.setattr(encoder, "encode", counting)
    return seen


def test_texts_are_encoded_once_and_then_read_from_the_cache(encoder, counted, tmp_path):
    want = encoder.encode(SOME)
    counted.clear()
    np.testing.assert_allclose(encoder.encode_cached(SOME[:3], tmp_path), want[:3], atol=1e-6)
    np.testing.assert_allclose(encoder.encode_cached(SOME, tmp_path), want, atol=1e-6)
    np.testing.assert_allclose(encoder.encode_cached(SOME[::-1], tmp_path), want[::-1], atol=1e-6)
    assert [sorted(counted[:3]), sorted(counted[3:])] == [sorted(SOME[:3]), sorted(SOME[3:5])]


def test_the_cache_knows_one_encoder_from_another(encoder, counted, folder, tmp_path):
    encoder.encode_cached(SOME, tmp_path)
    shorter = TextEncoder.load(folder, length=4)
    np.testing.assert_array_equal(shorter.encode_cached(SOME, tmp_path), shorter.encode(SOME))
    nudged(encoder)
    counted.clear()
    np.testing.assert_array_equal(encoder.encode_cached(SOME, tmp_path), encoder.encode(SOME))
    assert sorted(counted[:5]) == sorted(SOME[:5])


def test_after_an_interrupt_only_the_texts_that_were_not_reached_are_encoded(
    encoder, counted, tmp_path, monkeypatch
):
    monkeypatch.setattr(text_module, "_KEPT", 2)
    texts = ["the film " * n for n in range(1, 8)]
    plain = encoder.encode

    def interrupted(block, **arguments):
        if len(counted) == 4:
            raise KeyboardInterrupt
        return plain(block, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoder, "encode", interrupted)
        with pytest.raises(KeyboardInterrupt):
            encoder.encode_cached(texts, tmp_path)
    assert sorted(counted) == texts[3:]
    counted.clear()
    found = encoder.encode_cached(texts, tmp_path)
    assert sorted(counted) == texts[:3]
    np.testing.assert_allclose(found, encoder.encode(texts), atol=1e-6)


def test_a_catalog_larger_than_what_is_tokenised_at_once_keeps_its_order(encoder, monkeypatch):
    texts = [("film " * (n % 5 + 1) + str(n)) for n in range(20)]
    want = encoder.encode(texts)
    monkeypatch.setattr(text_module, "_WINDOW", 3)
    np.testing.assert_allclose(encoder.encode(texts), want, atol=1e-6)


def test_the_layers_that_see_all_tokens_at_once_give_the_numbers_of_keras_hub(folder):
    ours = TextEncoder.load(folder, length=LENGTH).model
    theirs = keras_hub.models.BertBackbone.from_preset(str(folder))
    for layer in theirs.transformer_layers:
        layer._feedforward_intermediate_dense.activation = keras3.activations.gelu
    ids = np.random.default_rng(0).integers(5, len(VOCABULARY), (3, 7))
    feed = {"token_ids": ids, "segment_ids": ids * 0, "padding_mask": ids > 20}
    got, want = (model(feed)["sequence_output"].numpy() for model in (ours, theirs))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_a_damaged_cache_file_is_ignored(encoder, counted, tmp_path):
    want = encoder.encode_cached(SOME, tmp_path)
    (file,) = tmp_path.rglob("*.npy")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    counted.clear()
    np.testing.assert_array_equal(encoder.encode_cached(SOME, tmp_path), want)
    assert sorted(counted) == sorted(SOME[:5])
    assert not [f for f in tmp_path.rglob("*") if "partial" in f.name]


def test_a_cache_that_cannot_be_written_is_a_setup_error(encoder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match=r"the text cache .* cannot be written"):
        encoder.encode_cached(SOME, tmp_path / "file")


def test_the_encoders_of_a_folder_are_found_by_its_name_alone(folder, monkeypatch, tmp_path):
    monkeypatch.setenv("TFREC_CACHE", str(tmp_path))
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "someone--tiny").symlink_to(folder)
    assert TextEncoder.load("someone/tiny", length=LENGTH).width == 32
    assert weights.find("hf://someone/tiny") == tmp_path / "weights" / "someone--tiny"
