"""Bundling: a recommender as the files of a bundle's version, without its manifest."""

from __future__ import annotations

import contextlib
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from tfrec.artifact import write_json
from tfrec.bundle import ARRAYS, DEFAULT, EXAMPLES, SERVING, save_codes, save_rows
from tfrec.data.catalog import Users
from tfrec.data.dataset import Dataset
from tfrec.data.interactions import Interactions
from tfrec.errors import InputError
from tfrec.golden import Golden
from tfrec.index import ExactIndex
from tfrec.models import litert, serving
from tfrec.models.engine import TensorFlowEngine
from tfrec.models.int8 import holds
from tfrec.models.named import kernels
from tfrec.models.text import TextEncoder
from tfrec.models.weights import origin
from tfrec.recommender import Floats, Recommender
from tfrec.rows import int8_rows

PACKAGES = (
    "tensorflow",
    "tensorflow-text",
    "tf-keras",
    "keras-hub",
    "ai-edge-litert",
    "numpy",
    "scann",
)
_MOVED = 0.1  # in spreads of the texts along a direction


def check_finite(recommender: Recommender, source: Path) -> None:
    """Raises InputError if vectors of it hold values that are not finite."""
    arrays = {name: getattr(recommender, name) for name in ("vectors", "text", "profile")}
    if recommender.linear is not None:
        arrays["linear weights"] = recommender.linear.weights
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise InputError(f"the {name} of {source} hold values that are not finite; train again")


def without_users(recommender: Recommender) -> Recommender:
    """The same, of which nobody is known: popularity stays."""
    events, users = recommender.interactions, recommender.users
    columns: dict[str, tuple[str, ...]] = dict.fromkeys(users.attributes, ())
    return Recommender(
        recommender.engine,
        recommender.catalog,
        Users((), (), (), columns, users.schema),
        Interactions(
            events.user[:0],
            events.item[:0],
            events.timestamp[:0],
            events.event[:0],
            events.rating[:0],
            events.weight[:0],
            events.split[:0],
            0,
            events.event_names,
        ),
        recommender.coding,
        recommender.vectors,
        recommender.text,
        recommender.profile[:0],
        recommender.policy,
        recommender.linear,
        recommender.index,
        recommender.directions,
        recommender.popularity,
    )


def write(
    recommender: Recommender,
    text: str,
    folder: Path,
    *,
    int8: bool = True,
    saved_models: bool = True,
) -> dict[str, Any]:
    """Writes everything but :data:`~tfrec.bundle.CONTENT`.

    Args:
      recommender: Of a run: its engine is TensorFlow's.
      text: Name of the pretrained text model, whose licence comes along.
      folder: A new folder.
      int8: Whether the weights of text encoder and ranker, vectors and linear model are int8; else
        float32.
      saved_models: Whether SavedModels for TensorFlow Serving are part of it.

    Returns:
      What :data:`~tfrec.bundle.CONTENT` says, but for the serving policy of ``[recommend]``.

    Raises:
      InputError: weights are not finite.
    """
    engine = recommender.engine
    assert isinstance(engine, TensorFlowEngine)
    with _steps(4) as step:
        step("catalog")
        place = folder / "catalog"
        place.mkdir()
        Dataset(recommender.interactions, recommender.catalog, recommender.users).write(place)
        _write_arrays(recommender, folder / "arrays", int8)
        if not isinstance(recommender.index, ExactIndex):  # that is made anew as fast as read
            recommender.index.save(folder / "index")
        step("models")
        # Towers win no time by int8 and lose by it, unless they have learned to work with it.
        found = [variable.numpy() for variable in kernels(engine.two_tower).values()]
        learned = int8 and bool(found) and all(holds(kernel) for kernel in found)
        models = _write_models(recommender, engine, folder / "litert", int8, learned)
        weights = None
        if recommender.text.shape[1]:
            weights = _write_text(engine.text_encoder, text, folder / "litert" / "text")
        step("SavedModels")
        left_out: dict[str, str] = {}
        if saved_models:
            made, left_out = _write_saved_models(recommender, folder, int8)
            models |= made
        step("questions")
        Golden.ask(recommender).save(folder / "golden")
        step("")
    return {
        "models": models,
        "left_out": left_out,
        "weights": weights,
        "packages": {name: _version(name) for name in PACKAGES},
        "policy": recommender.policy.dump(),
        "coding": asdict(recommender.coding),
        "history": engine.two_tower.config.history,
        "items": recommender.catalog.num_items,
        "users": len(recommender.users),
        **{f"{name}_int8": int8 for name in ("text", "rank")},
        **{f"{name}_int8": learned for name in ("query", "candidate")},
        "arrays_int8": int8,
    }


def _write_arrays(recommender: Recommender, folder: Path, int8: bool) -> None:
    folder.mkdir()
    save_rows(folder / "vectors.npy", recommender.vectors[:], int8)
    for name in ("text", "profile"):
        array = getattr(recommender, name)
        save_rows(folder / f"{name}.npy", array, int8 and _bears_int8(recommender, array))
    save_rows(folder / "popularity.npy", recommender.popularity)
    linear = recommender.linear
    if linear is not None and int8:
        linear = linear.coded()
    if linear is not None and linear.scales is not None:
        save_codes(folder / "linear.npy", linear.weights, linear.scales)
    elif linear is not None:
        save_rows(folder / "linear.npy", linear.weights)
    if recommender.directions is not None:
        found = recommender.directions
        save_rows(folder / "directions.npy", np.vstack([found.mean, found.matrix.T]))


def _bears_int8(recommender: Recommender, array: Floats) -> bool:
    """Whether the ranker reads nearly the same of vectors of texts, float32 (n, width), in int8.

    Where all texts are alike, what tells them apart can be smaller than a step.
    """
    codes, scales = int8_rows(array)
    moved = recommender.read(codes * scales[:, None]) - recommender.read(array)
    return float(np.abs(moved).max(initial=0)) <= _MOVED


def _write_models(
    recommender: Recommender,
    engine: TensorFlowEngine,
    folder: Path,
    int8: bool,
    towers_int8: bool,
) -> dict[str, Any]:
    """The LiteRT models; returns what each takes and gives."""
    folder.mkdir()
    features = recommender.catalog.features.shape[1]
    width, towers = recommender.text.shape[1], engine.two_tower
    blobs = {
        "query": litert.query_model(towers, towers_int8),
        "candidate": litert.candidate_model(towers, width, features, towers_int8),
        "rank": litert.rank_model(engine.ranker, int8) if engine.ranker is not None else None,
    }
    if width:
        read = [text for text in recommender.catalog.texts if text]
        blobs["text/model"] = litert.text_model(engine.text_encoder, int8, read)
    for name, blob in blobs.items():
        if blob is not None:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / f"{name}.tflite").write_bytes(blob)
    return {
        name.partition("/")[0]: {
            "file": f"litert/{name}.tflite",
            "runtime": "LiteRT",
            **litert.signature(blob),
        }
        for name, blob in blobs.items()
        if blob is not None
    }


def _write_saved_models(
    recommender: Recommender, folder: Path, int8: bool
) -> tuple[dict[str, Any], dict[str, str]]:
    """The SavedModels, with requests to warm up by, and examples, for REST and for gRPC, that were
    really answered.

    Returns:
      What each takes and gives, and those that could not be made, with the reason.
    """
    made, left_out = serving.save(recommender, folder / SERVING, int8)
    asked = serving.questions(recommender, made)
    (folder / EXAMPLES).mkdir()
    for name, inputs in asked.items():
        place = folder / SERVING / name
        arrays = made[name]["signatures"].get(ARRAYS)
        serving.warm_up(place, name, inputs, arrays and serving.blank(arrays["inputs"]))
        body = {"signature_name": DEFAULT, "inputs": serving.as_rest(inputs)}
        write_json(folder / EXAMPLES / f"{name}.request.json", body)
        message = serving.request_of(name, inputs).SerializeToString(deterministic=True)
        (folder / EXAMPLES / f"{name}.request.pb").write_bytes(message)
        outputs = serving.as_rest(serving.answers(place, inputs, made[name]["needs"]))
        # A server leaves the name of a single output out.
        answer = {"outputs": outputs if len(outputs) > 1 else next(iter(outputs.values()))}
        write_json(folder / EXAMPLES / f"{name}.response.json", answer)
    models = {
        f"{SERVING}/{name}": {"file": f"{SERVING}/{name}", "runtime": "TensorFlow", **told}
        for name, told in made.items()
    }
    return models, {f"{SERVING}/{name}": reason for name, reason in left_out.items()}


def _write_text(encoder: TextEncoder, name: str, folder: Path) -> dict[str, Any]:
    """What the text model needs beside its weights; returns under which licence they came."""
    encoder.settings.write(folder, encoder.width, encoder.tokenizer.length)
    encoder.tokenizer.save(folder / "tokenizer.json")
    found = origin(name)
    for file in found.files:
        shutil.copyfile(file, folder / file.name)
    return {
        "name": found.name,
        "licence": found.licence,
        "source": found.source,
        "files": [f"litert/text/{file.name}" for file in found.files],
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


@contextlib.contextmanager
def _steps(count: int) -> Iterator[Callable[[str], None]]:
    with tqdm(total=count, desc="exporting", bar_format="{desc}: {n}/{total} {postfix}") as bar:

        def step(name: str) -> None:
            bar.update(1 if bar.postfix else 0)
            bar.set_postfix_str(name)

        yield step
