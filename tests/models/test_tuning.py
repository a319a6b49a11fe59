"""Tuning: the start is the base, only what is meant moves, and lora folds back into the kernels."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tuned_two_tower as small
from tiny_bert import INNER, WIDTH, write_tiny_bert

from tfrec.config import TuningConfig
from tfrec.errors import ConfigError
from tfrec.models.behaviour import BehaviourEncoder
from tfrec.models.keras_bridge import Hosted, keras_hub, set_seed, tf, tf_keras
from tfrec.models.named import named_variables
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import (
    Rate,
    behaviour_rate,
    count,
    difference,
    merge,
    text_rate,
    tune,
    tune_behaviour,
    tune_text,
)

METHODS = ("head", "full", "lora", "adapter", "prompt", "bitfit")
TESTS = Path(__file__).parent.parent
IDS = np.array([[2, 5, 6, 7, 3, 0], [2, 8, 3, 0, 0, 0]], np.int32)
MASK = (IDS > 0).astype(np.int32)
SEGMENT = np.array([[1, 1, 1, 2, 2, 0, 0, 0]], np.int32)
INPUTS = np.random.default_rng(0).normal(size=(1, 8, 8)).astype(np.float32)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Two layers; without dropout."""
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "tiny", hidden_dropout_prob=0.0)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory):
    """The same BERT, which drops out a third."""
    return write_tiny_bert(tmp_path_factory.mktemp("bert") / "tiny", hidden_dropout_prob=0.3)


def text(folder, **settings):
    set_seed(1)
    encoder = TextEncoder.load(folder, length=16)
    return encoder, tune_text(encoder, TuningConfig(**settings))


def behaviour(layers=2, **settings):
    """A behaviour encoder whose every weight is something, and its tuned twin."""
    made = []
    for _ in range(2):
        set_seed(1)
        layer = BehaviourEncoder(8, 8, layers=layers, heads=2, dropout=0.0, name="encoder")
        layer(INPUTS, SEGMENT)
        rng = np.random.default_rng(1)
        for weight in layer.trainable_weights:
            weight.assign_add(rng.normal(size=weight.shape, scale=0.2).astype(np.float32))
        made.append(layer)
    tune_behaviour(made[1], TuningConfig(**settings))
    return made


def trained_names(layer):
    """Names of what is trained; each must be a weight of its own."""
    names = list(difference(layer))
    assert len(names) == len(layer.trainable_variables)
    return names


def nudge(layer, seed=3):
    """Moves every weight that is trained, as a training would."""
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_variables:
        weight.assign_add(rng.normal(size=weight.shape, scale=0.1).astype(np.float32))


# --- the BERT ---


@pytest.mark.parametrize("method", METHODS)
def test_the_tuned_bert_starts_as_its_base(bert, method):
    base = TextEncoder.load(bert, length=16)
    encoder, _ = text(bert, text=method)
    np.testing.assert_allclose(encoder(IDS, MASK), base(IDS, MASK), atol=1e-6)


def test_what_a_method_adds_counts_once_training_moves_it(bert):
    base = TextEncoder.load(bert, length=16)(IDS, MASK).numpy()
    for method in METHODS[1:]:
        encoder, _ = text(bert, text=method)
        nudge(encoder)
        assert np.abs(encoder(IDS, MASK) - base).max() > 1e-3, method


def test_an_encoder_that_has_encoded_before_sees_what_was_added(bert):
    encoder = TextEncoder.load(bert, length=16)
    before = encoder.encode(["the war film"])
    tune_text(encoder, TuningConfig(text="prompt"))
    np.testing.assert_allclose(encoder.encode(["the war film"]), before, atol=1e-6)
    nudge(encoder)
    assert np.abs(encoder.encode(["the war film"]) - before).max() > 1e-3


ADDED = {
    "lora": r"(query|value)/lora_kernel_[ab]$",
    "adapter": r"_(self_attention|feedforward)_adapter/(down|up)/(kernel|bias)$",
    "prompt": r"_prefix/(keys|values)$",
    "bitfit": r"/(bias|beta)$",
}


@pytest.mark.parametrize("method", ADDED)
def test_only_the_weights_of_a_method_are_trained(bert, method):
    encoder, depths = text(bert, text=method)
    names = trained_names(encoder)
    assert names
    assert all(re.search(ADDED[method], name) for name in names)
    assert set(depths) == {id(v) for v in encoder.trainable_variables}
    everything = [n for n in named_variables(encoder) if "pooled_dense" not in n]
    assert [n for n in everything if re.search(ADDED[method], n)] == names


def test_full_trains_all_but_the_pooler_and_head_nothing(bert):
    encoder, _ = text(bert, text="full")
    left = set(named_variables(encoder)) - set(trained_names(encoder))
    assert left == {"pooled_dense/kernel", "pooled_dense/bias"}
    encoder, depths = text(bert, text="head")
    assert (encoder.trainable_variables, depths) == ([], {})


def test_the_numbers_of_new_weights_are_those_of_the_formulas(bert):
    heads, size = 2, WIDTH // 2
    expected = {
        "lora": 2 * 2 * (WIDTH * heads * 3 + 3 * size),
        "adapter": 2 * 2 * (2 * WIDTH * 5 + 5 + WIDTH),
        "prompt": 2 * 2 * 7 * WIDTH,
        "bitfit": 2 * (6 * WIDTH + INNER + 2 * WIDTH - WIDTH) + WIDTH,
    }
    for method, number in expected.items():
        encoder, _ = text(bert, text=method, rank=3, bottleneck=5, prompts=7)
        assert count(encoder.trainable_variables) == number, method


def test_the_page_on_tuning_tells_the_numbers_of_minilm():
    page = (TESTS.parent / "docs" / "tuning.md").read_text("utf-8")
    for method in ADDED:
        backbone = keras_hub.models.BertBackbone(
            vocabulary_size=9,
            num_layers=6,
            num_heads=12,
            hidden_dim=384,
            intermediate_dim=1536,
            max_sequence_length=16,
        )
        hosted = Hosted(backbone)
        hosted.retrace = lambda: None
        hosted.projection = None
        tune_text(hosted, TuningConfig(text=method))
        row = next(line for line in page.splitlines() if line.startswith(f"| `{method}`"))
        assert f"| {count(hosted.trainable_variables):,} |" in row


@pytest.mark.parametrize("method", ["full", "lora", "adapter", "prompt", "bitfit"])
@pytest.mark.parametrize("layers", [[-1], [1]])
def test_chosen_layers_alone_are_trained(bert, method, layers):
    encoder, _ = text(bert, text=method, layers=layers)
    assert all(name.startswith("transformer_layer_1") for name in trained_names(encoder))
    assert trained_names(encoder)


@pytest.mark.parametrize("layer", [2, -3])
def test_a_layer_that_is_not_there_is_named(bert, layer):
    with pytest.raises(ConfigError, match=rf"layers names layer {layer}, and this BERT has 2: 0"):
        text(bert, text="lora", layers=[0, layer])
    with pytest.raises(ConfigError, match=rf"behaviour_layers names layer {layer}, and this beh"):
        behaviour(behaviour="lora", behaviour_layers=[layer])


def test_padding_changes_nothing_under_prompts(bert):
    encoder, _ = text(bert, text="prompt")
    nudge(encoder)
    wide = encoder(np.pad(IDS, ((0, 0), (0, 9))), np.pad(MASK, ((0, 0), (0, 9))))
    np.testing.assert_allclose(encoder(IDS, MASK), wide, atol=1e-5)
    np.testing.assert_allclose(encoder(IDS[:1], MASK[:1]), encoder(IDS, MASK)[:1], atol=1e-5)


def test_a_prompt_adds_attention_over_its_own_keys_and_values(bert):
    encoder, _ = text(bert, text="prompt", prompts=3)
    nudge(encoder)
    prefix = encoder.model.transformer_layers[0]._self_attention_layer._prefix
    query = np.random.default_rng(0).normal(size=(1, 2, 2, 16)).astype(np.float32)
    scores = np.einsum("blhd,phd->bhlp", query, prefix.keys.numpy()) / 4
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    expected = np.einsum("bhlp,phd->blhd", weights, prefix.values.numpy())
    np.testing.assert_allclose(prefix(query), expected, atol=1e-5)


# --- activation checkpointing ---


def gradients(encoder, jit):
    def step():
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.square(encoder(IDS, MASK, training=True)[:, :3]))
        return loss, tape.gradient(loss, encoder.trainable_variables)

    compiled = tf.function(step, jit_compile=jit)
    loss, found = compiled()
    operations = compiled.get_concrete_function().graph.get_operations()
    softmaxes = sum(one.type == "Softmax" for one in operations)
    return float(loss), [tf.convert_to_tensor(g).numpy() for g in found], softmaxes


@pytest.mark.parametrize(("method", "jit"), [("full", False), ("lora", True)])
def test_recomputed_layers_drop_out_the_same_and_give_the_same_gradients(dropping, method, jit):
    plain, expected, once = gradients(text(dropping, text=method)[0], jit)
    loss, found, twice = gradients(text(dropping, text=method, recompute=True)[0], jit)
    assert loss == pytest.approx(plain, rel=1e-6)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert (once, twice) == (2, 4)  # one attention a layer, and another in the second run


def test_the_next_step_drops_out_other_things(dropping):
    encoder, _ = text(dropping, text="lora", recompute=True)
    step = tf.function(lambda: encoder(IDS, MASK, training=True))
    assert np.abs(step().numpy() - step().numpy()).max() > 1e-3


# --- behaviour encoders ---


@pytest.mark.parametrize("method", METHODS)
def test_the_tuned_behaviour_encoder_starts_as_its_base(method):
    base, tuned = behaviour(behaviour=method)
    np.testing.assert_allclose(tuned(INPUTS, SEGMENT), base(INPUTS, SEGMENT), atol=1e-6)
    if method == "head":
        assert tuned.trainable_variables == []
        return
    nudge(tuned)
    assert np.abs(tuned(INPUTS, SEGMENT) - base(INPUTS, SEGMENT)).max() > 1e-3


BLOCK = {
    "lora": ["project.a", "project.b", "qkv.a", "qkv.b"],
    "adapter": [
        f"{layer}_adapter.{part}.{weight}"
        for layer in ("attention", "feed")
        for part in ("down", "up")
        for weight in ("bias", "kernel")
    ],
    "prompt": ["prefix.keys", "prefix.values"],
    "bitfit": [
        f"{layer}.{'beta' if 'norm' in layer else 'bias'}"
        for layer in ("attention_norm", "contract", "expand", "feed_norm", "project", "qkv")
    ],
}


@pytest.mark.parametrize("method", BLOCK)
def test_only_the_weights_of_a_method_are_trained_in_a_block(method):
    _, tuned = behaviour(behaviour=method, behaviour_layers=[-1])
    names = [n for n in trained_names(tuned) if n != "norm.beta"]
    assert sorted(names) == [f"blocks.1.{name}" for name in BLOCK[method]]
    assert ("norm.beta" in trained_names(tuned)) == (method == "bitfit")


def test_the_top_block_alone():
    _, tuned = behaviour(behaviour="full", behaviour_layers=[-1])
    assert {name.split(".")[0] for name in trained_names(tuned)} == {"blocks", "norm"}
    assert not any(name.startswith("blocks.0") for name in trained_names(tuned))


NEW = re.compile(r"\.(a|b|keys|values)$|_adapter\.")


def test_what_is_new_in_a_two_tower_is_always_trained(bert):
    for method in METHODS:
        tuning = TuningConfig(text="head", behaviour=method)
        model, tuned = small.make(bert, small.settings(), tuning)
        names = trained_names(model)
        assert "candidate_tower.ids" in names
        old = [n for n in set(small.pretrained(model)) & set(names) if not NEW.search(n)]
        assert bool(old) == (method in ("full", "bitfit")), method
        new = [n for n in names if NEW.search(n)]
        assert bool(new) == (method in ("lora", "adapter", "prompt")), method
        assert len(tuned.rates(model.trainable_variables)) == len(names)


# --- rates ---


def rates_of(bert, **settings):
    model, tuned = small.make(bert, small.settings(layers=2), TuningConfig(**settings))
    names = {id(v): n for n, v in named_variables(model).items()}
    rates = tuned.rates(model.trainable_variables)
    return {names[id(v)]: rate for v, rate in zip(model.trainable_variables, rates, strict=True)}


def test_lower_layers_learn_more_slowly_and_later(bert):
    found = rates_of(bert, text="full", text_rate=0.1, layer_decay=0.5, unfreeze_epochs=3)
    query = "self_attention_layer/query/kernel"
    assert found[f"encoder.transformer_layer_1/{query}"] == pytest.approx(Rate(0.1, 0))
    assert found[f"encoder.transformer_layer_0/{query}"] == pytest.approx(Rate(0.05, 3))
    assert found["encoder.token_embedding/embeddings"] == pytest.approx(Rate(0.025, 6))
    blocks = "query_tower.encoder.blocks"
    assert found[f"{blocks}.1.qkv.kernel"] == found["query_tower.encoder.norm.gamma"] == Rate(1, 0)
    assert found[f"{blocks}.0.qkv.kernel"] == Rate(0.5, 3)
    assert found["query_tower.tables.position"] == Rate(0.25, 6)
    assert found["candidate_tower.ids"] == Rate(1, 0)


def test_towers_whose_ids_were_pretrained_learn_slowly_unless_told_otherwise():
    ids, others = ("candidate_tower.ids", "query_tower.x"), ("query_tower.x",)
    assert behaviour_rate(TuningConfig(), ids) == 0.15
    assert behaviour_rate(TuningConfig(), others) == 1
    assert behaviour_rate(TuningConfig(behaviour_rate=0.5), ids) == 0.5
    assert behaviour_rate(TuningConfig(behaviour="lora"), ids) == 1


def test_new_weights_of_a_method_follow_their_layer(bert):
    found = rates_of(bert, text="lora", behaviour="adapter", layer_decay=0.5, unfreeze_epochs=1)
    place = "self_attention_layer/query/lora_kernel_b"
    assert found[f"encoder.transformer_layer_0/{place}"] == pytest.approx(Rate(0.125, 1))
    assert found["query_tower.encoder.blocks.0.feed_adapter.up.kernel"] == Rate(0.5, 1)


def test_a_bert_trained_whole_learns_ten_times_more_slowly_unless_told_otherwise():
    default = {method: text_rate(TuningConfig(text=method)) for method in METHODS[1:]}
    assert default == {**dict.fromkeys(METHODS[2:], 0.25), "full": 0.025}
    assert text_rate(TuningConfig(text="full", text_rate=0.5)) == 0.5


# --- merging ---


def test_lora_folds_into_a_plain_bert(bert, tmp_path):
    encoder, _ = text(bert, text="lora")
    nudge(encoder)
    expected = encoder(IDS, MASK).numpy()
    texts = encoder.encode(["the war film", "a love story"])
    merge(encoder)
    plain = TextEncoder.load(bert, length=16)
    assert list(named_variables(encoder)) == list(named_variables(plain))
    np.testing.assert_allclose(encoder(IDS, MASK), expected, atol=1e-6)
    encoder.save(tmp_path / "plain")
    again = TextEncoder.load(tmp_path / "plain", length=16).encode(["the war film", "a love story"])
    np.testing.assert_allclose(again, texts, atol=1e-6)


def test_lora_folds_into_a_plain_behaviour_encoder():
    base, tuned = behaviour(behaviour="lora")
    nudge(tuned)
    expected = tuned(INPUTS, SEGMENT).numpy()
    merge(tuned)
    assert set(named_variables(tuned)) == set(named_variables(base))
    np.testing.assert_allclose(tuned(INPUTS, SEGMENT), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["adapter", "prompt", "bitfit", "full"])
def test_merging_leaves_what_cannot_be_folded(bert, method):
    encoder, _ = text(bert, text=method)
    nudge(encoder)
    expected, names = encoder(IDS, MASK).numpy(), list(named_variables(encoder))
    merge(encoder)
    np.testing.assert_array_equal(encoder(IDS, MASK), expected)
    assert list(named_variables(encoder)) == names


# --- in training ---

PAIRS = {
    "lora": {"text": "lora", "behaviour": "adapter", "unfreeze_epochs": 1},
    "adapter": {"text": "adapter", "behaviour": "prompt", "recompute": True},
    "prompt": {"text": "prompt", "behaviour": "lora", "layer_decay": 0.5, "unfreeze_epochs": 1},
}


def moved(before, after):
    return {n for n in before if not np.array_equal(before[n], after[n])}


class Interrupt(tf_keras.callbacks.Callback):
    """Stops a training in the middle of its second epoch, as a kill would."""

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        if self.epoch == 1 and batch == 1:
            raise InterruptedError


def moves_what_it_should(start, after, allowed):
    # A key's bias adds the same to all scores of a softmax: its gradient is next to nothing.
    return {n for n in allowed if "key/bias" not in n} <= moved(start, after) <= allowed


def test_training_moves_what_is_tuned_and_nothing_else_and_goes_on_after_a_kill(dropping, tmp_path):
    tuning = TuningConfig(**PAIRS["lora"])
    config = small.settings(accumulate=2, ema=0.8, jit_compile=False, dropout=0.2)
    start = small.values(small.make(dropping, config, tuning)[0])
    model, whole = small.train(dropping, tmp_path / "whole", config, tuning)
    after = small.values(model)
    assert moves_what_it_should(start, after, set(difference(model)))

    with pytest.raises(InterruptedError):
        small.train(dropping, tmp_path / "cut", config, tuning, callbacks=[Interrupt()])
    resumed, state = small.train(dropping, tmp_path / "cut", config, tuning)
    assert [r["loss"] for r in state.history] == [r["loss"] for r in whole.history]
    assert moved(after, small.values(resumed)) == set()


@pytest.mark.parametrize("pair", PAIRS)
def test_checkpoints_hold_what_was_added(bert, tmp_path, pair):
    model, other = (
        small.make(bert, small.settings(), TuningConfig(**PAIRS[pair]), seed)[0] for seed in (3, 4)
    )
    nudge(model)
    assert moved(small.values(model), small.values(other)) >= set(difference(model))
    path = tf.train.Checkpoint(model=model).write(str(tmp_path / "all"))
    tf.train.Checkpoint(model=other).read(path).assert_existing_objects_matched()
    assert moved(small.values(model), small.values(other)) == set()


def test_the_compiled_step_in_half_precision_trains_nearly_as_the_plain_one(bert, tmp_path):
    tuning = TuningConfig(text="adapter", behaviour="lora", recompute=True, unfreeze_epochs=1)
    losses = []
    for precision, jit in (("float32", False), ("mixed_bfloat16", True)):
        config = small.settings(precision=precision, jit_compile=jit, accumulate=2)
        model, state = small.train(bert, tmp_path / precision, config, tuning)
        losses.append([r["loss"] for r in state.history])
        assert {v.dtype for v in model.trainable_variables} == {tf.float32}
        assert model.encoder.model.compute_dtype == precision.removeprefix("mixed_")
        assert losses[-1][-1] < losses[-1][0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0.05)


def test_on_two_devices_as_on_one(bert, tmp_path):
    pairs = {name: PAIRS[name] for name in ("prompt", "adapter")}
    told = {"bert": str(bert), "out": str(tmp_path), "tunings": pairs}
    path = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    done = subprocess.run(
        [sys.executable, str(TESTS / "tuned_two_tower.py"), json.dumps(told)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    for pair in pairs:
        one, two = (found[f"{pair}-{where}"] for where in ("one_device", "mirrored"))
        assert (one["replicas"], two["replicas"]) == (1, 2)
        np.testing.assert_allclose(two["losses"], one["losses"], atol=1e-4)
        assert moves_what_it_should(two["start"], two["weights"], set(two["trained"]))
        for name, weights in one["weights"].items():
            # Adam makes much of a gradient that is next to nothing.
            np.testing.assert_allclose(two["weights"][name], weights, atol=2e-3, err_msg=name)


def test_tuning_an_untouched_two_tower_leaves_the_rates_at_one(bert):
    model, _ = small.make(bert, small.settings(), TuningConfig(text="head"))
    tuned = tune(model, TuningConfig(text="head"))
    assert set(tuned.rates(model.trainable_variables)) == {Rate()}
