"""Encoding a catalog of texts with the BERT, beside a plain tf.function over the same backbone.

    python benchmarks/encode.py [--raw DIR] [--sample 1000] [--turns 5]

The plain side is what one would write first: keras-nlp's backbone as it loads (with the exact
GELU, so that the vectors agree), one tf.function that takes any shape, batches of 32 texts in the
order of the catalog, each padded to its longest text, float32. Both sides tokenise with the same
tokenizer, pool and normalise, inside the measured time, in one process and with the same threads.
They take turns; medians are compared, and the largest difference between their vectors is printed.

Texts: titles and genres of MovieLens-1M (fetched if --raw is not given), and, where --raw holds
them, `amazon-scientific/Scientific.text` and `ml-1m/dbpedia_abstracts.json`; a seeded sample.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def catalogs(raw: str) -> Iterator[tuple[str, list[str]]]:
    from tfrec.data import sources

    films = Path(raw) / "ml-1m" if raw else Path(sources.fetch("movielens-1m", None))
    rows = (films / "movies.dat").read_text("latin-1").splitlines()
    cells = [row.split("::") for row in rows]
    yield "MovieLens-1M, title and genres", [f"{c[1]}. {c[2].replace('|', ', ')}" for c in cells]
    shop = Path(raw) / "amazon-scientific" / "Scientific.text"
    if raw and shop.is_file():
        lines = shop.read_text("utf-8").splitlines()[1:]
        yield "Amazon Scientific", [line.partition("\t")[2] for line in lines]
    abstracts = Path(raw) / "ml-1m" / "dbpedia_abstracts.json"
    if raw and abstracts.is_file():
        texts = json.loads(abstracts.read_text("utf-8")).values()
        yield "DBpedia abstracts of films", [text for text in texts if text]


def plain_side(name: str, encoder: Any) -> Callable[[list[str]], np.ndarray]:
    from tfrec.data.tokens import padded
    from tfrec.models import weights
    from tfrec.models.keras_bridge import keras3, keras_hub, tf

    backbone = keras_hub.models.BertBackbone.from_preset(str(weights.find(name)), dtype="float32")
    for layer in backbone.transformer_layers:
        layer._feedforward_intermediate_dense.activation = keras3.activations.gelu

    @tf.function(input_signature=[tf.TensorSpec([None, None], tf.int32)] * 2)
    def vectors(ids: Any, mask: Any) -> Any:
        feed = {"token_ids": ids, "segment_ids": tf.zeros_like(ids), "padding_mask": mask}
        hidden = backbone(feed, training=False)["sequence_output"]
        weight = tf.cast(mask, tf.float32)[:, :, None]
        mean = tf.reduce_sum(hidden * weight, 1) / tf.reduce_sum(weight, 1)
        return tf.math.l2_normalize(mean, -1)

    def encode(texts: list[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(texts), 32):
            rows = list(encoder.tokenizer.ids(texts[start : start + 32]))
            parts.append(vectors(*padded(rows)).numpy())
        return np.concatenate(parts)

    return encode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", default="", help="folder that holds ml-1m and more, else fetched")
    parser.add_argument("--model", default="all-MiniLM-L6-v2")
    parser.add_argument("--sample", type=int, default=1000, help="texts of each catalog; 0: all")
    parser.add_argument("--turns", type=int, default=5, help="measurements of each side")
    parser.add_argument("--threads", type=int, default=2)
    told = parser.parse_args()
    os.environ["TF_NUM_INTRAOP_THREADS"] = os.environ["TF_NUM_INTEROP_THREADS"] = str(told.threads)
    from tfrec.models.text import TextEncoder

    encoder = TextEncoder.load(told.model, trainable=False)
    sides = {"ours": encoder.encode, "plain": plain_side(told.model, encoder)}
    print(f"{told.model}, {told.threads} threads; load {os.getloadavg()[0]:.1f} when it began")
    print(f"{'texts a second':<32}{'tokens':>7}{'ours':>8}{'plain':>8}{'ratio':>7}{'differ':>9}")
    found = []
    for name, texts in catalogs(told.raw):
        texts = list(dict.fromkeys(texts))  # equal texts are encoded once: not what is compared
        if told.sample:
            chosen = np.random.default_rng(0).permutation(len(texts))[: told.sample]
            texts = [texts[row] for row in chosen]
        found.append(one := compare(sides, texts, told.turns))
        one["texts"], one["catalog"] = len(texts), name
        one["tokens"] = statistics.mean(map(len, encoder.tokenizer.ids(texts)))
        print(
            f"{name:<32}{one['tokens']:>7.1f}{one['ours']:>8.0f}{one['plain']:>8.0f}"
            f"{one['ratio']:>7.2f}{one['differ']:>9.1e}",
            flush=True,
        )
    print(json.dumps({"model": told.model, "threads": told.threads, "results": found}))
    return 0


def compare(sides: dict[str, Any], texts: list[str], turns: int) -> dict[str, Any]:
    """Texts a second of each side, by wall clock and by processor time."""
    first = {name: encode(texts[:64]) for name, encode in sides.items()}  # traces, warms up
    took: dict[str, list[float]] = {name: [] for name in sides}
    used: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        for name, encode in sides.items():
            wall, processor = time.perf_counter(), time.process_time()
            encode(texts)
            took[name].append(time.perf_counter() - wall)
            used[name].append(time.process_time() - processor)
        print(f"  turn {turn + 1}: {took['ours'][-1]:.2f} s ours", file=sys.stderr)
    rates = {name: len(texts) / statistics.median(times) for name, times in took.items()}
    processor_time = {name: statistics.median(times) for name, times in used.items()}
    return {
        **rates,
        "ratio": rates["ours"] / rates["plain"],
        "ratio_of_processor_time": processor_time["plain"] / processor_time["ours"],
        "differ": float(np.abs(first["ours"] - first["plain"]).max()),
        "seconds": took,
    }


if __name__ == "__main__":
    sys.exit(main())
