"""LiteRT: our models as flatbuffers that run without TensorFlow, in float32 or with int8 weights.

The BERT is written here once more, in the plain operations that XNNPACK runs: any number of texts
lie one behind another in one row of tokens, and a mask keeps them apart. So no token is padding,
one model reads texts of every length, and its matrix products are as large as a batch has tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tfrec.data.sequences import query_inputs
from tfrec.data.tokens import packed
from tfrec.errors import InputError
from tfrec.models.bert import heads_of, tensors
from tfrec.models.int8 import Inputs, balanced, coded, rounded
from tfrec.models.keras_bridge import flatbuffers, freezing, tf
from tfrec.models.ranking import Ranker
from tfrec.models.retrieval import TwoTower, no_history
from tfrec.models.text import TextEncoder
from tfrec.models.tuning import TextAdapter
from tfrec.terminal import quiet

Arrays = Mapping[str, NDArray[Any]]

_NOT_FINITE = (
    "the model holds weights that are not finite; train it again, with a lower learning rate"
)
_PROJECTION = "linear"
_PLACES = "embeddings.position_embeddings.weight"
_CALIBRATION = 16_384  # tokens that are read before rounding
_TOKENS = 512  # of these at a time


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


def text_model(encoder: TextEncoder, int8: bool = True, calibration: Sequence[str] = ()) -> bytes:
    """The BERT up to the pooling, for :class:`tfrec.engines.TextModel`.

    A linear layer after the pooling comes before it here, which gives the same: the mean of what
    it makes of the tokens is what it makes of their mean.

    Inputs: int32 ``token_ids`` and ``positions`` (t,), float32 ``mask`` (t, t), 0 where a token
    sees another and a large negative number where not. Output: float32 (t, width).

    Args:
      encoder: Also says how many positions there are: ``encoder.tokenizer.length``.
      int8: See :func:`convert`.
      calibration: Texts of the kind that will be read, such as those of the catalog. From some
        of them, always the same, int8 learns which weights to round up and which channels are
        large, and comes nearer to float32. Empty: each weight is rounded by itself.

    Raises:
      InputError: a weight is not finite.
    """
    weights, settings = tensors(encoder.model), encoder.model
    weights[_PLACES] = weights[_PLACES][: encoder.tokenizer.length]
    if encoder.projection is not None:
        kernel, bias = encoder.projection.get_weights()
        weights |= {f"{_PROJECTION}.weight": kernel.T, f"{_PROJECTION}.bias": bias}
    if not all(np.isfinite(array).all() for array in weights.values()):
        raise InputError(_NOT_FINITE)
    products = _products(weights, settings)
    if int8 and calibration:
        seen = _inputs(encoder, weights, products, calibration)
        products = {name: product.rounded(seen[name]) for name, product in products.items()}

    def call(token_ids: Any, positions: Any, mask: Any) -> Any:
        return {"hidden": bert(weights, settings, products, token_ids, positions, mask, int8)}

    row = tf.TensorSpec([None], tf.int32)
    signature = {"token_ids": row, "positions": row, "mask": tf.TensorSpec([None, None])}
    return convert(call, signature, int8)


class Product(NamedTuple):
    """A matrix product of a BERT: ``values @ kernel + bias``.

    Attributes:
      kernel: float32 (in, out).
      bias: float32 (out,).
      normed: Whether the values come from a layer norm, without its shift.
      smooth: float32 (in,), what that layer norm divides them by; None: ones.
    """

    kernel: NDArray[np.float32]
    bias: NDArray[np.float32]
    normed: bool = False
    smooth: NDArray[np.float32] | None = None

    def __call__(self, values: Any) -> Any:
        """float32 (n, out) of float32 (n, in)."""
        return tf.matmul(values, tf.constant(self.kernel)) + tf.constant(self.bias)

    def rounded(self, seen: Inputs) -> Product:
        """With a kernel that int8 holds as it is, chosen for such inputs."""
        if not self.normed:
            return self._replace(kernel=rounded(self.kernel, seen.gram))
        smooth = balanced(self.kernel, seen.largest)
        gram = seen.gram / np.outer(smooth, smooth)
        return self._replace(kernel=rounded(self.kernel * smooth[:, None], gram), smooth=smooth)


def bert(
    weights: Arrays,
    backbone: Any,
    products: Mapping[str, Product],
    token_ids: Any,
    positions: Any,
    mask: Any,
    int8: bool = False,
    watch: Callable[[str, Any], None] = lambda name, values: None,
) -> Any:
    """A BERT encoder over one row of tokens.

    Args:
      weights: By Hugging Face's names, see :func:`tfrec.models.bert.tensors`; ``linear`` is a
        projection of what the last layer gives.
      backbone: Says heads, layers, epsilons and activation.
      products: By Hugging Face's names; that of ``attention.self`` gives queries, which are scaled
        already, keys and values side by side.
      token_ids: int32 (t,).
      positions: int32 (t,), the place of each token in its own text.
      mask: float32 (t, t), added to the attention.
      int8: Whether the tables of words and places are kept as int8, with a scale for each row and
        for each column.
      watch: Is told each product's name and its inputs.

    Returns:
      float32 (t, width).
    """

    def norm(values: Any, name: str, layer: Any, smooth: Any = None) -> tuple[Any, Any]:
        """What the next product reads, and the values of the layer norm."""
        centred = values - tf.reduce_mean(values, -1, keepdims=True)
        variance = tf.reduce_mean(tf.square(centred), -1, keepdims=True)
        scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
        factor = scale if smooth is None else scale / smooth
        # The converter moves a constant that is multiplied last into the next kernel, and rounds
        # that with a scale it was not made for; so the last factor is one that is computed.
        inner = centred * factor * tf.math.rsqrt(variance + float(layer.epsilon))
        return inner, (inner if smooth is None else inner * smooth) + shift

    def product(name: str, values: Any) -> Any:
        watch(name, values)
        return products[name](values)

    def split(values: Any, layer: Any) -> Any:
        return tf.transpose(tf.reshape(values, [-1, *heads_of(layer)]), [1, 0, 2])

    def smooth_of(name: str) -> Any:
        return products[name].smooth if name in products else None

    read, hidden = norm(
        _embedded(weights, token_ids, positions, int8),
        "embeddings.LayerNorm",
        backbone.embeddings_layer_norm,
        smooth_of("encoder.layer.0.attention.self"),
    )
    for number, layer in enumerate(backbone.transformer_layers):
        name = f"encoder.layer.{number}."
        parts = product(f"{name}attention.self", read)
        query, key, value = (split(part, layer) for part in tf.split(parts, 3, axis=-1))
        scores = tf.nn.softmax(tf.matmul(query, key, transpose_b=True) + mask)
        found = _with_prompts(tf.matmul(scores, value), query, layer)
        mixed = tf.reshape(tf.transpose(found, [1, 0, 2]), [-1, np.prod(heads_of(layer))])
        told = product(f"{name}attention.output.dense", mixed)
        told = _adapted(told, layer._self_attention_dropout)
        read, hidden = norm(
            hidden + told,
            f"{name}attention.output.LayerNorm",
            layer._self_attention_layer_norm,
            smooth_of(f"{name}intermediate.dense"),
        )
        grown = _activated(product(f"{name}intermediate.dense", read), layer)
        fed = _adapted(product(f"{name}output.dense", grown), layer._feedforward_dropout)
        read, hidden = norm(
            hidden + fed,
            f"{name}output.LayerNorm",
            layer._feedforward_layer_norm,
            smooth_of(_after(number, backbone)),
        )
    return product(_PROJECTION, read) if _PROJECTION in products else hidden


def _after(number: int, backbone: Any) -> str:
    """The product that reads what a layer gives."""
    last = number + 1 == len(backbone.transformer_layers)
    return _PROJECTION if last else f"encoder.layer.{number + 1}.attention.self"


class Function(NamedTuple):
    """What a model computes, in tensors.

    Attributes:
      call: Takes the tensors of ``signature`` by name, and gives one by name.
      signature: Name -> tf.TensorSpec.
    """

    call: Callable[..., Mapping[str, Any]]
    signature: Mapping[str, Any]


def query_function(two_tower: TwoTower) -> Function:
    """The query tower: the arrays of :func:`~tfrec.data.sequences.query_inputs`, of any length up
    to the model's -> ``query`` (b, d)."""
    config = two_tower.config
    widths = dict(zip(("profile", "attributes"), two_tower.widths, strict=True))
    nothing, profile, attributes = (
        np.zeros((1, width), np.float32) for width in (config.embedding_dim, *two_tower.widths)
    )
    found = query_inputs(no_history(), config.history, nothing, profile, attributes)
    used = {"vectors", "segment", "last", *two_tower.query_tower.tables}
    used |= {name for name, width in widths.items() if width}
    signature = {name: _many(found[name], name not in (*widths, "last")) for name in sorted(used)}

    def call(**batch: Any) -> dict[str, Any]:
        rows = tf.shape(batch["vectors"])[0]
        absent = {n: tf.zeros([rows, 1, 0]) for n in widths if n not in batch}
        return {"query": two_tower({**batch, **absent}, training=False)}

    return Function(call, signature)


def query_model(two_tower: TwoTower, int8: bool = False) -> bytes:
    """:func:`query_function` as a LiteRT model."""
    return convert(*query_function(two_tower), int8)


def candidate_function(
    two_tower: TwoTower, text_width: int, attributes_width: int
) -> Function | None:
    """The candidate tower for items without an id: ``text`` (n, text width) and ``attributes``
    (n, width), as far as there are any -> ``candidate`` (n, d). None: it reads neither."""
    widths = {"text": text_width, "attributes": attributes_width}
    signature = {n: tf.TensorSpec([None, width]) for n, width in widths.items() if width}

    def call(**given: Any) -> dict[str, Any]:
        rows = tf.shape(next(iter(given.values())))[0]
        text, attributes = (given.get(name, tf.zeros([rows, 0])) for name in widths)
        tower = two_tower.candidate_tower
        return {"candidate": tower.without_ids(text, attributes)}

    return Function(call, signature) if signature else None


def candidate_model(
    two_tower: TwoTower, text_width: int, attributes_width: int, int8: bool = False
) -> bytes | None:
    """:func:`candidate_function` as a LiteRT model."""
    found = candidate_function(two_tower, text_width, attributes_width)
    return None if found is None else convert(*found, int8)


def rank_function(ranker: Ranker) -> Function:
    """The ranker: the inputs of :meth:`Ranker.call`, as far as they have a width -> its tasks, one
    behind the other in ``tasks`` (b, c, tasks)."""
    names = [name for name, width in ranker.widths.items() if width]
    signature = {
        "query": tf.TensorSpec([None, ranker.widths["candidates"]]),
        "history": tf.TensorSpec([None, ranker.config.history, ranker.widths["candidates"]]),
        "history_mask": tf.TensorSpec([None, ranker.config.history]),
    }
    for name in names:
        rows = [None] if name in ("user_attributes", "profile") else [None, None]
        signature[name] = tf.TensorSpec([*rows, ranker.widths[name]])

    def call(**inputs: Any) -> dict[str, Any]:
        found = ranker(inputs, training=False)
        return {"tasks": tf.stack([found[task] for task in ranker.tasks], axis=-1)}

    return Function(call, signature)


def rank_model(ranker: Ranker, int8: bool = False) -> bytes:
    """:func:`rank_function` as a LiteRT model."""
    return convert(*rank_function(ranker), int8)


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


def _products(weights: Arrays, backbone: Any) -> dict[str, Product]:
    """The matrix products of all layers, as :func:`bert` wants them."""

    def product(*names: str, norm: str = "", by: Sequence[float] = (1.0,)) -> Product:
        kernel, bias = (
            np.concatenate([weights[f"{n}.{kind}"] * f for n, f in zip(names, by, strict=True)])
            for kind in ("weight", "bias")
        )
        if not norm:
            return Product(np.ascontiguousarray(kernel.T), bias)
        bias = bias + kernel @ weights[f"{norm}.bias"]
        return Product(np.ascontiguousarray(kernel.T), bias, normed=True)

    norm = "embeddings.LayerNorm"
    found = {}
    for number, layer in enumerate(backbone.transformer_layers):
        scaled = (heads_of(layer)[1] ** -0.5, 1.0, 1.0)
        name = f"encoder.layer.{number}."
        inner = f"{name}attention.self"
        parts = [f"{inner}.{part}" for part in ("query", "key", "value")]
        found[inner] = product(*parts, norm=norm, by=scaled)
        found[f"{name}attention.output.dense"] = product(f"{name}attention.output.dense")
        norm = f"{name}attention.output.LayerNorm"
        found[f"{name}intermediate.dense"] = product(f"{name}intermediate.dense", norm=norm)
        found[f"{name}output.dense"] = product(f"{name}output.dense")
        norm = f"{name}output.LayerNorm"
    if f"{_PROJECTION}.weight" in weights:
        found[_PROJECTION] = product(_PROJECTION, norm=norm)
    return found


def _inputs(
    encoder: TextEncoder, weights: Arrays, products: Mapping[str, Product], texts: Sequence[str]
) -> dict[str, Inputs]:
    """What each product is given when the BERT reads some of the texts in float32."""
    seen = {name: Inputs(len(product.kernel)) for name, product in products.items()}
    distinct = list(dict.fromkeys(texts))
    chosen = np.random.default_rng(0).permutation(len(distinct))[:_CALIBRATION].tolist()
    rows = list(encoder.tokenizer.ids(encoder.settings.prepared([distinct[i] for i in chosen], "")))
    held = np.searchsorted(np.cumsum([len(row) for row in rows]), _CALIBRATION) + 1
    for _, arrays in packed(rows[:held], _TOKENS):
        given = {name: tf.constant(array) for name, array in arrays.items()}
        hidden = bert(
            weights,
            encoder.model,
            products,
            **given,
            watch=lambda name, values: seen[name].add(values.numpy()),
        )
        if not np.isfinite(hidden.numpy()).all():
            raise InputError(_NOT_FINITE)
    return seen


def _embedded(weights: Arrays, token_ids: Any, positions: Any, int8: bool) -> Any:
    """float32 (t, width), words and places before their norm."""
    words = weights["embeddings.word_embeddings.weight"]
    places = weights[_PLACES] + weights["embeddings.token_type_embeddings.weight"][0]
    if not int8:
        return tf.gather(tf.constant(words), token_ids) + tf.gather(tf.constant(places), positions)
    # A few columns are large in all rows: without a scale of theirs, they take all the steps.
    size = np.sqrt(np.square(words).mean(axis=0) + np.square(places).mean(axis=0))
    columns = np.maximum(size, 1e-12).astype(np.float32)

    def rows(table: NDArray[np.float32], of: Any) -> Any:
        # Scales in float32 would be brought to int8 by the converter, all of them with one scale.
        codes, scales, unit = coded(table / columns)
        scale = tf.cast(tf.gather(tf.constant(scales), of), tf.float32) * unit
        return tf.cast(tf.gather(tf.constant(codes), of), tf.float32) * scale

    return (rows(words, token_ids) + rows(places, positions)) * columns


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


def _many(array: NDArray[Any], places: bool) -> Any:
    """The kind of an array with any number of rows and, if there are such, of places."""
    free = 2 if places else 1
    return tf.TensorSpec([None] * free + [*array.shape[free:]], tf.as_dtype(array.dtype))


def _check_finite(frozen: Any) -> None:
    for operation in frozen.graph.get_operations():
        if operation.type != "Const" or not operation.outputs[0].dtype.is_floating:
            continue
        if not np.isfinite(tf.make_ndarray(operation.get_attr("value"))).all():
            raise InputError(_NOT_FINITE)
