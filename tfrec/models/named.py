"""Weights by name: which variable is which, and safetensors files of them.

A name is the path of attributes that leads to a variable, such as
``query_tower.encoder.blocks.0.qkv.kernel``: it does not depend on what was built before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.errors import ArtifactError
from tfrec.models.keras_bridge import Hosted, tf, tf_keras

Arrays = dict[str, NDArray[Any]]

_LEAST_KERNEL = 1024  # weights: zeros or int8 win nothing in smaller ones, and LiteRT leaves them


def named_variables(layer: Any) -> dict[str, Any]:
    """The weights of a built tf_keras layer or model, hosted Keras 3 models included.

    Metrics, optimizer and the states of random generators are no weights. A variable that two
    attributes lead to has the name of the first.
    """
    found: dict[str, Any] = {}
    seen: set[int] = set()
    for path, variable in _walk(layer, ()):
        if id(variable) not in seen:
            seen.add(id(variable))
            found[".".join(path)] = variable
    unnamed = [v.name for v in layer.trainable_variables if id(v) not in seen]
    assert not unnamed, f"{layer.name} has weights that no attribute leads to: {unnamed}"
    return found


def kernels(model: Any) -> dict[str, Any]:
    """The kernels of a model's matrix products by name; tables, norms and biases are none.

    A BERT's pooler is left out, as no vector of ours passes it, and so is what is small.
    """
    return {
        name: variable
        for name, variable in named_variables(model).items()
        if name.rpartition("/" if "/" in name else ".")[2] == "kernel"
        and len(variable.shape) > 1
        and variable.shape.num_elements() >= _LEAST_KERNEL
        and "pooled_dense" not in name
    }


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    if isinstance(value, tf.Variable):
        yield path, value
    elif isinstance(value, tf_keras.metrics.Metric | tf_keras.optimizers.Optimizer):
        return
    elif isinstance(value, tf_keras.layers.Layer):
        for name, inner in vars(value).items():
            # Layers of others keep inner layers private; private variables of ours are no weights.
            private = name.startswith("_") and not isinstance(inner, tf_keras.layers.Layer)
            if not private and not (isinstance(value, Hosted) and name == "model"):
                yield from _walk(inner, (*path, name))
        if isinstance(value, Hosted):
            for variable in value.model.variables:
                if "seed_generator" not in variable.path:
                    yield (*path, variable.path), variable.value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _walk(inner, (*path, str(name)))
    elif isinstance(value, list | tuple):
        for number, inner in enumerate(value):
            yield from _walk(inner, (*path, str(number)))


def save(path: Path, variables: Mapping[str, Any]) -> None:
    """Writes variables, or arrays, into a safetensors file.

    Raises:
      OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    arrays = {name: np.ascontiguousarray(_array(value)) for name, value in variables.items()}
    try:
        save_file(arrays, str(path))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from None


def read(path: Path) -> Arrays:
    """Reads a safetensors file.

    Raises:
      ArtifactError: it is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays: Arrays = load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}") from None
    return arrays


def assign(variables: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]], where: str) -> None:
    """Gives variables the values of their names.

    Args:
      variables: Of :func:`named_variables`.
      arrays: Values; variables without one keep theirs.
      where: What the arrays are from, for messages.

    Raises:
      ArtifactError: there is no variable of a name, or it has another shape; nothing was changed.
    """
    for name, value in arrays.items():
        if name not in variables:
            raise ArtifactError(f"{where} has a weight '{name}' that this model does not have")
        if tuple(variables[name].shape) != value.shape:
            raise ArtifactError(
                f"{where}: weight '{name}' is {value.shape}, and this model's is "
                f"{tuple(variables[name].shape)}"
            )
    for name, value in arrays.items():
        variables[name].assign(value)


def _array(value: Any) -> NDArray[Any]:
    array: NDArray[Any] = value.numpy() if hasattr(value, "numpy") else value
    return array
