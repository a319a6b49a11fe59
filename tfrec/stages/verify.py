"""verify: a bundle in, a table out that says whether every model answers as the trained one did."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from tfrec.bundle import SERVING, Bundle
from tfrec.engines import LiteRTEngine, recommender_of
from tfrec.errors import SetupError
from tfrec.golden import Golden
from tfrec.recommender import Recommender

FLOORS = {
    "cosine_min": 0.9999,
    "max_difference": 0.001,
    "overlap": 0.9,
}
"""What float models must keep: the least cosine, the most that a prediction moves in spreads of
that prediction, the share of common items in lists of ten."""

INT8 = {"cosine_min": 0.97}
"""The same of a text encoder with int8 weights."""


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


def run(folder: str | os.PathLike[str], version: int | None = None) -> list[Finding]:
    """Checks every digest of a version and asks its models the stored questions again.

    Args:
      folder: The bundle.
      version: Its number; None: the newest.

    Returns:
      What was found, good or bad.

    Raises:
      ArtifactError: a file is missing, changed or damaged, or the bundle is of a newer tfrec.
      SetupError: LiteRT is not installed.
    """
    found = Bundle.load(folder, version)
    golden = Golden.load(found.folder / "golden")
    recommender = recommender_of(found)
    again = Golden.answered(recommender, golden.texts, golden.requests, golden.candidates)
    int8 = bool(found.content["text_int8"])
    out = [
        finding
        for part, measures in golden.compare(again).items()
        for finding in _judged(part, measures, int8)
    ]
    if (found.folder / SERVING).is_dir():
        out += _saved_models(found, golden, recommender)
    return out


def _saved_models(found: Bundle, golden: Golden, recommender: Recommender) -> list[Finding]:
    """The SavedModels, asked what they have a signature for; nothing without TensorFlow."""
    try:
        from tfrec.models import serving
    except SetupError as error:
        print(f"tfrec: the SavedModels were not run: {error}", file=sys.stderr)
        return []
    engine = recommender.engine
    assert isinstance(engine, LiteRTEngine)
    out = []
    for model in sorted((found.folder / SERVING).iterdir()):
        measures = serving.compared(model, golden, recommender, engine.tokenize)
        for measure, value in measures.items():
            bound = FLOORS.get(measure)
            told = Finding(f"{model.name}, SavedModel", measure.replace("_", " "), value, bound)
            out.append(told)
    return out


def _judged(part: str, measures: dict[str, float], int8: bool) -> Iterator[Finding]:
    kind = "int8" if part == "text" and int8 else "float32"
    bounds = {**FLOORS, **(INT8 if kind == "int8" else {})}
    name = "the whole chain" if part == "lists" else f"{part}, LiteRT {kind}"
    for measure, value in measures.items():
        yield Finding(name, measure.replace("_", " "), value, bounds.get(measure))
