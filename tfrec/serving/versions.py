"""Versions: the loaded versions of a bundle, who gets which, and how one takes another's place."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tfrec import steps as step_room
from tfrec.artifact import MANIFEST
from tfrec.bundle import VERSIONS, Bundle, versions
from tfrec.config import Config, StepsConfig
from tfrec.engines import recommender_of
from tfrec.errors import ArtifactError, ConfigError, InputError, TfrecError
from tfrec.index.exact import cores
from tfrec.serving.asking import Ask, answers, served_policy
from tfrec.serving.live import LiveRecommender
from tfrec.serving.schemas import RecommendBody
from tfrec.serving.state import Item, State

POLICY = "policy.toml"
"""In a bundle, beside its versions: the steps of serving, where they are not the defaults."""

MakeEngine = Callable[[Bundle, Any], Any]
_log = logging.getLogger("tfrec.serving")

_NOT_SERVED = ("tf-serving/", "golden/", "examples/")
_BULK = 64  # items that are encoded together
_WARM = 3


@dataclass(eq=False)
class Version:
    """One loaded version.

    Attributes:
      name: Its number as text.
      chain: Its recommender.
      steps: How lists are made.
      policy: Digest of policy and steps, for the log of what was shown.
      changes: Number of the last change of items that it knows.
    """

    name: str
    chain: LiveRecommender
    steps: StepsConfig
    policy: str
    changes: int = 0

    def catch_up(self, state: State) -> int:
        """Takes in the items that were put or deleted since; how many."""
        pending: list[Item] = []
        count, last = 0, self.changes
        for number, item in state.items(self.changes):
            count += 1
            if item.deleted or len(pending) == _BULK:
                self._put(pending, state, last)
                pending = []
            if item.deleted:
                self.chain.remove(item.item_id)
                self.changes = number
            else:
                pending.append(item)
            last = number
        self._put(pending, state, last)
        return count

    def _put(self, items: list[Item], state: State, last: int) -> None:
        """Takes in items; only then the last change is known, so that no failure loses them."""
        if not items:
            return
        key = f"text:{self.policy_of_texts}"
        kept = state.vectors(key, [item.item_id for item in items])
        made = self._put_or_without(items, kept)
        if made:
            state.put_vectors(key, made)
        self.changes = last

    def _put_or_without(self, items: Sequence[Item], kept: Mapping[str, bytes]) -> dict[str, bytes]:
        """Puts items, each without the attributes if this version cannot read them.

        They were right for the version that took them; another may read a column as numbers.
        """
        try:
            return self.chain.put(items, kept)
        except InputError as error:
            if len(items) > 1:
                made: dict[str, bytes] = {}
                for item in items:
                    made |= self._put_or_without([item], kept)
                return made
            if not items[0].attributes:
                raise
            _log.warning("version %s reads an item without its attributes: %s", self.name, error)
            return self.chain.put([replace(items[0], attributes={})], kept)

    policy_of_texts: str = ""

    def warm(self) -> None:
        """Asks a few questions, so that the first visitor does not wait for what happens once."""
        ids = self.chain.catalog.ids[1 : self.chain.policy.history + 1]
        for count in (1, len(ids)):
            for _ in range(_WARM):
                body = RecommendBody(history=list(ids[:count]), explain=True, diversity=0.1)
                answers([Ask(body, "warm-up")], self.chain, self.steps)
        if self.chain.text.shape[1]:
            answers([Ask(RecommendBody(profile="warm"), "warm-up")], self.chain, self.steps)


def read_steps(bundle: Path, attributes: Mapping[str, object]) -> StepsConfig:
    """The steps of a bundle's ``policy.toml``; the defaults where there is none.

    Raises:
      ConfigError: it is damaged, or names what there is not.
    """
    path = bundle / POLICY
    try:
        tree = tomllib.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from None
    try:
        steps = Config.parse({"steps": tree.get("steps", tree)}).steps
        step_room.check(steps, attributes)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return steps


def load(bundle: Path, number: int, threads: int, engine: MakeEngine) -> Version:
    """Reads a version, checks what serving reads of it, and makes it ready to change.

    Args:
      bundle: The folder.
      number: Of the version.
      threads: That compute.
      engine: What makes the engine of a version, of LiteRT's.

    Raises:
      ArtifactError: it is damaged.
      ConfigError: the bundle's ``policy.toml`` is wrong.
    """
    found = Bundle.load(bundle, number, check=False)
    found.artifact.check(without=_NOT_SERVED)
    chain = LiveRecommender.of(recommender_of(found, threads, threads or cores()))
    chain.engine = engine(found, chain.engine)
    steps = read_steps(bundle, chain.catalog.attributes)
    learned = chain.policy
    finds = 1 + (chain.linear is not None and learned.uses("linear"))
    finds += bool(chain.text.shape[1]) and learned.uses("text")
    chain.policy = served_policy(learned, steps, finds)
    told = json.dumps([learned.dump(), steps.model_dump(mode="json")], sort_keys=True)
    return Version(
        name=str(number),
        chain=chain,
        steps=steps,
        policy=hashlib.sha256(told.encode()).hexdigest()[:16],
        policy_of_texts=_digest_of_texts(found),
    )


def _digest_of_texts(bundle: Bundle) -> str:
    """Digest of the text model: versions that share it share the vectors of new items' texts."""
    files = {
        n: e["sha256"] for n, e in bundle.artifact.files.items() if n.startswith("litert/text")
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]


class Versions:
    """The versions of a bundle that are loaded, and the share of users that each gets.

    What is read needs no lock: shares and versions are replaced in one step.

    Args:
      bundle: The folder.
      state: Keeps which versions are active.
      make: Loads a version by its number.

    Attributes:
      changed: Called when other versions answer, or with other shares.
    """

    def __init__(self, bundle: Path, state: State, make: Callable[[int], Version]) -> None:
        self.bundle, self.state, self._make = bundle, state, make
        self._served: tuple[tuple[tuple[str, float], ...], dict[str, Version]] = ((), {})
        self.failed: dict[str, str] = {}
        self.loading: set[str] = set()
        self.changed: Callable[[], None] = lambda: None

    @property
    def shares(self) -> tuple[tuple[str, float], ...]:
        """Versions that answer, each with its share of users."""
        return self._served[0]

    @property
    def loaded(self) -> dict[str, Version]:
        """These versions by name."""
        return self._served[1]

    def of(self, key: str) -> Version:
        """The version of a user: always the same one for the same key, as long as shares stay."""
        shares, loaded = self._served
        drawn = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=6).digest()) / 2**48
        for name, share in shares:
            drawn -= share
            if drawn < 0:
                return loaded[name]
        return loaded[shares[-1][0]]

    @property
    def newest(self) -> int:
        """Number of the newest finished version on disk; 0: none."""
        return max(versions(self.bundle), default=0)

    def wanted(self) -> list[tuple[str, float]]:
        """The shares activated last, if their versions are still there; else the newest alone."""
        try:
            told = json.loads(self.state.get("active") or "[]")
            shares = [(str(name), float(share)) for name, share in told]
        except (ValueError, TypeError):
            shares = []
        there = {str(number) for number in versions(self.bundle)}
        if shares and all(name in there for name, _ in shares):
            return shares
        if not self.newest:
            raise ArtifactError(
                f"{self.bundle} has no finished version; make one with `tfrec export`"
            )
        return [(str(self.newest), 1.0)]

    def load(self, name: str) -> Version:
        """Reads a version, with all items that were put, and warms it.

        Raises:
          InputError: there is no such version.
          TfrecError: it is damaged; what is served stays as it is.
        """
        if name in self.loaded:
            return self.loaded[name]
        if not name.isdigit() or int(name) not in versions(self.bundle):
            known = ", ".join(map(str, versions(self.bundle))) or "none"
            raise InputError(f"there is no version '{name}'; there are: {known}")
        self.loading.add(name)
        try:
            found = self._make(int(name))
            found.catch_up(self.state)
            found.warm()
        except TfrecError as error:
            self.failed[name] = str(error)
            raise
        except Exception as error:
            self.failed[name] = f"version {name} cannot be used: {type(error).__name__}: {error}"
            raise ArtifactError(self.failed[name]) from error
        finally:
            self.loading.discard(name)
        self.failed.pop(name, None)
        return found

    def shared(self, name: str, share: float) -> list[tuple[str, float]]:
        """The shares when a version gets ``share``: the others keep their proportions."""
        others = [(other, part) for other, part in self.shares if other != name]
        total = sum(part for _, part in others)
        rest = [(other, part / total * (1 - share)) for other, part in others] if share < 1 else []
        return [*rest, (name, share if rest else 1.0)]

    def use(self, shares: list[tuple[str, float]], ready: Mapping[str, Version]) -> None:
        """Serves these shares from now on; versions that have none are let go."""
        known = {**self.loaded, **ready}
        self._served = (tuple(shares), {name: known[name] for name, _ in shares})
        self.changed()

    def told(self) -> list[dict[str, Any]]:
        """What there is, newest first, as the answer of ``/v1/models`` has it."""
        shares = dict(self.shares)
        out = []
        for number in sorted(versions(self.bundle), reverse=True):
            name = str(number)
            manifest = _manifest(self.bundle, name)
            state = (
                "active" if name in shares else "loading" if name in self.loading else "available"
            )
            out.append(
                {
                    "version": name,
                    "state": "failed" if name in self.failed and name not in shares else state,
                    "share": shares.get(name, 0.0),
                    "created": manifest.get("created", ""),
                    "metrics": manifest.get("metrics", {}),
                    "error": self.failed.get(name),
                }
            )
        return out


def _manifest(bundle: Path, name: str) -> dict[str, Any]:
    try:
        text = (bundle / VERSIONS / name / MANIFEST).read_text("utf-8")
        found: dict[str, Any] = json.loads(text)
    except (OSError, ValueError):
        return {}
    return found


def check(bundle: Path) -> None:
    """Refuses what is no bundle with a version to serve, before anything is made beside it.

    Raises:
      ArtifactError: there is none.
    """
    wrong: ArtifactError | None = None
    for number in reversed(versions(bundle)):
        try:
            Bundle.load(bundle, number, check=False)
        except ArtifactError as error:
            wrong = wrong or error
        else:
            return
    if wrong is not None:
        raise wrong
    Bundle.load(bundle, check=False)  # says what is missing


def state_folder(bundle: str | os.PathLike[str]) -> Path:
    """Where the state lies unless it is said: beside the bundle."""
    path = Path(bundle)
    return path.with_name(f"{path.name}.state")
