"""A BERT of 2 layers, 32 wide, with random weights, as a Hugging Face folder."""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

WORDS = ["the", "film", "war", "love", "story", "of", "space", "ship", "1999", "(", ")", "."]
LETTERS = list("abcdefghijklmnopqrstuvwxyz0123456789")
VOCABULARY = [
    *("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
    *WORDS,
    *LETTERS,
    *(f"##{letter}" for letter in LETTERS),
]
WIDTH, INNER, POSITIONS = 32, 64, 64


def write_tiny_bert(folder: Path, seed: int = 0, pooler: bool = True, **config: object) -> Path:
    """Writes config.json, vocab.txt, tokenizer_config.json and model.safetensors; no pooling."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": WIDTH,
        "intermediate_size": INNER,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
        "max_position_embeddings": POSITIONS,
        "type_vocab_size": 2,
        "vocab_size": len(VOCABULARY),
        "layer_norm_eps": 1e-12,
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    layers, segments = (int(str(settings[k])) for k in ("num_hidden_layers", "type_vocab_size"))
    shapes = tiny_shapes(pooler, segments, layers)
    save_file(random_tensors(shapes, seed), str(folder / "model.safetensors"))
    return folder


def tiny_shapes(pooler: bool, segments: int, layers: int) -> dict[str, tuple[int, ...]]:
    """Hugging Face's names of the weights -> their shapes."""
    shapes = {
        "embeddings.word_embeddings.weight": (len(VOCABULARY), WIDTH),
        "embeddings.position_embeddings.weight": (POSITIONS, WIDTH),
        "embeddings.token_type_embeddings.weight": (segments, WIDTH),
    }
    dense = {"pooler.dense": (WIDTH, WIDTH)} if pooler else {}
    norms = ["embeddings.LayerNorm"]
    for number in range(layers):
        layer = f"encoder.layer.{number}."
        for part in ("self.query", "self.key", "self.value", "output.dense"):
            dense[f"{layer}attention.{part}"] = (WIDTH, WIDTH)
        dense[f"{layer}intermediate.dense"] = (INNER, WIDTH)
        dense[f"{layer}output.dense"] = (WIDTH, INNER)
        norms += [f"{layer}attention.output.LayerNorm", f"{layer}output.LayerNorm"]
    for name, shape in dense.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (WIDTH,), f"{name}.bias": (WIDTH,)}
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights of a size at which no layer is saturated and none is idle."""
    generator = np.random.default_rng(seed)
    return {
        name: (generator.normal(0, 0.3, shape) + name.endswith("Norm.weight")).astype(np.float32)
        for name, shape in shapes.items()
    }
