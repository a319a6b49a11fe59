"""Keras 3 inside tf_keras: the environment, and a hosted model that really trains."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tfrec.errors import ConfigError
from tfrec.models.keras_bridge import Hosted, keras3, set_precision, set_seed, tf, tf_keras, tfrs

INPUTS, OUTPUTS = 3, 4


@pytest.fixture
def hosted() -> Hosted:
    return Hosted(small_model(), name="hosted")


def small_model():
    inputs = keras3.Input((INPUTS,))
    hidden = keras3.layers.Dense(5, activation="tanh")(inputs)
    return keras3.Model(inputs, keras3.layers.Dense(OUTPUTS)(keras3.layers.Dropout(0.5)(hidden)))


class Outer(tfrs.Model):
    def __init__(self, inner: Hosted) -> None:
        super().__init__()
        self.inner = inner
        self.scale = tf_keras.layers.Dense(OUTPUTS)

    def call(self, x):
        return self.scale(self.inner.model(x))

    def compute_loss(self, batch, training=False):
        return tf.reduce_mean(tf.square(self.scale(self.inner.model(batch)) - 1.0))


def trained(inner: Hosted, **compile_arguments) -> Outer:
    outer = Outer(inner)
    outer.compile(tf_keras.optimizers.Adam(0.1), **compile_arguments)
    x = tf.data.Dataset.from_tensors(np.ones((8, INPUTS), np.float32)).repeat(2)
    outer.fit(x, verbose=0)
    return outer


def values(layer: Hosted) -> list[np.ndarray]:
    return [v.value.numpy().copy() for v in layer.model.trainable_variables]


def test_a_training_step_changes_every_weight_of_the_hosted_model(hosted):
    before = values(hosted)
    trained(hosted)
    assert len(before) == 4
    assert all((new != old).any() for new, old in zip(values(hosted), before, strict=True))


def test_a_frozen_hosted_model_stays_as_it_is_while_the_rest_trains(hosted):
    hosted.trainable = False
    before = values(hosted)
    outer = trained(hosted)
    assert hosted.trainable_weights == []
    assert len(outer.trainable_weights) == 2
    assert all((new == old).all() for new, old in zip(values(hosted), before, strict=True))


def test_freezing_one_layer_inside_is_seen_at_once(hosted):
    hosted.model.layers[1].trainable = False
    assert len(hosted.trainable_weights) == 2
    assert len(hosted.non_trainable_weights) == 3  # kernel, bias, the dropout's generator
    hosted.model.layers[1].trainable = True
    assert len(hosted.trainable_weights) == 4


def test_a_step_compiled_by_xla_trains_the_hosted_model(hosted):
    before = values(hosted)
    trained(hosted, jit_compile=True)
    assert all((new != old).any() for new, old in zip(values(hosted), before, strict=True))


def test_the_weights_of_the_layer_are_those_of_the_model(hosted):
    assert {v.ref() for v in hosted.weights} == {v.value.ref() for v in hosted.model.variables}


def test_a_checkpoint_restores_model_optimizer_and_random_state(hosted, tmp_path):
    outer = trained(hosted)
    x = np.ones((2, INPUTS), np.float32)
    path = tf.train.Checkpoint(model=outer).save(str(tmp_path / "checkpoint"))
    want, drawn = outer(x).numpy(), hosted.model(x, training=True).numpy()
    other = Outer(Hosted(small_model(), name="hosted"))
    other.compile(tf_keras.optimizers.Adam(0.1))
    other(x)
    tf.train.Checkpoint(model=other).restore(path).assert_existing_objects_matched()
    np.testing.assert_array_equal(other(x), want)
    np.testing.assert_array_equal(other.inner.model(x, training=True), drawn)


@pytest.mark.parametrize("name", ["weights.weights.h5", "weights"])
def test_weight_files_of_both_formats_hold_the_model(hosted, tmp_path, name):
    outer = trained(hosted)
    x = np.ones((2, INPUTS), np.float32)
    outer.save_weights(str(tmp_path / name))
    want = outer(x).numpy()
    other = Outer(Hosted(small_model(), name="hosted"))
    other(x)
    other.load_weights(str(tmp_path / name))
    np.testing.assert_array_equal(other(x), want)


def test_a_seed_fixes_both_keras_versions():
    drawn = []
    for _ in range(2):
        set_seed(7)
        x = np.ones((4, INPUTS), np.float32)
        layer = tf_keras.layers.Dense(3)
        drawn.append((small_model()(x, training=True), layer(x), tf.random.uniform([2])))
    for first, second in zip(*drawn, strict=True):
        np.testing.assert_array_equal(first, second)


def test_precision_is_set_for_both_keras_versions():
    try:
        set_precision("mixed_bfloat16")
        assert tf_keras.mixed_precision.global_policy().name == "mixed_bfloat16"
        assert keras3.config.dtype_policy().name == "mixed_bfloat16"
    finally:
        set_precision("float32")
    assert tf_keras.layers.Dense(1).compute_dtype == "float32"
    assert keras3.layers.Dense(1).compute_dtype == "float32"


def test_an_unknown_precision_is_refused_by_name():
    with pytest.raises(ConfigError, match="'float8' is not one of float32, mixed_bfloat16"):
        set_precision("float8")


def test_an_unknown_name_is_an_attribute_error():
    import tfrec.models.keras_bridge as bridge

    with pytest.raises(AttributeError, match="nothing"):
        bridge.nothing  # noqa: B018


def run(code: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parents[2])
    clean = {"PATH": "/usr/bin:/bin", "PYTHONPATH": root, "TF_CPP_MIN_LOG_LEVEL": "3"}
    env = {name: value for name, value in {**clean, **environment}.items() if value is not None}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)


ASK = "from tfrec.errors import SetupError\ntry:\n    import tfrec.models.keras_bridge\n"
ASK += "except SetupError as error:\n    print(error)\n"


def test_the_bridge_overrules_the_shell():
    code = "from tfrec.models.keras_bridge import tf, tf_keras, keras3\n"
    code += "print(tf.keras.Model is tf_keras.Model, keras3.config.backend())"
    answer = run(code, TF_USE_LEGACY_KERAS="0", KERAS_BACKEND="jax")
    assert answer.stdout == "True tensorflow\n"


FAKE_DRIVER = "import ctypes\nplain = ctypes.CDLL\n"
FAKE_DRIVER += "ctypes.CDLL = lambda name, *rest, **more: (\n"
FAKE_DRIVER += "    {found} if name == 'libcuda.so.1' else plain(name, *rest, **more))\n"
LEVEL = "import os\nfrom tfrec.models.keras_bridge import tf\n"
LEVEL += "tf.config.list_physical_devices()\nprint(os.environ['TF_CPP_MIN_LOG_LEVEL'])"


@pytest.mark.parametrize(
    ("found", "asked", "level"),
    [
        ("plain('no such driver')", {}, "3"),
        ("object()", {}, "2"),
        ("plain('no such driver')", {"TF_CPP_MIN_LOG_LEVEL": "1"}, "1"),
    ],
    ids=["no driver", "a driver", "the user has said"],
)
def test_a_machine_without_a_gpu_driver_is_no_error_to_talk_about(found, asked, level):
    environment = {"TF_CPP_MIN_LOG_LEVEL": None} | asked
    answer = run(FAKE_DRIVER.format(found=found) + LEVEL, **environment)
    assert answer.stdout == f"{level}\n"
    if level == "3":
        assert answer.stderr == ""


def test_tensorflow_imported_too_early_is_one_line_that_says_what_to_do():
    answer = run("import tensorflow as tf\ntf.keras.layers\n" + ASK)
    assert answer.stdout == (
        "TensorFlow was imported with Keras 3 as its tf.keras, and tfrec comes too late to change "
        "that; import tfrec.models.keras_bridge before it, or start Python with "
        "TF_USE_LEGACY_KERAS=1 KERAS_BACKEND=tensorflow\n"
    )


def test_keras_imported_with_another_backend_is_one_line_that_says_what_to_do():
    keras = "import sys\nfrom types import SimpleNamespace as new\n"
    keras += "sys.modules['keras'] = new(config=new(backend=lambda: 'torch'))\n"
    answer = run(keras + ASK)
    assert answer.stdout.startswith("Keras was imported with the backend torch, and tfrec comes")


def test_without_the_train_extra_the_remedy_is_named():
    answer = run("import sys\nsys.modules['tensorflow'] = None\n" + ASK)
    assert 'install it with: pip install "tfrec[train]"' in answer.stdout
    assert answer.stdout.count("\n") == 1
