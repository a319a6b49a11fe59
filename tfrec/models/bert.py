"""BertBackbone <-> a Hugging Face folder.

keras-hub reads such folders itself. What it does not read out of them is added here: the
activation, the epsilon of the layer norms, the dropout, and weights without a pooler.
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
        with _with_pooler(folder) as complete:
            backbone = keras_hub.models.BertBackbone.from_preset(str(complete), **settings)
    except Exception as error:  # noqa: BLE001 - whatever a foreign file makes keras-hub raise
        reason = str(error).strip().partition("\n")[0]
        raise InputError(f"the BERT in {folder} cannot be loaded: {reason}") from None
    backbone.pooled_dense.trainable = False
    for layer in backbone.transformer_layers:
        _multiply_once(layer._feedforward_intermediate_dense)
        _multiply_once(layer._feedforward_output_dense)
    if hugging_face:
        _adjust(backbone, config)
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
    (folder / "config.json").write_text(json.dumps(config, indent=1), "utf-8")


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


def tensors(backbone: Any) -> dict[str, NDArray[np.float32]]:
    """The weights under Hugging Face's names and in its shapes."""
    embedding = "embeddings.{}_embeddings.weight"
    out = {
        embedding.format("word"): backbone.token_embedding.embeddings,
        embedding.format("position"): backbone.position_embedding.position_embeddings,
        embedding.format("token_type"): backbone.segment_embedding.embeddings,
        **_norm("embeddings.LayerNorm", backbone.embeddings_layer_norm),
    }
    for number, layer in enumerate(backbone.transformer_layers):
        name, attention = f"encoder.layer.{number}.", layer._self_attention_layer
        out |= _norm(f"{name}attention.output.LayerNorm", layer._self_attention_layer_norm)
        out |= _norm(f"{name}output.LayerNorm", layer._feedforward_layer_norm)
        dense = {
            "attention.self.query": attention.query_dense,
            "attention.self.key": attention.key_dense,
            "attention.self.value": attention.value_dense,
            "attention.output.dense": attention.output_dense,
            "intermediate.dense": layer._feedforward_intermediate_dense,
            "output.dense": layer._feedforward_output_dense,
        }
        for part, source in dense.items():
            out |= _dense(name + part, source)
    out |= _dense("pooler.dense", backbone.pooled_dense)
    return {name: np.ascontiguousarray(np.asarray(v, np.float32)) for name, v in out.items()}


def _norm(name: str, layer: Any) -> dict[str, Any]:
    return {f"{name}.weight": layer.gamma, f"{name}.bias": layer.beta}


def _dense(name: str, layer: Any) -> dict[str, Any]:
    """Kernel (in, out), perhaps with heads apart, -> weight (out, in)."""
    kernel, bias = np.asarray(layer.kernel), np.asarray(layer.bias).reshape(-1)
    return {f"{name}.weight": kernel.reshape(-1, bias.size).T, f"{name}.bias": bias}
