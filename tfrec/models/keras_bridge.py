"""The one place where Keras 3 meets tf_keras (Keras 2).

TensorFlow Recommenders works on tf_keras, the BERT of keras-hub on Keras 3. Both live in one
process if two environment variables are set before TensorFlow loads, so every module of ours that
needs TensorFlow takes it from here and never imports it itself::

    from tfrec.models.keras_bridge import tf, tf_keras, tfrs

Importing this module sets the environment and loads ``tf`` and ``tf_keras``; ``tfrs``, ``keras3``,
``keras_hub`` and ``tf_text`` are loaded when first asked for. Because they are attributes of this
module, a linter that sorts imports cannot put TensorFlow before the environment.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tfrec.errors import ConfigError, SetupError

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")

_ENVIRONMENT = {"TF_USE_LEGACY_KERAS": "1", "KERAS_BACKEND": "tensorflow"}
_LOADED_WHEN_ASKED_FOR = {
    "tfrs": "tensorflow_recommenders",
    "keras3": "keras",
    "keras_hub": "keras_hub",
    "tf_text": "tensorflow_text",
    # TensorFlow has no public way to make variables into constants, or to change a LiteRT file.
    "flatbuffers": "tensorflow.lite.tools.flatbuffer_utils",
    "freezing": "tensorflow.python.framework.convert_to_constants",
    "tfmot": "tensorflow_model_optimization.sparsity.keras",
    "tfmot_quantizers": "tensorflow_model_optimization.quantization.keras.quantizers",
    # TF-MOT prunes variables only inside of layers that it has wrapped.
    "tfmot_pruning": "tensorflow_model_optimization.python.core.sparsity.keras.pruning_impl",
}


def ensure() -> None:
    """Sets the environment in which both Keras versions live in this process, and checks it.

    Raises:
      SetupError: TensorFlow or Keras was imported before with other settings, or is missing.
    """
    os.environ.update(_ENVIRONMENT)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2" if _has_nvidia_driver() else "3")
    tensorflow = _import("tensorflow")
    # Its warnings are for those who write TensorFlow code: retracing, deprecated names.
    tensorflow.get_logger().setLevel("ERROR")
    if not tensorflow.keras.layers.Layer.__module__.startswith("tf_keras."):
        raise _too_late("TensorFlow was imported with Keras 3 as its tf.keras")
    keras = sys.modules.get("keras")
    if keras is not None and keras.config.backend() != "tensorflow":
        raise _too_late(f"Keras was imported with the backend {keras.config.backend()}")


def set_precision(name: str) -> None:
    """Sets the mixed-precision policy, which each of the two Keras versions keeps for itself.

    Args:
      name: One of :data:`PRECISIONS`. Layers made later follow it.

    Raises:
      ConfigError: it is none of these.
    """
    if name not in PRECISIONS:
        raise ConfigError(f"precision '{name}' is not one of {', '.join(PRECISIONS)}")
    tf_keras.mixed_precision.set_global_policy(name)
    _import("keras").config.set_dtype_policy(name)


@contextmanager
def full_precision() -> Iterator[None]:
    """Within the block tf_keras layers are made for float32, whatever the policy."""
    policy = tf_keras.mixed_precision.global_policy()
    tf_keras.mixed_precision.set_global_policy("float32")
    try:
        yield
    finally:
        tf_keras.mixed_precision.set_global_policy(policy)


def set_seed(seed: int) -> None:
    """Seeds Python, NumPy, TensorFlow and both Keras versions; layers made later follow it."""
    _import("keras").utils.set_random_seed(seed)
    tf_keras.utils.set_random_seed(seed)


def _has_nvidia_driver() -> bool:
    """Whether the library is there that TensorFlow looks for when it asks for GPUs.

    Where it is not, TensorFlow says at the level of errors that it did not find it
    (https://github.com/tensorflow/tensorflow/issues/37689), and CUDA_VISIBLE_DEVICES does not stop
    it. Real errors come as exceptions too, and fatal ones are written at every level.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _import(module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise SetupError(
            f"training needs {module}, which cannot be imported ({error}); "
            'install it with: pip install "tfrec[train]"'
        ) from None


def _too_late(state: str) -> SetupError:
    settings = " ".join(f"{key}={value}" for key, value in _ENVIRONMENT.items())
    return SetupError(
        f"{state}, and tfrec comes too late to change that; import tfrec.models.keras_bridge "
        f"before it, or start Python with {settings}"
    )


ensure()
tf: Any = _import("tensorflow")
tf_keras: Any = _import("tf_keras")


def __getattr__(name: str) -> Any:
    if name not in _LOADED_WHEN_ASKED_FOR:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    if name.startswith("tfmot"):
        return globals().setdefault(name, _import_tfmot(_LOADED_WHEN_ASKED_FOR[name]))
    return globals().setdefault(name, _import(_LOADED_WHEN_ASKED_FOR[name]))


def _import_tfmot(module: str) -> Any:
    """TF-MOT asks distutils, which is deprecated, how old TensorFlow is; setuptools complains to
    whoever imports pip or setuptools after it."""
    there = {name for name in sys.modules if name.partition(".")[0] == "distutils"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        found = _import(module)
    for name in [name for name in sys.modules if name.partition(".")[0] == "distutils"]:
        if name not in there:
            del sys.modules[name]
    return found


class Hosted(tf_keras.layers.Layer):
    """A tf_keras layer that holds a Keras 3 model and says which weights it owns.

    tf_keras does not see the variables of a Keras 3 model that is merely assigned to an
    attribute: training would run and leave it untouched. The answer is computed each time, since
    LoRA and freezing change it. ``trainable = False`` on this layer freezes the whole model.

    ``tf.train.Checkpoint``, ``save_weights`` and ``tf.saved_model.save`` include the model.

    Args:
      model: A built Keras 3 model on the TensorFlow backend.
    """

    def __init__(self, model: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.model = model
        # Checkpoints find the model by itself, but not the states of its random generators,
        # without which a resumed training would drop out other things than one never stopped.
        states = [v.value for v in model.variables if "seed_generator" in v.path]
        for number, state in enumerate(states):
            self._track_trackable(state, f"random_state_{number}")

    @property
    def trainable_weights(self) -> list[Any]:
        """The tf.Variables that the optimizer changes."""
        hosted = self.model.trainable_variables if self.trainable else []
        return [*super().trainable_weights, *(v.value for v in hosted)]

    @property
    def non_trainable_weights(self) -> list[Any]:
        """All other tf.Variables, the states of the dropout's random generators among them."""
        hosted = self.model.non_trainable_variables if self.trainable else self.model.variables
        return [*super().non_trainable_weights, *(v.value for v in hosted)]

    def save_own_variables(self, store: Any) -> None:
        """Writes every weight into a Keras weights file, which leaves them out by default."""
        for place, weight in enumerate(_in_fixed_order(self)):
            store[str(place)] = weight.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Reads back what :meth:`save_own_variables` wrote."""
        for place, weight in enumerate(_in_fixed_order(self)):
            weight.assign(store[str(place)][...])


def _in_fixed_order(layer: Hosted) -> list[Any]:
    """All weights in an order that freezing does not change."""
    own = [*layer._trainable_weights, *layer._non_trainable_weights]
    return [*own, *(v.value for v in layer.model.variables)]
