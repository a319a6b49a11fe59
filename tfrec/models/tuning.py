"""Tuning: which weights of a pretrained model move, and which few are added beside them.

The methods, each by its name in ``[adapt.tuning]``. At the start every one of them gives exactly
what the base gives, since what it adds begins with zeros.

- ``head``: nothing pretrained moves.
- ``full``: everything does, or the chosen layers (Howard & Ruder 2018, "ULMFiT",
  arXiv:1801.06146: top layers only, a rate for each layer, unfreezing from the top).
- ``lora``: a change of low rank to the projections of attention (Hu et al. 2021, "LoRA",
  arXiv:2106.09685). In the BERT it is Keras' own, on query and value, with a factor A for each
  head and a factor B that the heads share; in a behaviour encoder it is on qkv and project.
- ``adapter``: a bottleneck with a residual connection after attention and after the feed-forward
  layers (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning for NLP", arXiv:1902.00751).
- ``prompt``: learned keys and values in the attention of every layer (Li & Liang 2021, "Prefix-
  Tuning", arXiv:2101.00190; Liu et al. 2021, "P-Tuning v2", arXiv:2110.07602). Attention over them
  has a softmax of its own and is added, as in Zhang et al. 2023, "LLaMA-Adapter",
  arXiv:2303.16199, so that values of zero leave the base as it is; He et al. 2021, "Towards a
  Unified View", arXiv:2110.04366, show how near this is to a prefix in the same softmax. No place
  is added to the sequence, so positions and padding masks stay what they are.
- ``bitfit``: biases, those of the layer norms among them (Ben Zaken et al. 2021, "BitFit",
  arXiv:2106.10199).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from tfrec.config import TuningConfig
from tfrec.errors import ConfigError
from tfrec.models.behaviour import BehaviourEncoder
from tfrec.models.keras_bridge import keras3, tf, tf_keras
from tfrec.models.named import named_variables
from tfrec.models.text import TextEncoder

Depths = dict[int, int]
"""id of a variable that moves -> layers between its own and the topmost one that moves."""

_KEY_SPREAD = 0.5  # of the keys of prompts at the start


class Rate(NamedTuple):
    """How fast a variable learns.

    Attributes:
      share: Its learning rate, in that of the training.
      wait: Epochs before it moves.
    """

    share: float = 1.0
    wait: int = 0


@dataclass(frozen=True)
class Tuned:
    """What :func:`tune` made of a model.

    Attributes:
      config: How.
      text: The variables of the BERT that move.
      behaviour: The pretrained variables of the towers that move, and those added to them.
      behaviour_rate: Learning rate of these, in that of the training.
    """

    config: TuningConfig
    text: Depths
    behaviour: Depths
    behaviour_rate: float = 1.0

    def rates(self, variables: Sequence[Any]) -> list[Rate]:
        """A rate for each variable; what is neither in the BERT nor pretrained has the full one."""
        return [self._rate(variable) for variable in variables]

    def _rate(self, variable: Any) -> Rate:
        config, place = self.config, id(variable)
        depth = self.text.get(place, self.behaviour.get(place))
        if depth is None:
            return Rate()
        share = text_rate(config) if place in self.text else self.behaviour_rate
        return Rate(share * config.layer_decay**depth, config.unfreeze_epochs * depth)


def text_rate(config: TuningConfig) -> float:
    """Learning rate of what moves in the BERT, in that of the training."""
    if config.text_rate is not None:
        return config.text_rate
    return 0.025 if config.text == "full" else 0.25


def behaviour_rate(config: TuningConfig, pretrained: Collection[str]) -> float:
    """Learning rate of pretrained towers that move, in that of the training.

    Where even the items' ids are pretrained there is nothing new that they would have to follow: on
    MovieLens-100K the full rate loses what pretraining gave.
    """
    if config.behaviour != "full":
        return 1.0  # little moves, and most of it is new
    if config.behaviour_rate is not None:
        return config.behaviour_rate
    return 0.15 if "candidate_tower.ids" in pretrained else 1.0


def tune(model: Any, config: TuningConfig, pretrained: Collection[str] = ()) -> Tuned:
    """Applies ``[adapt.tuning]`` to a TwoTower, base weights already in it.

    Args:
      model: A :class:`~tfrec.models.retrieval.TwoTower`, not yet compiled.
      config: The methods.
      pretrained: Names, as :func:`~tfrec.models.named.named_variables` gives them, of the weights
        outside of the BERT that are pretrained; all others are new and always train.

    Raises:
      ConfigError: a chosen layer does not exist.
    """
    text = {} if model.encoder is None else tune_text(model.encoder, config)
    behaviour = tune_behaviour(model, config, pretrained) if pretrained else {}
    return Tuned(config, text, behaviour, behaviour_rate(config, pretrained))


# --- the BERT ---


def tune_text(encoder: TextEncoder, config: TuningConfig) -> Depths:
    """Makes the BERT's weights move as ``config.text`` says; call it once, before training.

    Raises:
      ConfigError: a chosen layer does not exist.
    """
    layers = encoder.model.transformer_layers
    chosen = _chosen(config.layers, len(layers), "layers", "this BERT")
    for variable in encoder.model.variables:
        variable.trainable = False
    moving = [_text_moving(layers[number], number, config) for number in chosen]
    if not config.layers:
        moving.append(_embeddings(encoder.model, config.text))
    for variable in (variable for level in moving for variable in level):
        variable.trainable = True
    encoder.trainable = config.text != "head"
    if config.recompute:
        recompute(encoder)
    encoder.retrace()
    depths = {id(v.value): depth for depth, level in enumerate(moving) for v in level}
    if encoder.projection is not None:
        encoder.projection.trainable = config.text == "full"
        depths |= {id(v): 0 for v in encoder.projection.trainable_weights}
    return depths


def _text_moving(layer: Any, number: int, config: TuningConfig) -> list[Any]:
    """Keras 3 variables of a BERT's layer that move; those of the method are added."""
    attention, name = layer._self_attention_layer, f"transformer_layer_{number}"
    if config.text == "head":
        return []
    if config.text == "lora":
        dense = (attention.query_dense, attention.value_dense)
        for one in dense:
            one.enable_lora(config.rank)
        return [v for one in dense for v in (one.lora_kernel_a, one.lora_kernel_b)]
    if config.text == "adapter":
        added = []
        for part in ("self_attention", "feedforward"):
            inner = getattr(layer, f"_{part}_dropout")
            adapter = TextAdapter(inner, config.bottleneck, f"{name}_{part}_adapter")
            adapter.build((None, None, layer._feedforward_output_dense.bias.shape[0]))
            _attach(layer, f"_{part}_dropout", adapter)
            added += [*adapter.down.variables, *adapter.up.variables]
        return added
    if config.text == "prompt":
        prefix = TextPrefix(attention, config.prompts, f"{name}_prefix")
        _attach(attention, "_prefix", prefix)
        _add_to_attention(attention, prefix)
        return list(prefix.variables)
    return [v for v in layer.variables if _moves(v.path, config.text)]


def _embeddings(backbone: Any, method: str) -> list[Any]:
    layers = (
        backbone.token_embedding,
        backbone.position_embedding,
        backbone.segment_embedding,
        backbone.embeddings_layer_norm,
    )
    return [v for layer in layers for v in layer.variables if _moves(v.path, method)]


def _moves(path: str, method: str) -> bool:
    if "seed_generator" in path:
        return False
    return method == "full" or (method == "bitfit" and path.endswith(("/bias", "/beta")))


class TextAdapter(keras3.layers.Layer):
    """Dropout, then a bottleneck with a residual connection."""

    def __init__(self, dropout: Any, bottleneck: int, name: str) -> None:
        super().__init__(name=name, dtype=dropout.dtype_policy)
        self.dropout, self.bottleneck = dropout, bottleneck

    def build(self, shape: Any) -> None:
        """Makes the two Dense layers."""
        policy = {"dtype": self.dtype_policy}
        self.down = keras3.layers.Dense(self.bottleneck, "gelu", name="down", **policy)
        self.up = keras3.layers.Dense(
            shape[-1], kernel_initializer="zeros", name="up", dtype=self.dtype_policy
        )
        self.down.build(shape)
        self.up.build((*shape[:-1], self.bottleneck))

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Same shape as ``inputs``."""
        values = self.dropout(inputs, training=training)
        return values + self.up(self.down(values))


class TextPrefix(keras3.layers.Layer):
    """Queries (batch, length, heads, size) -> what attention over learned places adds to them."""

    def __init__(self, attention: Any, prompts: int, name: str) -> None:
        super().__init__(name=name, dtype=attention.dtype_policy)
        heads, size = attention.query_dense.bias.shape
        shape = (prompts, heads, size)
        spread = keras3.initializers.RandomNormal(stddev=_KEY_SPREAD)
        self.scale = size**-0.5
        self.keys = self.add_weight(name="keys", shape=shape, initializer=spread)
        self.values = self.add_weight(name="values", shape=shape, initializer="zeros")
        self.built = True

    def call(self, query: Any) -> Any:
        """The shape of ``query``."""
        scores = tf.einsum("blhd,phd->bhlp", query, tf.cast(self.keys, query.dtype)) * self.scale
        weights = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32)), query.dtype)
        return tf.einsum("bhlp,phd->blhd", weights, tf.cast(self.values, query.dtype))


def _attach(layer: Any, name: str, value: Any) -> None:
    """Gives a built Keras 3 layer one more, as Keras does for LoRA."""
    layer._tracker.unlock()
    setattr(layer, name, value)
    layer._tracker.lock()


def _add_to_attention(attention: Any, prefix: Any) -> None:
    """Adds what the prefix gives before the heads are put together."""
    plain = attention._compute_attention

    def with_prefix(query: Any, *others: Any, **settings: Any) -> tuple[Any, Any]:
        found, scores = plain(query, *others, **settings)
        return found + prefix(query), scores

    attention._compute_attention = with_prefix


def recompute(encoder: TextEncoder) -> None:
    """In training keeps the inputs of a BERT's layers alone, and runs each again for its gradients.

    Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", arXiv:1604.06174. The second
    run drops out what the first did: both take their seeds from before the first.
    """
    for layer in encoder.model.transformer_layers:
        _recompute(layer)
    encoder.retrace()


def _recompute(layer: Any) -> None:
    plain = layer.call
    inner = layer._flatten_layers(include_self=False)
    found = (getattr(one, "seed_generator", None) for one in inner)
    generators = list({id(one): one for one in found if one is not None}.values())

    def call(inputs: Any, padding_mask: Any = None, training: bool | None = None) -> Any:
        if not training:
            return plain(inputs, padding_mask=padding_mask, training=training)
        seeds = [generator.next() for generator in generators]

        def run(inputs: Any, padding_mask: Any) -> Any:
            with _drawing(generators, seeds):
                return plain(inputs, padding_mask=padding_mask, training=True)

        return tf.recompute_grad(run)(inputs, padding_mask)

    layer.call = call


@contextmanager
def _drawing(generators: Sequence[Any], seeds: Sequence[Any]) -> Iterator[None]:
    """Keras 3 generators give these seeds, and their states stay."""
    for generator, seed in zip(generators, seeds, strict=True):
        generator.next = lambda ordered=True, seed=seed: seed
    try:
        yield
    finally:
        for generator in generators:
            del generator.next


# --- behaviour encoders ---


def tune_behaviour(
    model: Any, config: TuningConfig, pretrained: Collection[str] | None = None
) -> Depths:
    """Makes pretrained weights around a BehaviourEncoder move as ``config.behaviour`` says.

    Args:
      model: A built tf_keras layer that is or holds one
        :class:`~tfrec.models.behaviour.BehaviourEncoder`.
      config: The method.
      pretrained: Names of its pretrained weights; None: all.

    Raises:
      ConfigError: a chosen block does not exist.
    """
    method, layers = config.behaviour, config.behaviour_layers
    encoder = _behaviour_encoder(model)
    chosen = _chosen(layers, len(encoder.blocks), "behaviour_layers", "this behaviour encoder")
    named = named_variables(model)
    old = {id(named[name]): name for name in (named if pretrained is None else pretrained)}
    levels = [[*encoder.blocks[number].trainable_variables] for number in chosen]
    levels[:1] = [[*encoder.norm.trainable_variables, *(levels[0] if levels else [])]]
    inside = {id(v) for level in levels for v in level}
    inside |= {id(v) for block in encoder.blocks for v in block.trainable_variables}
    if not layers:
        levels.append([v for v in named.values() if id(v) not in inside])
    moving = [[v for v in level if _stays_free(v, old, method)] for level in levels]
    _freeze(model, set(old) - {id(v) for level in moving for v in level})
    for depth, number in enumerate(chosen):
        moving[depth] += _add_to_block(encoder.blocks[number], config)
    return {id(v): depth for depth, level in enumerate(moving) for v in level}


def _stays_free(variable: Any, old: Mapping[int, str], method: str) -> bool:
    if id(variable) not in old:
        return False  # new: it moves anyway, and is none of this
    # A table of biases for distances is called `bias` too.
    bias = old[id(variable)].endswith((".bias", ".beta")) and variable.shape.rank == 1
    return method == "full" or (method == "bitfit" and bias)


def _behaviour_encoder(model: Any) -> BehaviourEncoder:
    found = [part for part in (model, *model.submodules) if isinstance(part, BehaviourEncoder)]
    if len(found) != 1:
        raise ConfigError(f"{model.name} has {len(found)} behaviour encoders; one can be tuned")
    return found[0]


def _freeze(model: Any, variables: Collection[int]) -> None:
    """Takes single variables of tf_keras layers out of what is trained."""
    for layer in model._flatten_layers():
        for variable in [v for v in layer._trainable_weights if id(v) in variables]:
            layer._trainable_weights.remove(variable)
            layer._non_trainable_weights.append(variable)


def _add_to_block(block: Any, config: TuningConfig) -> list[Any]:
    method, width = config.behaviour, block.width
    if method == "lora":
        block.qkv, block.project = (
            LowRank(dense, config.rank, name=f"{dense.name}_lora")
            for dense in (block.qkv, block.project)
        )
        return [*block.qkv.trainable_variables, *block.project.trainable_variables]
    if method == "adapter":
        block.attention_adapter = Bottleneck(width, config.bottleneck, name="attention_adapter")
        block.feed_adapter = Bottleneck(width, config.bottleneck, name="feed_adapter")
        added = (block.attention_adapter, block.feed_adapter)
        return [v for layer in added for v in layer.trainable_variables]
    if method == "prompt":
        block.prefix = Prefix(block.heads, width // block.heads, config.prompts, name="prefix")
        return list(block.prefix.trainable_variables)
    return []


class LowRank(tf_keras.layers.Layer):
    """A frozen Dense layer and a change of low rank to its kernel.

    Args:
      dense: A built Dense layer.
      rank: Rank of the change.
    """

    def __init__(self, dense: Any, rank: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.dense = dense
        inner, outer = dense.kernel.shape
        self.a = self.add_weight(name="a", shape=(inner, rank), initializer="he_uniform")
        self.b = self.add_weight(name="b", shape=(rank, outer), initializer="zeros")
        self.built = True

    def call(self, inputs: Any) -> Any:
        """(…, in) -> (…, out)."""
        return self.dense(inputs) + tf.matmul(tf.matmul(inputs, self.a), self.b)

    def folded(self) -> Any:
        """The Dense layer, with the change in its kernel."""
        self.dense.kernel.assign_add(tf.matmul(self.a, self.b))
        return self.dense


class Bottleneck(tf_keras.layers.Layer):
    """Two small Dense layers and a residual connection, at first the identity.

    Args:
      width: Of inputs and outputs.
      bottleneck: Width between.
    """

    def __init__(self, width: int, bottleneck: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.down = tf_keras.layers.Dense(bottleneck, tf.nn.gelu, name="down")
        self.up = tf_keras.layers.Dense(width, kernel_initializer="zeros", name="up")
        self.down.build((None, width))
        self.up.build((None, bottleneck))
        self.built = True

    def call(self, inputs: Any) -> Any:
        """Same shape as ``inputs``."""
        return inputs + self.up(self.down(inputs))


class Prefix(tf_keras.layers.Layer):
    """Queries -> what attention over learned places adds to the heads' outputs, at first nothing.

    Args:
      heads: Attention heads.
      size: Width of a head.
      prompts: Learned places.
    """

    def __init__(self, heads: int, size: int, prompts: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        shape = (heads, prompts, size)
        spread = tf_keras.initializers.RandomNormal(stddev=_KEY_SPREAD)
        self.keys = self.add_weight(name="keys", shape=shape, initializer=spread)
        self.values = self.add_weight(name="values", shape=shape, initializer="zeros")
        self.scale = size**-0.5
        self.built = True

    def call(self, query: Any) -> Any:
        """(batch, heads, length, size) -> the same shape."""
        scores = tf.matmul(query, tf.cast(self.keys, query.dtype), transpose_b=True) * self.scale
        weights = tf.cast(tf.nn.softmax(tf.cast(scores, tf.float32)), query.dtype)
        return tf.matmul(weights, tf.cast(self.values, query.dtype))


# --- both ---


def _chosen(layers: Sequence[int], count: int, key: str, what: str) -> list[int]:
    """Numbers of the layers, topmost first."""
    for number in layers:
        if not -count <= number < count:
            raise ConfigError(
                f"adapt.tuning.{key} names layer {number}, and {what} has {count}: "
                f"0 to {count - 1}, or -1 to {-count} from the top"
            )
    numbers = range(count) if not layers else {number % count for number in layers}
    return sorted(numbers, reverse=True)


def merge(model: Any) -> None:
    """Folds the changes of ``lora`` into the kernels of a layer, and takes its parts out again.

    Afterwards the layer has the weights of its base and no others, and gives the same up to the
    rounding of floats. ``full`` and ``bitfit`` have nothing to fold, and adapters and prompts
    cannot be folded: they stay.

    Args:
      model: A TextEncoder, a layer with a behaviour encoder, or a TwoTower.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, TextEncoder):
            for inner in layer.model._flatten_layers():
                if getattr(inner, "lora_enabled", False):
                    _fold(inner)
            layer.retrace()
    for layer in list(model._flatten_layers()):
        if isinstance(getattr(layer, "qkv", None), LowRank):
            layer.qkv, layer.project = layer.qkv.folded(), layer.project.folded()


def _fold(layer: Any) -> None:
    layer._kernel.assign(layer.kernel)
    layer.lora_enabled, layer.lora_rank, layer.lora_alpha = False, None, None
    layer._tracker.unlock()
    for name in ("lora_kernel_a", "lora_kernel_b"):
        delattr(layer, name)
    layer._tracker.lock()


def difference(model: Any) -> dict[str, Any]:
    """The weights that a model's training moves, by name: what it differs from its base in."""
    trained = {id(v) for v in model.trainable_variables}
    return {name: v for name, v in named_variables(model).items() if id(v) in trained}


def count(variables: Collection[Any]) -> int:
    """Numbers in variables."""
    return sum(int(np.prod(v.shape)) for v in variables)
