"""LiteRT: our models as flatbuffers that run without TensorFlow, in float32 or with int8 weights.

The BERT is written here once more, in the plain operations that XNNPACK runs: any number of texts
lie one behind another in one row of tokens, and a mask keeps them apart. So no token is padding,
one model reads texts of every length, and its matrix products are as large as a batch has tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.data.sequences import query_inputs
from tfrec.errors import InputError
from tfrec.models.bert import tensors
from tfrec.models.keras_bridge import flatbuffers, freezing, tf
from tfrec.models.ranking import Ranker
from tfrec.models.retrieval import TwoTower, no_history
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import TextAdapter
from tfrec.terminal import quiet

Arrays = Mapping[str, NDArray[Any]]

_APART = -1e4  # added to the attention between tokens of different texts


def convert(function: Callable[..., Any], signature: Mapping[str, Any], int8: bool) -> bytes:
    """A LiteRT model of a function.

    Args:
      function: Takes the tensors of ``signature`` by name and returns a dictionary of tensors.
      signature: Name -> tf.TensorSpec.
      int8: Whether the kernels of matrix products are kept as int8 with a scale for each column,
        and multiplied with activations that are brought to int8 as they come, one scale for each
        row (dynamic range); else everything is float32.

    Raises:
      InputError: the model holds values that are not finite.
    """
    # Named after their place: the converter keeps names of inputs, but no dictionary of outputs.
    specs = [tf.TensorSpec(s.shape, s.dtype, name=name) for name, s in signature.items()]

    def call(*values: Any) -> Any:
        return function(**dict(zip(signature, values, strict=True)))

    traced = tf.function(call, input_signature=specs, autograph=False)
    with quiet():
        frozen = freezing.convert_variables_to_constants_v2(traced.get_concrete_function())
    _check_finite(frozen)
    converter = tf.lite.TFLiteConverter.from_concrete_functions([frozen], tf.Module())
    if int8:
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    with quiet():
        blob = converter.convert()
    (output,) = traced.get_concrete_function().structured_outputs
    return _named(blob, output)


def text_model(encoder: TextEncoder, int8: bool = True) -> bytes:
    """The BERT up to its last layer, for :class:`tfrec.engines.TextModel`.

    Inputs: int32 ``token_ids`` and ``positions`` (t,), float32 ``mask`` (t, t), 0 where a token
    sees another and a large negative number where not. Output: float32 (t, width).

    Raises:
      InputError: a weight is not finite.
    """
    weights, settings = tensors(encoder.model), encoder.model

    def call(token_ids: Any, positions: Any, mask: Any) -> Any:
        return {"hidden": bert(weights, settings, token_ids, positions, mask, int8)}

    row = tf.TensorSpec([None], tf.int32)
    signature = {"token_ids": row, "positions": row, "mask": tf.TensorSpec([None, None])}
    return convert(call, signature, int8)


def bert(
    weights: Arrays, backbone: Any, token_ids: Any, positions: Any, mask: Any, int8: bool = False
) -> Any:
    """A BERT encoder over one row of tokens.

    Args:
      weights: By Hugging Face's names, see :func:`tfrec.models.bert.tensors`.
      backbone: Says heads, layers, epsilons and activation.
      token_ids: int32 (t,).
      positions: int32 (t,), the place of each token in its own text.
      mask: float32 (t, t), added to the attention.
      int8: Whether the table of words is kept as int8, with a scale for each word.

    Returns:
      float32 (t, width).
    """
    heads = int(backbone.num_heads)

    def norm(values: Any, name: str, layer: Any) -> Any:
        centred = values - tf.reduce_mean(values, -1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return centred * tf.math.rsqrt(variance + float(layer.epsilon)) * scale + shift

    def dense(values: Any, *names: str, by: tuple[float, ...] = ()) -> Any:
        factors = by or (1.0,) * len(names)
        pairs = list(zip(names, factors, strict=True))
        kernel = np.concatenate([weights[f"{n}.weight"] * f for n, f in pairs]).T
        bias = np.concatenate([weights[f"{n}.bias"] * f for n, f in pairs])
        return tf.matmul(values, tf.constant(kernel)) + tf.constant(bias)

    def split(values: Any) -> Any:
        size = values.shape[-1] // heads
        return tf.transpose(tf.reshape(values, [-1, heads, size]), [1, 0, 2])

    places = weights["embeddings.position_embeddings.weight"]
    segment = weights["embeddings.token_type_embeddings.weight"][0]
    hidden = _words(weights["embeddings.word_embeddings.weight"], token_ids, int8)
    hidden += tf.gather(tf.constant(places + segment), positions)
    hidden = norm(hidden, "embeddings.LayerNorm", backbone.embeddings_layer_norm)
    for number, layer in enumerate(backbone.transformer_layers):
        name = f"encoder.layer.{number}."
        width = hidden.shape[-1]
        inner = f"{name}attention.self."
        parts = dense(
            hidden,
            *(f"{inner}query", f"{inner}key", f"{inner}value"),
            by=((width // heads) ** -0.5, 1.0, 1.0),
        )
        query, key, value = (split(part) for part in tf.split(parts, 3, axis=-1))
        scores = tf.nn.softmax(tf.matmul(query, key, transpose_b=True) + mask)
        found = _with_prompts(tf.matmul(scores, value), query, layer)
        mixed = tf.reshape(tf.transpose(found, [1, 0, 2]), [-1, width])
        told = dense(mixed, f"{name}attention.output.dense")
        told = _adapted(told, layer._self_attention_dropout)
        hidden = norm(
            hidden + told, f"{name}attention.output.LayerNorm", layer._self_attention_layer_norm
        )
        grown = _activated(dense(hidden, f"{name}intermediate.dense"), layer)
        fed = _adapted(dense(grown, f"{name}output.dense"), layer._feedforward_dropout)
        hidden = norm(hidden + fed, f"{name}output.LayerNorm", layer._feedforward_layer_norm)
    return hidden


def query_model(two_tower: TwoTower, int8: bool = False) -> bytes:
    """The query tower: the arrays of :meth:`TwoTower.query_inputs` -> ``query`` (b, d)."""
    config = two_tower.config
    widths = dict(zip(("profile", "attributes"), two_tower.widths, strict=True))
    nothing, profile, attributes = (
        np.zeros((1, width), np.float32) for width in (config.embedding_dim, *two_tower.widths)
    )
    found = query_inputs(no_history(), config.history, nothing, profile, attributes)
    used = {"vectors", "segment", "last", *two_tower.query_tower.tables}
    used |= {name for name, width in widths.items() if width}
    signature = {name: _many(found[name]) for name in sorted(used)}

    def call(**batch: Any) -> Any:
        rows = tf.shape(batch["vectors"])[0]
        absent = {n: tf.zeros([rows, 1, 0]) for n in widths if n not in batch}
        return {"query": two_tower({**batch, **absent}, training=False)}

    return convert(call, signature, int8)


def candidate_model(
    two_tower: TwoTower, text_width: int, attributes_width: int, int8: bool = False
) -> bytes | None:
    """The candidate tower for items without an id: ``text`` (n, text width) and ``attributes``
    (n, width), as far as there are any -> ``candidate`` (n, d). None: it reads neither."""
    widths = {"text": text_width, "attributes": attributes_width}
    signature = {n: tf.TensorSpec([None, width]) for n, width in widths.items() if width}
    if not signature:
        return None

    def call(**given: Any) -> Any:
        rows = tf.shape(next(iter(given.values())))[0]
        text, attributes = (given.get(name, tf.zeros([rows, 0])) for name in widths)
        tower = two_tower.candidate_tower
        return {"candidate": tower.without_ids(text, attributes)}

    return convert(call, signature, int8)


def rank_model(ranker: Ranker, int8: bool = False) -> bytes:
    """The ranker: the inputs of :meth:`Ranker.call`, as far as they have a width -> its tasks, one
    behind the other in (b, c, tasks)."""
    names = [name for name, width in ranker.widths.items() if width]
    signature = {
        "query": tf.TensorSpec([None, ranker.widths["candidates"]]),
        "history": tf.TensorSpec([None, ranker.config.history, ranker.widths["candidates"]]),
        "history_mask": tf.TensorSpec([None, ranker.config.history]),
    }
    for name in names:
        rows = [None] if name in ("user_attributes", "profile") else [None, None]
        signature[name] = tf.TensorSpec([*rows, ranker.widths[name]])

    def call(**inputs: Any) -> Any:
        found = ranker(inputs, training=False)
        return {"tasks": tf.stack([found[task] for task in ranker.tasks], axis=-1)}

    return convert(call, signature, int8)


def _named(blob: bytes, output: str) -> bytes:
    """The model with plain names of its inputs and its output, and no others.

    Inner names count up with every Keras layer that the process has made: without them the same
    model gives the same bytes.
    """
    model = flatbuffers.convert_bytearray_to_object(bytearray(blob))
    (graph,) = model.subgraphs
    for place, tensor in enumerate(graph.tensors):
        if place in graph.inputs:
            name = tensor.name.decode().removeprefix("serving_default_").partition(":")[0]
        else:
            name = output if place in graph.outputs else ""
        tensor.name = name.encode()
    return bytes(flatbuffers.convert_object_to_bytearray(model))


def signature(blob: bytes) -> dict[str, dict[str, dict[str, Any]]]:
    """``inputs`` and ``outputs`` of a LiteRT model: name -> ``shape`` (-1: any) and ``dtype``."""
    from ai_edge_litert.interpreter import Interpreter

    with quiet():
        model = Interpreter(model_content=blob)

    def told(details: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
        return {
            detail["name"]: {
                "shape": [int(size) for size in detail["shape_signature"]],
                "dtype": np.dtype(detail["dtype"]).name,
            }
            for detail in details
        }

    return {
        "inputs": told(model.get_input_details()),
        "outputs": told(model.get_output_details()),
    }


def _words(table: NDArray[np.float32], token_ids: Any, int8: bool) -> Any:
    """float32 (t, width), rows of the table of words."""
    if not int8:
        return tf.gather(tf.constant(table), token_ids)
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True), 1e-12) / 127
    codes = np.clip(np.round(table / scale), -127, 127).astype(np.int8)
    found = tf.cast(tf.gather(tf.constant(codes), token_ids), tf.float32)
    return found * tf.gather(tf.constant(scale.astype(np.float32)), token_ids)


def _adapted(values: Any, dropout: Any) -> Any:
    """What an adapter, which stands in the place of a dropout, makes of them."""
    if not isinstance(dropout, TextAdapter):
        return values
    down, up = dropout.down, dropout.up
    inner = tf.nn.gelu(tf.matmul(values, _value(down.kernel)) + _value(down.bias))
    return values + tf.matmul(inner, _value(up.kernel)) + _value(up.bias)


def _with_prompts(values: Any, query: Any, layer: Any) -> Any:
    """What learned places add; the queries (heads, t, size) are scaled already."""
    prefix = getattr(layer._self_attention_layer, "_prefix", None)
    if prefix is None:
        return values
    keys, told = (_value(v).transpose(1, 0, 2) for v in (prefix.keys, prefix.values))
    return values + tf.matmul(tf.nn.softmax(tf.matmul(query, keys, transpose_b=True)), told)


def _activated(values: Any, layer: Any) -> Any:
    name = layer._feedforward_intermediate_dense.activation.__name__
    if name == "relu":
        return tf.nn.relu(values)
    return tf.nn.gelu(values, approximate=name != "gelu")


def _value(variable: Any) -> NDArray[np.float32]:
    with tf.init_scope():
        return np.asarray(variable.numpy(), np.float32)


def _many(array: NDArray[Any]) -> Any:
    return tf.TensorSpec([None, *array.shape[1:]], tf.as_dtype(array.dtype))


def _check_finite(frozen: Any) -> None:
    for operation in frozen.graph.get_operations():
        if operation.type != "Const" or not operation.outputs[0].dtype.is_floating:
            continue
        if not np.isfinite(tf.make_ndarray(operation.get_attr("value"))).all():
            raise InputError(
                "the model holds weights that are not finite; train it again, with a lower "
                "learning rate"
            )
