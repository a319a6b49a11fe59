"""run: the stages in order, each through the artifacts of the one before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tfrec.artifact import Artifact
from tfrec.config import Config
from tfrec.distribution import Placement, place
from tfrec.stages import adapt, evaluate, prepare, pretrain


def run(
    config: Config,
    out: Path,
    *,
    force: bool = False,
    say: Callable[[str], None] = print,
) -> Artifact:
    """Prepares, pretrains where adaptation starts from that, adapts both tasks and evaluates.

    What is done already is not repeated.

    With several workers all adapt together, and the chief alone prepares and evaluates.

    Args:
      config: Everything the run is told.
      out: The run's folder.
      force: Do every stage anew.
      say: Gets a line as each stage begins and what it found.

    Returns:
      The artifact of the last stage: the report, or the ranker where nothing is held out.
    """
    out = Path(out)
    placement = place(config.adapt.distribution)
    say = say if placement.chief else _nothing
    out.mkdir(parents=True, exist_ok=True)
    say(f"prepare: {config.data.source}")
    dataset = _by_chief(
        placement, out / prepare.FOLDER, lambda: prepare.run(config, out, force=force)
    )
    for line in prepare.summary_lines(dataset):
        say(f"  {line}")
    if config.adapt.encoder == pretrain.FOLDER:
        say("pretrain")
        pretrain.run(config, out, force=force)
    say("adapt: retrieval")
    adapt.run(config, out, "retrieval", force=force)
    say("adapt: ranking")
    last = adapt.run(config, out, "ranking", force=force)
    if dataset.metrics["split"].get("test"):
        say("evaluate")
        last = _by_chief(
            placement, out / evaluate.FOLDER, lambda: evaluate.run(config, out, force=force)
        )
    return last


def _by_chief(placement: Placement, folder: Path, make: Callable[[], Artifact]) -> Artifact:
    """What the chief makes at a folder while the other workers wait."""
    made = make() if placement.chief else None
    placement.from_chief(None)
    return made or Artifact.peek(folder)


def _nothing(_: str) -> None:
    """What workers that are not the chief say."""
