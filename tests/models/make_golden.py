"""Makes golden_minilm.npz, what sentence-transformers says about the strings of golden_texts.py.

Not run by the tests: it needs an environment of its own with sentence-transformers (and torch).

    python tests/models/make_golden.py FOLDER_OF_ALL_MINILM_L6_V2 [OUTPUT]
"""

import sys
from pathlib import Path

import numpy as np
import sentence_transformers
from golden_texts import TEXTS

HERE = Path(__file__).parent


def main(folder: str, output: str = str(HERE / "golden_minilm.npz")) -> None:
    model = sentence_transformers.SentenceTransformer(folder, device="cpu")
    model.max_seq_length = 256
    vectors = model.encode(TEXTS, batch_size=8, convert_to_numpy=True)
    tokens = [model.tokenizer(text, truncation=True, max_length=256)["input_ids"] for text in TEXTS]
    np.savez_compressed(
        output,
        vectors=np.asarray(vectors, np.float32),
        tokens=np.concatenate(tokens).astype(np.int32),
        lengths=np.array([len(t) for t in tokens], np.int32),
        made_by=np.array(f"sentence-transformers {sentence_transformers.__version__}"),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
