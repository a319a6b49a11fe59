"""verify: a bundle in, a table out that says whether every model answers as the trained one did."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tfrec import bundle
from tfrec.bundle import ARRAYS, DEFAULT, SERVING, Bundle
from tfrec.engines import LiteRTEngine, ModelsEngine, recommender_of
from tfrec.errors import InputError, SetupError
from tfrec.golden import Golden, cosines, difference, new_items, predictions
from tfrec.recommender import Recommender

FLOORS = {
    "cosine_min": 0.9999,
    "max_difference": 0.001,
    "score_difference": 0.001,
    "overlap": 0.9,
}
"""What float models must keep: the least cosine, the most that a prediction and a score move in
spreads of it, the share of common items in lists of ten."""

INT8 = {"cosine_min": 0.99, "max_difference": 0.5}
"""The same of a text encoder and of a ranker with int8 weights."""

INT8_ARRAYS = {"cosine_min": 0.999, "max_difference": 0.1, "score_difference": 0.1}
"""The same of float models that read int8 vectors, where the trained ones read float32."""

APPROXIMATE = {"overlap": 0.8}
"""The same of approximate search, which is tuned to find 0.95 of what is best."""


_HERE = "SavedModel"


@dataclass(frozen=True)
class Finding:
    """One line of the table.

    Attributes:
      model: Which model, and what runs it.
      measure: What was measured.
      value: How much it is.
      bound: The bound that it must keep; None: it is only told.
    """

    model: str
    measure: str
    value: float
    bound: float | None

    @property
    def ok(self) -> bool:
        """Whether it keeps the bound."""
        if self.bound is None:
            return True
        return (
            self.value <= self.bound if "difference" in self.measure else self.value >= self.bound
        )


def run(
    folder: str | os.PathLike[str],
    version: int | None = None,
    server: str | None = None,
    rest: str | None = None,
) -> list[Finding]:
    """Checks every byte of a version, and asks its models the stored questions again.

    Checked too is what stands beside the versions, which also says of the others whether their
    descriptions are as they were.

    Args:
      folder: The bundle.
      version: Its number; None: the newest.
      server: ``host:port`` of the gRPC service of a TensorFlow Serving that runs the bundle, which
        is asked the same; None: none is.
      rest: ``host:port`` of its REST API; None: the next port.

    Returns:
      What was found, good or bad.

    Raises:
      ArtifactError: a file is missing, changed or damaged, or the bundle is of a newer tfrec.
      InputError: an address is not ``host:port``, or the bundle has no SavedModels to ask for.
      SetupError: LiteRT is not installed, or the server does not answer.
    """
    addresses = _addresses(server, rest)
    found = Bundle.load(folder, version)
    bundle.check(folder)
    models = {
        name.removeprefix(f"{SERVING}/"): told
        for name, told in sorted(found.content["models"].items())
        if name.startswith(f"{SERVING}/")
    }
    if addresses and not models:
        raise InputError(f"{folder} has no SavedModels: it was exported with --no-saved-models")
    golden = Golden.load(found.folder / "golden")
    recommender = recommender_of(found)
    again = Golden.answered(recommender, golden.texts, golden.requests, golden.candidates)
    out = [
        finding
        for part, measures in golden.compare(again).items()
        for finding in _judged(part, measures, found)
    ]
    return [*out, *_saved_models(found, models, golden, recommender, addresses)]


def _addresses(server: str | None, rest: str | None) -> dict[str, str]:
    """Way -> host:port."""
    out = {}
    for way, address in (("gRPC", server), ("REST", rest)):
        if address is None:
            continue
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or not 0 < int(port) < 65535:
            raise InputError(f"'{address}' is not HOST:PORT, such as localhost:8500")
        out[way] = address
    if list(out) == ["gRPC"]:
        host, _, port = out["gRPC"].rpartition(":")
        out["REST"] = f"{host}:{int(port) + 1}"
    return out


def _saved_models(
    found: Bundle,
    models: Mapping[str, Any],
    golden: Golden,
    recommender: Recommender,
    addresses: Mapping[str, str],
) -> Iterator[Finding]:
    """The SavedModels, here and on a server; nothing without TensorFlow."""
    if not models:
        return
    try:
        from tfrec.models import serving
    except SetupError as error:
        if addresses:
            raise
        print(f"tfrec: the SavedModels were not run: {error}", file=sys.stderr)
        return
    needs = {name: told.get("needs", ()) for name, told in models.items()}

    @functools.lru_cache(1)
    def loaded(name: str) -> Callable[..., Mapping[str, Any]]:
        return serving.load(found.folder / SERVING / name, needs[name])

    with contextlib.ExitStack() as stack:
        asked: dict[str, serving.Ask] = {_HERE: lambda name, *given: loaded(name)(*given)}
        for way, address in addresses.items():
            over = {"gRPC": serving.over_grpc, "REST": serving.over_rest}[way]
            connected = stack.enter_context(over(address, found.version))
            asked[f"by {way} of {address}"] = connected
        for where, plain in asked.items():
            ask = serving.as_told(plain, models, where)
            for name, signature in _signatures(models):
                try:
                    measured = _measured(name, signature, models, ask, golden, recommender)
                except SetupError as error:
                    # What needs more than a server or a machine has to have may be missing there.
                    absent = where == _HERE or isinstance(error, serving.NotServedError)
                    if not (needs[name] and absent):
                        raise
                    if signature == DEFAULT:
                        print(f"tfrec: {name} was not run: {error}", file=sys.stderr)
                    continue
                bounds = _of_saved_model(name, signature, found)
                title = name if signature == DEFAULT else f"{name} {signature}"
                for measure, value in measured.items():
                    told = measure.replace("_", " ")
                    yield Finding(f"{title}, {where}", told, value, bounds.get(measure))


def _signatures(models: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Each model with each of its signatures, ``serving_default`` first."""
    for name, told in models.items():
        for signature in sorted(told["signatures"], key=lambda key: (key != DEFAULT, key)):
            yield name, signature


def _measured(
    name: str,
    signature: str,
    models: Mapping[str, Any],
    ask: Any,
    golden: Golden,
    recommender: Recommender,
) -> dict[str, float]:
    """How far the answers to one signature of a SavedModel are from the stored ones."""
    from tfrec.models import serving

    engine = recommender.engine
    assert isinstance(engine, LiteRTEngine)
    inputs = models[name]["signatures"][signature]["inputs"]
    if signature != ARRAYS:
        return serving.compared(name, signature, inputs, ask, golden, recommender, engine.tokenize)

    def model(arrays: Mapping[str, Any]) -> Any:
        (found,) = ask(name, ARRAYS, {key: arrays[key] for key in inputs}).values()
        return found

    served = copy.copy(recommender)
    its = engine.models._replace(query=model, candidate=model, rank=model)
    served.engine = ModelsEngine(its, engine.history, engine.tasks, engine.step)
    if name == "encode_candidate":
        return cosines(golden.candidate, new_items(served))
    asked, _ = recommender.asked(golden.requests)
    if name == "encode_query":
        return cosines(golden.query, served.queries(asked))
    told = predictions(served, asked, golden.query, golden.candidates)
    return difference(golden.tasks, told)


def _of_saved_model(model: str, signature: str, found: Bundle) -> Mapping[str, float]:
    """What a SavedModel must keep."""
    if model == "retrieve_scann":
        return {**FLOORS, **APPROXIMATE}
    # What is given to these comes from the bundle's arrays; inside, all is float32.
    if model == "encode_candidate" or signature in ("full", ARRAYS):
        return _bounds(found)
    if model == "rank":  # its score is compared with what the arrays give
        return {**FLOORS, "score_difference": _bounds(found)["score_difference"]}
    stored = found.content["text_int8"] and model == "encode_text_strings"
    return {**FLOORS, **INT8} if stored or model == "encode_text_int8" else FLOORS


def _judged(part: str, measures: dict[str, float], found: Bundle) -> Iterator[Finding]:
    kind = "int8" if found.content.get(f"{part}_int8") else "float32"
    bounds = FLOORS if part == "text" else _bounds(found)
    bounds = {**bounds, **INT8} if kind == "int8" else bounds
    name = "the whole chain" if part == "lists" else f"{part}, LiteRT {kind}"
    for measure, value in measures.items():
        yield Finding(name, measure.replace("_", " "), value, bounds.get(measure))


def _bounds(found: Bundle) -> dict[str, float]:
    """What models must keep that read the vectors of a bundle."""
    return {**FLOORS, **(INT8_ARRAYS if found.content.get("arrays_int8") else {})}
