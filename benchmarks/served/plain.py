"""Plain: a bundle's float SavedModels and TFRS BruteForce behind FastAPI, as one would begin.

    python benchmarks/served/plain.py BUNDLE PORT

It answers the same question as `tfrec serve`: the query tower reads the history, BruteForce finds
500 items by the same vectors without those of the history, the ranker reads the best 200, and the
10 best by its score are told with their titles. All of it is one tf.function over the last 50
events (BruteForce leaves out only what has a fixed shape), asked once before the port opens, and
the endpoint is a plain `def`, which FastAPI runs in its threads.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel

from tfrec.bundle import Bundle, load_rows
from tfrec.data.dataset import Dataset

RETRIEVE, RANK, HISTORY = 500, 200, 50


class Body(BaseModel):
    history: list[str]
    k: int = 10


class Model(tf.Module):
    """History in, best items out."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        folder = bundle.folder
        self.catalog = Dataset.read(folder / "catalog").catalog
        self.title = dict(zip(self.catalog.ids, self.catalog.titles, strict=True))
        self.query = tf.saved_model.load(str(folder / "tf-serving" / "encode_query"))
        self.ranker = tf.saved_model.load(str(folder / "tf-serving" / "rank"))
        self.index = tfrs.layers.factorized_top_k.BruteForce(k=RETRIEVE)
        vectors = load_rows(folder / "arrays" / "vectors.npy")
        ids = np.array(self.catalog.ids[1:])
        self.index.index(tf.constant(vectors[1:]), tf.constant(ids))

    @tf.function(
        input_signature=[tf.TensorSpec([1, HISTORY], tf.string), tf.TensorSpec([], tf.int32)]
    )
    def best(self, history: Any, k: Any) -> tuple[Any, Any]:
        query = self.query.signatures["serving_default"](history=history)["query"]
        _, found = self.index.query_with_exclusions(query, history, k=RETRIEVE)
        found = found[:, :RANK]
        ranked = self.ranker.signatures["serving_default"](candidates=found, history=history)
        scores, places = tf.math.top_k(ranked["score"], tf.minimum(k, tf.shape(found)[1]))
        return scores, tf.gather(found, places, batch_dims=1)


def padded(history: list[str]) -> Any:
    last = history[-HISTORY:]
    return tf.constant([last + [""] * (HISTORY - len(last))])


def app_of(model: Model) -> FastAPI:
    app = FastAPI()

    @app.post("/v1/recommend")
    def recommend(body: Body) -> dict[str, Any]:
        scores, ids = model.best(padded(body.history), tf.constant(body.k))
        told = [raw.decode() for raw in ids.numpy()[0]]
        return {
            "items": [
                {"item_id": item, "title": model.title[item], "score": float(score)}
                for item, score in zip(told, scores.numpy()[0], strict=True)
            ]
        }

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


def main() -> None:
    folder, port = Path(sys.argv[1]), int(sys.argv[2])
    model = Model(Bundle.load(folder, check=False))
    for count in (1, HISTORY):
        model.best(padded(list(model.catalog.ids[1 : 1 + count])), tf.constant(10))
    uvicorn.run(app_of(model), host="127.0.0.1", port=port, log_level="warning", access_log=False)


if __name__ == "__main__":
    main()
