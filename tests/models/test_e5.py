"""multilingual-e5-small: the packed file taken apart, and its tokenizer rebuilt."""

import struct

import numpy as np
import pytest
from safetensors.numpy import load_file

from tfrec.data.tokens import TextTokenizer
from tfrec.errors import SetupError
from tfrec.models import e5, weights
from tfrec.models.bert import load_backbone

WIDTH, LAYERS, HEADS, INNER, POSITIONS = 32, 1, 2, 64, 24
PIECES = ["<s>", "<pad>", "</s>", "<unk>", "\u2581", "\u2581ab", "a", "b", "c", "\u2581c", "<mask>"]
SCORES = np.array([0, 0, 0, 0, -3, -2, -4, -4, -4, -2.5, 0], np.float32)


def block(scale: float, nibbles: list[int]) -> bytes:
    """32 weights: byte j holds weight j in its low half and weight j + 16 in its high half."""
    halves = [low | high << 4 for low, high in zip(nibbles[:16], nibbles[16:], strict=True)]
    return np.float16(scale).tobytes() + bytes(halves)


def tensors(generator: np.random.Generator) -> dict[str, tuple[int, bytes]]:
    def four_bits(rows: int, width: int) -> tuple[int, bytes]:
        count = rows * width // 32
        return 1, b"".join(
            block(0.05, generator.integers(0, 16, 32).tolist()) for _ in range(count)
        )

    def plain(*shape: int) -> tuple[int, bytes]:
        return 0, generator.normal(0, 1, shape).astype("<f4").tobytes()

    out = {
        "emb.word": four_bits(len(PIECES), WIDTH),
        "emb.pos": plain(POSITIONS, WIDTH),
        "emb.type": plain(2, WIDTH),
        "emb.ln.w": plain(WIDTH),
        "emb.ln.b": plain(WIDTH),
    }
    for part in ("q", "k", "v", "ao"):
        out |= {f"l0.{part}.w": four_bits(WIDTH, WIDTH), f"l0.{part}.b": plain(WIDTH)}
    out |= {"l0.fi.w": four_bits(INNER, WIDTH), "l0.fi.b": plain(INNER)}
    out |= {"l0.fo.w": four_bits(WIDTH, INNER), "l0.fo.b": plain(WIDTH)}
    for part in ("aln", "oln"):
        out |= {f"l0.{part}.w": plain(WIDTH), f"l0.{part}.b": plain(WIDTH)}
    return out


def packed_file(stored: dict[str, tuple[int, bytes]]) -> bytes:
    blob = "".join(PIECES).encode()
    ends = np.cumsum([0, *(len(piece.encode()) for piece in PIECES)]).astype("<u4")
    head = b"E5S1" + struct.pack("<i", 1)
    head += struct.pack("<7i", WIDTH, LAYERS, HEADS, INNER, len(PIECES), POSITIONS, 2)
    head += struct.pack("<fi", 1e-12, 32) + struct.pack("<5i", len(PIECES), 0, 2, 1, 3)
    head += struct.pack("<Q", len(blob)) + ends.tobytes() + SCORES.tobytes() + blob
    head += struct.pack("<iI", 1, 9) + bytes(9) + struct.pack("<i", len(stored))
    size = len(head) + sum(2 + len(name) + 21 for name in stored)
    directory, body = b"", b""
    for name, (kind, content) in stored.items():
        directory += struct.pack("<H", len(name)) + name.encode()
        directory += struct.pack("<BIQQ", kind, 0, size + len(body), len(content))
        body += content
    return head + directory + body


@pytest.fixture
def converted(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    stored = tensors(np.random.default_rng(0))
    stored["l0.q.w"] = (1, block(0.5, [*range(16), *[8] * 16]) * WIDTH)
    (tmp_path / "in" / e5.FILE).write_bytes(packed_file(stored))
    monkeypatch.setattr(e5, "DIGEST", weights.file_digest(tmp_path / "in" / e5.FILE))
    e5.convert(tmp_path / "in", tmp_path / "out")
    return tmp_path / "out"


def test_four_bit_blocks_become_the_weights_they_mean(converted):
    query = load_file(converted / "model.safetensors")[
        "encoder.layer.0.attention.self.query.weight"
    ]
    assert query.shape == (WIDTH, WIDTH)
    want = [(value - 8) * 0.5 for value in range(16)] + [0.0] * 16
    np.testing.assert_array_equal(query[0], np.array(want, np.float32))


def test_the_folder_is_a_bert_that_keras_nlp_loads_with_a_pooler_of_zeros(converted):
    backbone = load_backbone(weights.find(converted))
    assert (backbone.num_layers, backbone.hidden_dim, backbone.max_sequence_length) == (1, 32, 24)
    np.testing.assert_array_equal(backbone.pooled_dense.kernel, np.zeros((WIDTH, WIDTH)))


def test_the_bytes_written_do_not_depend_on_a_library(tmp_path):
    values = {"a": np.arange(3, dtype=np.float32), "b": np.ones((2, 2), np.float32)}
    e5.write_safetensors(tmp_path / "x.safetensors", values)
    found = load_file(tmp_path / "x.safetensors")
    assert list(found) == ["a", "b"]
    np.testing.assert_array_equal(found["b"], values["b"])


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("ab c", ["\u2581ab", "\u2581c"]),
        ("  ab\t\n c ", ["\u2581ab", "\u2581c"]),
        ("", []),
        ("ac", ["\u2581", "a", "c"]),
        ("ab\u200bc", ["\u2581ab", "\u2581c"]),  # a zero-width space is a space
        ("\uff41\uff42", ["\u2581ab"]),  # full width
        ("ab z", ["\u2581ab", "\u2581", "<unk>"]),
        ("\uff5e", ["\u2581", "<unk>"]),
    ],
)
def test_the_tokenizer_is_xlm_roberta(converted, text, pieces):
    want = [0, *(PIECES.index(piece) for piece in pieces), 2]
    assert list(TextTokenizer.load(converted).ids([text])) == [want]


def test_the_wide_tilde_stays_what_it_is():
    normalizer = e5.unigram_tokenizer(PIECES, SCORES).normalizer
    assert normalizer.normalize_str("\uff5e~\uff21") == "\uff5e~A"


def test_another_file_is_refused(tmp_path):
    (tmp_path / e5.FILE).write_bytes(b"E5S1")
    with pytest.raises(SetupError, match="does not have the SHA-256 1571fc982750"):
        e5.convert(tmp_path, tmp_path)
