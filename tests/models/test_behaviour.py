"""The transformer over packed sequences: who sees whom, and beside a plain numpy one."""

import math

import numpy as np
import pytest

from tfrec.models.behaviour import BehaviourEncoder, attention_mask
from tfrec.models.keras_bridge import set_precision, set_seed, tf

SEGMENT = np.array([[1, 1, 1, 2, 2, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.int32)
WIDTH, LENGTH = 8, 8


@pytest.fixture
def inputs():
    return np.random.default_rng(0).normal(size=(2, LENGTH, WIDTH)).astype(np.float32)


def encoder(seed=1, **settings):
    set_seed(seed)
    settings = {"layers": 2, "heads": 2, "dropout": 0.3, **settings}
    layer = BehaviourEncoder(WIDTH, LENGTH, **settings)
    layer(tf.zeros([1, LENGTH, WIDTH]), tf.ones([1, LENGTH], tf.int32))
    rng = np.random.default_rng(seed)
    for weight in layer.trainable_weights:  # biases and norms too, which start as nothing
        weight.assign_add(rng.normal(size=weight.shape, scale=0.2).astype(np.float32))
    return layer


def test_a_place_sees_itself_and_earlier_places_of_its_segment():
    mask = attention_mask(tf.constant([[1, 1, 2, 2, 0]]), causal=True)[0].numpy().astype(int)
    assert mask.tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 0, 0, 1],
    ]


def test_without_causality_a_place_sees_its_whole_segment():
    mask = attention_mask(tf.constant([[1, 1, 2]]), causal=False)[0].numpy().astype(int)
    assert mask.tolist() == [[1, 1, 0], [1, 1, 0], [0, 0, 1]]


def test_another_segment_changes_nothing(inputs):
    layer = encoder()
    before = layer(inputs, SEGMENT).numpy()
    changed = inputs.copy()
    changed[0, :3] = changed[1, :3]
    changed[0, 5:] = changed[1, 5:]
    after = layer(changed, SEGMENT).numpy()
    np.testing.assert_allclose(after[0, 3:5], before[0, 3:5], atol=1e-6)
    assert np.abs(after[0, :3] - before[0, :3]).max() > 1e-2


def test_a_later_place_changes_nothing_before_it(inputs):
    layer = encoder()
    before = layer(inputs, SEGMENT).numpy()
    changed = inputs.copy()
    changed[1, 5, :4] += 1
    after = layer(changed, SEGMENT).numpy()
    np.testing.assert_allclose(after[1, :5], before[1, :5], atol=1e-6)
    assert (np.abs(after[1, 5:] - before[1, 5:]).max(axis=1) > 1e-4).all()


def test_without_causality_a_later_place_does_matter(inputs):
    layer = encoder()
    changed = inputs.copy()
    changed[1, 5, :4] += 1
    difference = np.abs(
        layer(changed, SEGMENT, causal=False) - layer(inputs, SEGMENT, causal=False)
    )
    assert (difference[1].max(axis=1) > 1e-4).all()


def test_a_segment_is_encoded_the_same_wherever_it_stands(inputs):
    layer = encoder()
    alone = np.zeros_like(inputs)
    alone[0, :2] = inputs[0, 3:5]
    segment = np.array([[1, 1, 0, 0, 0, 0, 0, 0]] * 2, np.int32)
    packed, moved = layer(inputs, SEGMENT).numpy(), layer(alone, segment).numpy()
    np.testing.assert_allclose(packed[0, 3:5], moved[0, :2], atol=1e-5)


def test_a_row_of_a_batch_is_the_row_alone(inputs):
    layer = encoder()
    together = layer(inputs, SEGMENT).numpy()
    for row in range(2):
        alone = layer(inputs[row : row + 1], SEGMENT[row : row + 1]).numpy()
        np.testing.assert_allclose(together[row], alone[0], atol=1e-6)


@pytest.mark.parametrize("layers", [1, 2])
def test_a_place_that_is_asked_for_alone_is_the_same(inputs, layers):
    layer = encoder(layers=layers)
    last = np.array([2, 4], np.int32)
    whole = layer(inputs, SEGMENT).numpy()
    alone = layer(inputs, SEGMENT, last=tf.constant(last)).numpy()
    assert alone.shape == (2, 1, WIDTH)
    np.testing.assert_allclose(alone[:, 0], whole[np.arange(2), last], atol=1e-6)


def test_it_equals_a_plain_numpy_transformer(inputs):
    layer = encoder()
    mask = attention_mask(tf.constant(SEGMENT), causal=True).numpy()
    expected = numpy_encoder(layer, inputs.astype(np.float64), mask)
    np.testing.assert_allclose(layer(inputs, SEGMENT), expected, atol=2e-5)


def numpy_encoder(layer, hidden, mask):
    for block in layer.blocks:
        hidden = hidden + numpy_attention(block, numpy_norm(block.attention_norm, hidden), mask)
        fed = numpy_dense(block.expand, numpy_norm(block.feed_norm, hidden))
        inner = math.sqrt(2 / math.pi) * (fed + 0.044715 * fed**3)
        hidden = hidden + numpy_dense(block.contract, 0.5 * fed * (1 + np.tanh(inner)))
    return numpy_norm(layer.norm, hidden)


def numpy_attention(block, inputs, mask):
    batch, length, width = inputs.shape
    query, key, value = np.split(numpy_dense(block.qkv, inputs), 3, axis=-1)
    size, out = width // block.heads, np.zeros_like(inputs)
    bias = block.bias.numpy()
    for row in range(batch):
        for head in range(block.heads):
            part = slice(head * size, (head + 1) * size)
            for place in range(length):
                seen = np.flatnonzero(mask[row, place])
                scores = key[row, seen, part] @ query[row, place, part] / math.sqrt(size)
                scores = np.exp(scores + bias[head, np.abs(place - seen)])
                out[row, place, part] = scores @ value[row, seen, part] / scores.sum()
    return numpy_dense(block.project, out)


def numpy_dense(layer, inputs):
    return inputs @ layer.kernel.numpy() + layer.bias.numpy()


def numpy_norm(layer, inputs):
    centred = inputs - inputs.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(inputs.var(axis=-1, keepdims=True) + 1e-6)
    return scaled * layer.gamma.numpy() + layer.beta.numpy()


def test_compiled_equals_plain(inputs):
    layer = encoder()
    compiled = tf.function(lambda x, s: layer(x, s), jit_compile=True)
    np.testing.assert_allclose(
        compiled(inputs, SEGMENT), layer(tf.constant(inputs), SEGMENT), atol=1e-5
    )


@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_half_precision_is_near_and_finite_even_where_all_is_padding(inputs, dtype):
    segment = SEGMENT.copy()
    segment[0] = 0
    exact = encoder()(inputs, segment).numpy()
    set_precision(dtype)
    try:
        found = encoder()(inputs, segment)
    finally:
        set_precision("float32")
    assert found.dtype == (tf.bfloat16 if "bf" in dtype else tf.float16)
    tolerance = 0.1 if "bf" in dtype else 0.02
    np.testing.assert_allclose(tf.cast(found, tf.float32), exact, atol=tolerance)


def test_every_weight_gets_a_gradient(inputs):
    layer = encoder()
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(layer(inputs, SEGMENT) ** 3)
    for weight, slope in zip(
        layer.trainable_weights, tape.gradient(loss, layer.trainable_weights), strict=True
    ):
        assert np.abs(tf.convert_to_tensor(slope)).max() > 0, weight.name


def test_heads_that_do_not_divide_the_width_are_refused():
    with pytest.raises(ValueError, match=r"heads = 3 must divide the width 8"):
        BehaviourEncoder(8, 4, heads=3)


def test_config_round_trip():
    settings = {
        "width": 8,
        "length": 6,
        "layers": 1,
        "heads": 4,
        "dropout": 0.1,
        "feed_forward": 2,
    }
    config = BehaviourEncoder(**settings, name="b").get_config()
    again = BehaviourEncoder.from_config(config)
    assert again.get_config() == config
    assert settings.items() <= config.items()
    again(tf.zeros([1, 6, 8]), tf.ones([1, 6], tf.int32))
    assert again.blocks[0].expand.kernel.shape == (8, 16)
