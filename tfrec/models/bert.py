"""BertBackbone <-> a Hugging Face folder.

keras-hub reads such folders itself. What it does not read out of them is added here: the
activation, the epsilon of the layer norms, the dropout, weights without a pooler, and layers that
lost heads. Hugging Face lists these heads as ``pruned_heads`` in config.json and keeps the smaller
kernels (https://github.com/huggingface/transformers/pull/1077), and so do we.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tfrec.data.tokens import read_json
from tfrec.errors import InputError
from tfrec.models.keras_bridge import keras3, keras_hub

Arrays = Mapping[str, NDArray[np.float32]]
"""Weights under Hugging Face's names and in its shapes."""


def load_backbone(folder: Path, dtype: str | None = "float32") -> Any:
    """Reads the BERT in a Hugging Face folder or a keras-nlp preset folder.

    Args:
      folder: What :func:`tfrec.models.weights.find` returned.
      dtype: What the BERT computes in; None: the global policy.

    Returns:
      A keras-nlp ``BertBackbone`` whose pooler is not trained, as nothing of ours reads it.

    Raises:
      InputError: a file is damaged, or wants something that a BertBackbone cannot do.
    """
    config = read_json(folder / "config.json")
    settings: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
    hugging_face = "model_type" in config
    if hugging_face:
        _check(config, folder)
        settings["num_segments"] = config.get("type_vocab_size", 2)
        settings["dropout"] = config.get("hidden_dropout_prob", 0.1)
    try:
        if config.get("pruned_heads"):
            return build_backbone(config, _arrays(folder), dtype)
        with _with_pooler(folder) as complete:
            backbone = keras_hub.models.BertBackbone.from_preset(str(complete), **settings)
    except Exception as error:  # noqa: BLE001 - whatever a foreign file makes keras-hub raise
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"the BERT in {folder} cannot be loaded: {reason}") from None
    _prepare(backbone)
    if hugging_face:
        _adjust(backbone, config)
    return backbone


def build_backbone(config: Mapping[str, Any], arrays: Arrays, dtype: Any = "float32") -> Any:
    """A ``BertBackbone`` with given weights, of whose layers some may have lost heads.

    Args:
      config: What config.json says; see :func:`config_of`.
      arrays: The weights; without a pooler, it is zeros.
      dtype: What the BERT computes in; None: the global policy.

    Raises:
      ValueError: a weight is missing or has another shape than the configuration says.
    """
    backbone = keras_hub.models.BertBackbone(
        vocabulary_size=config["vocab_size"],
        num_layers=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        hidden_dim=config["hidden_size"],
        intermediate_dim=config["intermediate_size"],
        dropout=config.get("hidden_dropout_prob", 0.1),
        max_sequence_length=config["max_position_embeddings"],
        num_segments=config.get("type_vocab_size", 2),
        dtype=dtype,
    )
    for number, pruned in (config.get("pruned_heads") or {}).items():
        if pruned:
            _prune(backbone.transformer_layers[int(number)], len(set(pruned)))
    _prepare(backbone)
    _adjust(backbone, config)
    expected = tensors(backbone)
    for name, variable in _parts(backbone):
        given = arrays.get(name)
        if given is None and name.startswith("pooler."):
            given = np.zeros_like(expected[name])
        if given is None:
            raise ValueError(f"the weight '{name}' is missing")
        if given.shape != expected[name].shape:
            raise ValueError(
                f"the weight '{name}' is {given.shape} and should be {expected[name].shape}"
            )
        value = given.T if _is_kernel(name) else given
        variable.assign(value.reshape(variable.shape))
    return backbone


def save_backbone(backbone: Any, folder: Path, activation: str = "gelu") -> None:
    """Writes config.json and model.safetensors, which Hugging Face and keras-hub read.

    Args:
      backbone: A ``BertBackbone``.
      folder: An existing folder.
      activation: What config.json says of the feed-forward layers.
    """
    from safetensors.numpy import save_file

    save_file(tensors(backbone), str(folder / "model.safetensors"), metadata={"format": "pt"})
    config = config_of(backbone, activation)
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")


def config_of(backbone: Any, activation: str = "gelu") -> dict[str, Any]:
    """What config.json says of a ``BertBackbone``; for the arguments see :func:`save_backbone`."""
    heads = int(backbone.num_heads)
    config = {
        "architectures": ["BertModel"],
        "model_type": "bert",
        "hidden_act": activation,
        "hidden_size": backbone.hidden_dim,
        "intermediate_size": backbone.intermediate_dim,
        "num_attention_heads": backbone.num_heads,
        "num_hidden_layers": backbone.num_layers,
        "max_position_embeddings": backbone.max_sequence_length,
        "type_vocab_size": backbone.num_segments,
        "vocab_size": backbone.vocabulary_size,
        "hidden_dropout_prob": backbone.dropout,
        "attention_probs_dropout_prob": backbone.dropout,
        "layer_norm_eps": float(backbone.embeddings_layer_norm.epsilon),
        "pad_token_id": 0,
    }
    # Which heads they were says nothing any more: the others have moved up.
    pruned = {
        str(number): list(range(count, heads))
        for number, count in enumerate(heads_of(layer)[0] for layer in backbone.transformer_layers)
        if count < heads
    }
    return {**config, "pruned_heads": pruned} if pruned else config


def heads_of(layer: Any) -> tuple[int, int]:
    """Heads of a transformer layer, and their size."""
    heads, size = layer._self_attention_layer.query_dense.bias.shape
    return int(heads), int(size)


def _check(config: Mapping[str, Any], folder: Path) -> None:
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise InputError(f"{folder} has {positions} positions; a BertBackbone has absolute ones")
    if config.get("hidden_act", "gelu") not in _activations():
        raise InputError(
            f"{folder} has the activation '{config['hidden_act']}'; "
            f"known are {', '.join(_activations())}"
        )


def _activations() -> dict[str, Any]:
    """Hugging Face's name -> Keras 3's function; None: what keras-hub takes anyway."""
    return {
        "gelu": keras3.activations.gelu,
        "gelu_new": None,
        "gelu_pytorch_tanh": None,
        "relu": keras3.activations.relu,
    }


def _adjust(backbone: Any, config: Mapping[str, Any]) -> None:
    """Sets what keras-hub takes for granted: GELU by its tanh approximation, epsilon 1e-12."""
    activation = _activations()[config.get("hidden_act", "gelu")]
    epsilon = float(config.get("layer_norm_eps", 1e-12))
    backbone.embeddings_layer_norm.epsilon = epsilon
    for layer in backbone.transformer_layers:
        layer._self_attention_layer_norm.epsilon = epsilon
        layer._feedforward_layer_norm.epsilon = epsilon
        if activation is not None:
            layer._feedforward_intermediate_dense.activation = activation


def _prepare(backbone: Any) -> None:
    backbone.pooled_dense.trainable = False
    for layer in backbone.transformer_layers:
        _multiply_once(layer._feedforward_intermediate_dense)
        _multiply_once(layer._feedforward_output_dense)


def _prune(layer: Any, count: int) -> None:
    """Takes ``count`` heads out of a layer; the others keep their size."""
    old = layer._self_attention_layer
    heads, size = heads_of(layer)
    width = int(layer._feedforward_output_dense.bias.shape[0])
    with keras3.name_scope(layer.name, caller=layer):
        new = keras3.layers.MultiHeadAttention(
            num_heads=heads - count,
            key_dim=size,
            dropout=layer.dropout,
            dtype=old.dtype_policy,
            name=old.name,
        )
        new.build(*[(None, None, width)] * 2)
    place = layer._layers.index(old)
    layer._tracker.unlock()
    layer._self_attention_layer = new
    layer._layers.remove(new)
    layer._layers[place] = new
    layer._tracker.lock()


def _multiply_once(dense: Any) -> None:
    """Makes a Dense see the tokens of all texts as one matrix, which gives the same numbers.

    As Keras 3 calls it, TensorFlow multiplies text by text, and oneDNN fuses neither the bias nor
    the activation into that.
    """
    plain = dense.call

    def call(inputs: Any, training: bool | None = None) -> Any:
        tokens = keras3.ops.reshape(inputs, (-1, inputs.shape[-1]))
        shape = (*keras3.ops.shape(inputs)[:-1], dense.units)
        return keras3.ops.reshape(plain(tokens, training=training), shape)

    dense.call = call


@contextlib.contextmanager
def _with_pooler(folder: Path) -> Iterator[Path]:
    """The folder, or a temporary one with zeros for the pooler that its weights do not have."""
    path = folder / "model.safetensors"
    if not path.is_file():
        yield folder
        return
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    with safe_open(str(path), framework="np") as tensors:
        names = list(tensors.keys())
    if any(name.endswith("pooler.dense.weight") for name in names):
        yield folder
        return
    width = int(read_json(folder / "config.json")["hidden_size"])
    with tempfile.TemporaryDirectory() as scratch:
        for file in folder.glob("*.json"):
            os.symlink(file.resolve(), Path(scratch) / file.name)
        zeros = {
            "pooler.dense.weight": np.zeros((width, width), np.float32),
            "pooler.dense.bias": np.zeros(width, np.float32),
        }
        save_file({**load_file(str(path)), **zeros}, str(Path(scratch) / path.name))
        yield Path(scratch)


def _arrays(folder: Path) -> dict[str, NDArray[np.float32]]:
    """The weights in a folder, whatever head their BERT is part of."""
    from safetensors.numpy import load_file

    found = load_file(str(folder / "model.safetensors"))
    return {name.removeprefix("bert."): value for name, value in found.items()}


def tensors(backbone: Any) -> dict[str, NDArray[np.float32]]:
    """The weights under Hugging Face's names and in its shapes."""
    found = {name: np.asarray(value, np.float32) for name, value in _parts(backbone)}
    for name, value in found.items():
        if _is_kernel(name):
            outputs = found[f"{name.removesuffix('.weight')}.bias"].size
            value = value.reshape(-1, outputs).T
        elif name.endswith(".bias"):
            value = value.reshape(-1)
        found[name] = np.ascontiguousarray(value)
    return found


def _parts(backbone: Any) -> Iterator[tuple[str, Any]]:
    """Hugging Face's names and what Keras has for them: kernels are (in, out), heads apart."""
    embedding = "embeddings.{}_embeddings.weight"
    yield embedding.format("word"), backbone.token_embedding.embeddings
    yield embedding.format("position"), backbone.position_embedding.position_embeddings
    yield embedding.format("token_type"), backbone.segment_embedding.embeddings
    norms = {"embeddings.LayerNorm": backbone.embeddings_layer_norm}
    dense: dict[str, Any] = {}
    for number, layer in enumerate(backbone.transformer_layers):
        name, attention = f"encoder.layer.{number}.", layer._self_attention_layer
        norms[f"{name}attention.output.LayerNorm"] = layer._self_attention_layer_norm
        norms[f"{name}output.LayerNorm"] = layer._feedforward_layer_norm
        dense |= {
            f"{name}attention.self.query": attention.query_dense,
            f"{name}attention.self.key": attention.key_dense,
            f"{name}attention.self.value": attention.value_dense,
            f"{name}attention.output.dense": attention.output_dense,
            f"{name}intermediate.dense": layer._feedforward_intermediate_dense,
            f"{name}output.dense": layer._feedforward_output_dense,
        }
    dense["pooler.dense"] = backbone.pooled_dense
    for name, norm in norms.items():
        yield f"{name}.weight", norm.gamma
        yield f"{name}.bias", norm.beta
    for name, one in dense.items():
        yield f"{name}.weight", one.kernel
        yield f"{name}.bias", one.bias


def _is_kernel(name: str) -> bool:
    return name.endswith(".weight") and not name.endswith(("LayerNorm.weight", "embeddings.weight"))
