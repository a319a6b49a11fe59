"""recommend: a finished run in, recommendations out."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from tfrec.artifact import write_text
from tfrec.bundle import Bundle, is_bundle
from tfrec.config import RecommendConfig, recommend_section
from tfrec.data.raw import read_table
from tfrec.data.tables import open_table
from tfrec.errors import ArtifactError, InputError
from tfrec.recommender import Met, Recommended, Recommender, Request

PIECE = 512


def run(
    folder: str | os.PathLike[str],
    *,
    users_file: Path | None = None,
    user_ids: Sequence[str] = (),
    history: Sequence[str] = (),
    profile: str | None = None,
    exclude: Sequence[str] = (),
    include: Sequence[str] = (),
    filters: Mapping[str, Sequence[str]] | None = None,
    include_seen: bool | None = None,
    k: int | None = None,
    out: Path | None = None,
    format: Literal["csv", "jsonl"] = "csv",
) -> None:
    """Recommends with a run's final models, or with a bundle, and writes the result.

    Args:
      folder: The folder of a run or of a bundle; the latter needs no TensorFlow.
      users_file: A table with a column ``user_id``: everyone in it gets a list.
      user_ids: Further users.
      history: Item ids, oldest first, that follow what is known of each user; without users, of
        somebody unknown.
      profile: What the person likes, in words.
      exclude: Item ids that must not come.
      include: Item ids to choose among; empty: all.
      filters: Attribute column -> values, one of which the items must have.
      include_seen: Whether items of the history may come; None: as the run was told.
      k: Items for each user; None: as the run was told.
      out: The file to write; None: standard output.
      format: ``csv`` with ``user_id,item_id,rank,score``, or ``jsonl`` with titles and sources.

    Raises:
      ArtifactError: the run is missing or unfinished.
      ConfigError: what the run was told cannot be read.
      InputError: k is below 1, the users file cannot be read, a filter names no attribute, or the
        profile is empty or holds no word that the text model knows.
    """
    if profile is not None and not profile.strip():
        raise InputError("--profile is empty: say what the person likes, or leave it out")
    users = list(user_ids or ())
    if users_file is not None:
        users += read_table(open_table(users_file, "--users"), "user_id", {}).ids
    told, recommender = _opened(Path(folder))
    if profile is not None:
        _check_profile(recommender, profile)
    requests = [
        Request(
            user_id=user,
            history=tuple(history or ()),
            profile=profile or "",
            exclude=tuple(exclude or ()),
            include=tuple(include or ()),
            filters=dict(filters or {}),
            include_seen=not told.exclude_seen if include_seen is None else include_seen,
        )
        for user in users or [""]
    ]
    _check_ids(recommender, requests[0])
    answers = _answers(recommender, requests, told.k if k is None else k)
    text = (_jsonl if format == "jsonl" else _csv)(requests, answers)
    if out is None:
        sys.stdout.write(text)
    else:
        write_text(out, text)
    _say_sources(answers)


def load_recommender(folder: str | os.PathLike[str]) -> Recommender:
    """The recommender of a run's final models, or of a bundle's newest version.

    Args:
      folder: The folder of a run or of a bundle; the latter needs no TensorFlow.

    Raises:
      ArtifactError: something is missing, damaged, or does not belong together.
      SetupError: a run is read where TensorFlow is not installed.
    """
    if is_bundle(folder):
        from tfrec.engines import recommender_of

        return recommender_of(Bundle.load(folder))
    from tfrec.models import engine

    return engine.load_recommender(folder)


def _opened(folder: Path) -> tuple[RecommendConfig, Recommender]:
    if not is_bundle(folder):
        return recommend_section(folder), load_recommender(folder)
    from tfrec.engines import recommender_of

    bundle = Bundle.load(folder)
    try:
        told = RecommendConfig.model_validate(bundle.content["recommend"])
    except (KeyError, ValueError):
        raise ArtifactError(f"{bundle.folder} is damaged: it has no settings") from None
    return told, recommender_of(bundle)


def _answers(
    recommender: Recommender, requests: Sequence[Request], k: int
) -> list[list[Recommended]]:
    answers: list[list[Recommended]] = []
    with tqdm(total=len(requests), desc="recommending", disable=len(requests) <= PIECE) as bar:
        for start in range(0, len(requests), PIECE):
            piece = requests[start : start + PIECE]
            answers += recommender.recommend(piece, k)
            bar.update(len(piece))
    return answers


def _check_ids(recommender: Recommender, request: Request) -> None:
    """Unknown items to choose among are an error; elsewhere they are said and left out."""
    history = [met.item_id for met in map(Met.of, request.history)]
    for name, ids in (("--history", history), ("--exclude", request.exclude)):
        unknown = [i for i in ids if not recommender.catalog.row(i)]
        if unknown:
            print(f"tfrec: {name}: there is no item '{unknown[0]}'; left out", file=sys.stderr)
    unknown = [i for i in request.include if not recommender.catalog.row(i)]
    if unknown:
        raise InputError(f"--include names the item '{unknown[0]}', which is not in the catalog")


def _check_profile(recommender: Recommender, profile: str) -> None:
    """A profile of which nothing can be read is an error; what is lost of others is said."""
    if not recommender.text.shape[1]:
        print("tfrec: --profile: this run reads no texts (adapt.text); left out", file=sys.stderr)
        return
    cover = recommender.heard(profile)
    if cover.unknown > 0.5:
        print(
            f"tfrec: --profile: {cover.unknown:.0%} of its characters are outside the vocabulary "
            'of the text model; adapt.text = "multilingual-e5-small" reads about 100 languages',
            file=sys.stderr,
        )
    if cover.cut:
        print("tfrec: --profile is long: its first adapt.text_length tokens count", file=sys.stderr)


def _csv(requests: Sequence[Request], answers: Sequence[Sequence[Recommended]]) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["user_id", "item_id", "rank", "score"])
    for request, answer in zip(requests, answers, strict=True):
        for rank, item in enumerate(answer, 1):
            writer.writerow([request.user_id, item.item_id, rank, f"{item.score:.6g}"])
    return stream.getvalue()


def _jsonl(requests: Sequence[Request], answers: Sequence[Sequence[Recommended]]) -> str:
    lines = []
    for request, answer in zip(requests, answers, strict=True):
        items = [
            {
                "item_id": item.item_id,
                "title": item.title,
                "score": round(item.score, 6),
                "source": item.source,
            }
            for item in answer
        ]
        lines.append(json.dumps({"user_id": request.user_id, "items": items}, ensure_ascii=False))
    return "".join(line + "\n" for line in lines)


def _say_sources(answers: Sequence[Sequence[Recommended]]) -> None:
    """Says how many lists rest on something else than behaviour."""
    counts = Counter(str(answer[0].source) for answer in answers if answer)
    told = {"text": "on profile text", "popular": "on popularity"}
    parts = [f"{counts[source]:,} rest {words}" for source, words in told.items() if counts[source]]
    if parts:
        lists = f"of {len(answers):,} lists, for want of events,"
        print(f"tfrec: {lists} {' and '.join(parts)}", file=sys.stderr)
