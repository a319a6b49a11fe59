"""Pruning by TF-MOT: how much, where, when; under XLA, on replicas, and after a kill."""

import subprocess
import sys

import numpy as np
import pytest
from tiny_bert import write_tiny_bert

from tfrec.errors import ConfigError
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.named import kernels
from tfrec.models.pruning import Pruner, Sparsity, zeros_of
from tfrec.models.text import TextEncoder

STEPS = 40


class Small(tf_keras.Model):
    """Two matrix products and one of heads, beside what is never pruned."""

    def __init__(self):
        super().__init__()
        self.wide = tf_keras.layers.Dense(64, name="wide")
        self.narrow = tf_keras.layers.Dense(4, name="narrow")
        self.norm = tf_keras.layers.LayerNormalization(name="norm")
        self.table = tf.Variable(tf.random.normal([64, 64]), name="table")
        self.narrow(self.wide(self.norm(tf.zeros([1, 64]))))


def trained(sparsity, variables, jit=False, steps=STEPS, each=lambda: None):
    """Adam on random gradients, pruned; ``each`` is called after every step."""
    pruner = Pruner(variables, sparsity, STEPS)
    optimizer = tf_keras.optimizers.Adam(1e-3)
    values = list(variables.values())
    optimizer.build(values)

    @tf.function(jit_compile=jit)
    def step():
        gradients = [tf.random.stateless_normal(v.shape, [1, 2]) for v in values]
        optimizer.apply_gradients(zip(gradients, values, strict=True))
        return pruner(tf.constant(1.0))

    for _ in range(steps):
        step()
        each()
    return pruner


def zeros(variable):
    return float(np.mean(variable.numpy() == 0))


def test_kernels_are_matrix_products_of_some_size():
    assert set(kernels(Small())) == {"wide.kernel"}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return TextEncoder.load(write_tiny_bert(tmp_path_factory.mktemp("bert")), length=16)


def test_those_of_a_bert_are_its_layers_and_not_its_tables(bert):
    found = kernels(bert)
    assert len(found) == 2 * 6
    assert not [name for name in found if "embedding" in name or "pooled" in name]


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_polynomial_rises_to_the_share_and_stays(share, jit):
    kernel, seen = Small().wide.kernel, []
    trained(Sparsity(share), {"k": kernel}, jit, each=lambda: seen.append(zeros(kernel)))
    assert seen[0] < share / 4
    assert seen == sorted(seen)
    np.testing.assert_allclose(seen[int(0.7 * STEPS) :], share, atol=0.01)


def test_constant_is_there_from_the_start():
    kernel, seen = Small().wide.kernel, []
    trained(
        Sparsity(0.5, schedule="constant"), {"k": kernel}, each=lambda: seen.append(zeros(kernel))
    )
    np.testing.assert_allclose(seen, 0.5, atol=0.01)


def test_the_smallest_weights_go():
    kernel = Small().wide.kernel
    before = np.abs(kernel.numpy())
    pruner = Pruner({"k": kernel}, Sparsity(0.5, schedule="constant"), STEPS)
    pruner(tf.constant(0.0))
    gone = kernel.numpy() == 0
    assert before[gone].max() <= before[~gone].min()


def test_weights_of_large_inputs_stay():
    kernel = Small().wide.kernel
    sizes = np.where(np.arange(64) < 16, 100.0, 1.0).astype(np.float32)
    pruner = Pruner({"k": kernel}, Sparsity(0.5, schedule="constant"), STEPS, {id(kernel): sizes})
    pruner(tf.constant(0.0))
    gone = (kernel.numpy() == 0).mean(axis=1)
    assert gone[:16].max() < 0.1
    assert gone.mean() == pytest.approx(0.5, abs=0.01)


def test_blocks_are_four_in_a_row():
    kernel = Small().wide.kernel
    trained(Sparsity(0.5, "block"), {"k": kernel})
    blocks = (kernel.numpy() == 0).reshape(64, 16, 4)
    assert set(blocks.sum(axis=2).ravel()) == {0, 4}
    assert np.mean(blocks) == pytest.approx(0.5, abs=0.02)


@pytest.mark.parametrize("schedule", ["polynomial", "constant"])
def test_two_of_every_four_inputs(schedule):
    kernel = Small().wide.kernel
    trained(Sparsity(0.5, "2:4", schedule), {"k": kernel})
    of_four = (kernel.numpy() == 0).reshape(16, 4, 64).sum(axis=1)
    assert (of_four >= 2).all()
    assert zeros(kernel) == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("pattern", ["unstructured", "block", "2:4"])
def test_heads_of_attention_are_pruned_as_one_matrix(bert, pattern):
    found = {name: v for name, v in kernels(bert).items() if len(v.shape) == 3}
    assert len(found) == 2 * 4
    kept = {name: v.numpy() for name, v in found.items()}
    trained(Sparsity(0.5, pattern), found)
    for name, variable in found.items():
        assert zeros(variable) == pytest.approx(0.5, abs=0.02), name
        variable.assign(kept[name])
    assert set(zeros_of(bert).values()) == {0.0}


def test_a_killed_training_goes_on_with_its_masks(tmp_path):
    kernel = Small().wide.kernel
    begun = trained(Sparsity(0.5), {"k": kernel}, steps=12)
    saved = tf.train.Checkpoint(pruner=begun, kernel=kernel).save(str(tmp_path / "c"))
    other = Small().wide.kernel
    again = Pruner({"k": other}, Sparsity(0.5), STEPS)
    tf.train.Checkpoint(pruner=again, kernel=other).restore(saved).assert_consumed()
    for pruner, of in ((begun, kernel), (again, other)):
        of.assign(tf.ones_like(of) + tf.reshape(tf.range(64.0 * 64), [64, 64]))
        pruner(tf.constant(0.0))
    np.testing.assert_array_equal(kernel.numpy(), other.numpy())
    assert 0.1 < zeros(other) < 0.5


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ({"share": 0.0}, "0 of the weights"),
        ({"share": 1.0}, "1 of the weights"),
        ({"share": 0.8, "pattern": "2:4"}, "2:4 prunes 0.5"),
    ],
)
def test_what_is_no_sparsity(told, why):
    with pytest.raises(ConfigError, match=why):
        Sparsity(**told)


REPLICAS = """
import subprocess
import sys

import numpy as np
from tfrec.models.keras_bridge import tf, tf_keras
from tfrec.models.pruning import Pruner, Sparsity
cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
strategy = tf.distribute.MirroredStrategy([d.name for d in tf.config.list_logical_devices("CPU")])
with strategy.scope():
    layer = tf_keras.layers.Dense(64)
    layer(tf.zeros([1, 64]))
    optimizer = tf_keras.optimizers.Adam(1e-3)
    optimizer.build(layer.trainable_variables)
    pruner = Pruner({"k": layer.kernel}, Sparsity(0.5), 20)

def step(values):
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.square(layer(values)))
    variables = layer.trainable_variables
    optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables))
    return pruner(loss)

batches = strategy.experimental_distribute_dataset(
    tf.data.Dataset.from_tensor_slices(tf.random.stateless_normal([64, 64], [1, 2]))
    .repeat()
    .batch(8)
)
run = tf.function(lambda values: strategy.run(step, (values,)))
for _, values in zip(range(20), batches):
    run(values)
copies = [copy.numpy() for copy in strategy.experimental_local_results(layer.kernel)]
assert len(copies) == 2
np.testing.assert_array_equal(*copies)
assert abs(np.mean(copies[0] == 0) - 0.5) < 0.01
"""


def test_replicas_have_the_same_zeros():
    done = subprocess.run([sys.executable, "-c", REPLICAS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
