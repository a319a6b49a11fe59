"""StoredInt8: the same vectors from a quarter of the bytes, whatever was trained into the BERT."""

import numpy as np
import pytest
from tiny_bert import WIDTH, write_tiny_bert

from tfrec.config import TuningConfig
from tfrec.golden import cosines
from tfrec.models.keras_bridge import tf
from tfrec.models.stored_int8 import StoredInt8
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import tune_text

TEXTS = ["the war of space ship", "love", "", "story of film (1999).", "the film " * 20]


@pytest.fixture
def encoder(tmp_path):
    return TextEncoder.load(write_tiny_bert(tmp_path / "tiny"), length=32)


def vectors(encoder):
    tokens, mask = encoder.tokenize(TEXTS)
    return StoredInt8(encoder)(tf.constant(tokens), tf.constant(mask)).numpy()


def test_the_vectors_are_near(encoder):
    found = vectors(encoder)
    assert cosines(encoder.encode(TEXTS), found)["cosine_min"] > 0.999
    assert np.abs(found - encoder.encode(TEXTS)).max() > 1e-6


def test_the_encoder_keeps_its_weights(encoder):
    before = encoder.digest()
    vectors(encoder)
    assert encoder.digest() == before


def test_a_kernel_has_a_step_for_each_output(encoder):
    """The outputs of attention's kernels are heads times their size, or the width."""
    stored = StoredInt8(encoder)
    shapes = {kernel.path.partition("layer_0/")[2]: s.shape for kernel, _, s in stored._kernels}
    assert shapes["self_attention_layer/query/kernel"] == (1, 2, WIDTH // 2)
    assert shapes["self_attention_layer/attention_output/kernel"] == (1, 1, WIDTH)
    assert shapes["feedforward_output_dense/kernel"] == (1, WIDTH)
    for kernel, codes, scales in stored._kernels:
        assert codes.dtype == tf.int8
        error = np.abs(codes.numpy() * scales.numpy() - kernel.numpy())
        assert (error <= 0.501 * scales.numpy()).all()
        assert np.abs(codes.numpy()).max() == 127


def test_no_kernel_is_captured_in_float32(encoder):
    stored = StoredInt8(encoder)
    spec = [tf.TensorSpec([None, None], tf.int32)] * 2
    graph = tf.function(stored, input_signature=spec, autograph=False).get_concrete_function().graph
    captured = {id(outer) for outer, _ in graph.captures}
    assert all(id(variable.handle) in captured for variable in stored.variables)
    replaced = [kernel.value for kernel, *_ in stored._kernels] + [stored._table.value]
    assert not [variable.name for variable in replaced if id(variable.handle) in captured]
    constants = [op for op in graph.get_operations() if op.type == "Const"]
    assert all(np.prod(op.outputs[0].shape.as_list()) < WIDTH * WIDTH for op in constants)


@pytest.mark.parametrize("method", ["lora", "adapter", "prompt"])
def test_what_was_tuned_into_the_bert_is_there(encoder, method):
    plain = vectors(encoder)
    tune_text(encoder, TuningConfig(text=method))
    rng = np.random.default_rng(0)
    for variable in encoder.trainable_variables:
        variable.assign_add(rng.normal(0, 0.3, variable.shape).astype(np.float32))
    encoder.retrace()
    tuned = encoder.encode(TEXTS)
    assert cosines(plain, tuned)["cosine_min"] < 0.9995
    assert cosines(tuned, vectors(encoder))["cosine_min"] > 0.999
