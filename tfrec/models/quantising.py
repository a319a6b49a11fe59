"""Quantisation-aware training: layers of any tf_keras model learn to work with int8 kernels.

TF-MOT wraps layers, in models that it can clone, and ours are subclassed. What its wrapper does
needs no clone: while the loss is computed, a layer's kernel is what TF-MOT's quantizer makes of it,
eight bits with a scale for each column, and the gradient goes through to the float one as if
nothing was rounded (Jacob et al. 2018, arXiv:1712.05877). Activations are left: LiteRT brings them
to int8 as they come.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from tfrec.models.distillation import Loss
from tfrec.models.keras_bridge import tf, tf_keras, tfmot_quantizers
from tfrec.models.named import kernels


def dense_layers(model: Any) -> list[Any]:
    """The dense layers of a built model whose kernels LiteRT would bring to int8."""
    wanted = {id(variable) for variable in kernels(model).values()}
    return [
        layer
        for layer in model.submodules
        if isinstance(layer, tf_keras.layers.Dense) and id(getattr(layer, "kernel", None)) in wanted
    ]


@contextmanager
def quantised(layers: Sequence[Any]) -> Iterator[None]:
    """Within it, each layer's kernel is a tensor: what int8 would hold of its variable."""
    kept = [layer.kernel for layer in layers]
    try:
        for layer, variable in zip(layers, kept, strict=True):
            # Past Keras, to which another attribute would be the end of the variable.
            object.__setattr__(layer, "kernel", rounded(variable))
        yield
    finally:
        for layer, variable in zip(layers, kept, strict=True):
            object.__setattr__(layer, "kernel", variable)


def learning(layers: Sequence[Any], losses: Loss) -> Loss:
    """The losses of a model whose layers compute with what int8 holds of their kernels."""

    def found(inputs: Mapping[str, Any], training: bool) -> Mapping[str, Any]:
        with quantised(layers):
            return losses(inputs, training)

    return found


def settle(layers: Sequence[Any]) -> None:
    """Leaves in each kernel what int8 holds of it, so that float32 and int8 compute the same."""
    for layer in layers:
        layer.kernel.assign(rounded(layer.kernel))


def rounded(kernel: Any) -> Any:
    """float32 (in, out), the nearest of 255 steps in each column, by TF-MOT's quantizer."""
    values = tf.convert_to_tensor(kernel)
    largest = tf.stop_gradient(tf.maximum(tf.reduce_max(tf.abs(values), axis=0), 1e-12))
    quantizer = tfmot_quantizers.LastValueQuantizer(
        num_bits=8, per_axis=True, symmetric=True, narrow_range=True
    )
    # Its own variables for the range would only repeat the kernel's.
    return quantizer(values, training=False, weights={"min_var": -largest, "max_var": largest})
