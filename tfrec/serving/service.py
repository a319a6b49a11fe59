"""Service: everything that a server does, without HTTP: one thread has the models, and batches."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tfrec.bundle import versions as numbers
from tfrec.config import ServeConfig
from tfrec.errors import ArtifactError, InputError, StateError, TfrecError
from tfrec.serving import asking, versions
from tfrec.serving.asking import Ask, Listed
from tfrec.serving.schemas import RecommendBody, Shelf
from tfrec.serving.state import Event, Item, State
from tfrec.serving.versions import MakeEngine, Version, Versions

_log = logging.getLogger("tfrec.serving")

T = TypeVar("T")
Span = tuple[str, float, float]
_LATELY = 0.1


class LateError(Exception):
    """A request waited past its deadline."""


class BusyError(Exception):
    """Too many requests wait."""


class ClosingError(Exception):
    """The server is going down."""


@dataclass(eq=False)
class Job:
    """A request that waits for the models.

    Attributes:
      ask: What is asked.
      came: When it came, by ``time.perf_counter``.
      future: Gets the answer.
      loop: Where somebody awaits it.
    """

    ask: Ask
    came: float
    future: asyncio.Future[Answer]
    loop: asyncio.AbstractEventLoop


@dataclass(frozen=True, eq=False)
class Answer:
    """Lists, and what made them.

    Attributes:
      lists: See :func:`tfrec.serving.asking.answers`.
      version: What answered.
      spans: Stage, begin and end, by ``time.perf_counter``.
    """

    lists: dict[str, Listed]
    version: Version
    spans: Sequence[Span]


class _Stages:
    """Notes each stage from the end of the one before."""

    def __init__(self) -> None:
        self.last = time.perf_counter()
        self.spans: list[Span] = []

    def __call__(self, stage: str) -> None:
        now = time.perf_counter()
        self.spans.append((stage, self.last, now))
        self.last = now


class Service:
    """A bundle being served.

    Args:
      bundle: The folder.
      settings: Of the server.
      state: What it must not forget.
      engine: What makes the engine of a version, of LiteRT's; None: that is it.

    Raises:
      ArtifactError: the bundle has no version that can be served.
    """

    def __init__(
        self,
        bundle: Path,
        settings: ServeConfig,
        state: State,
        engine: MakeEngine | None = None,
    ) -> None:
        self.settings, self.state = settings, state
        make = engine or (lambda found, own: own)
        self.versions = Versions(
            bundle, state, lambda number: versions.load(bundle, number, settings.threads, make)
        )
        self._jobs: deque[Job | tuple[Callable[[], Any], Future[Any]]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._pace = 0.0  # seconds that a request has taken lately
        self._activating = threading.Lock()
        self._seen = 0  # the newest version that was there when we last looked
        self._tried: set[int] = set()
        self._refused: tuple[tuple[str, float], ...] = ()  # what another activated and we cannot
        self._models = threading.Thread(target=self._work, name="models", daemon=True)
        self._watcher = threading.Thread(target=self._watch, name="watch", daemon=True)
        self._stop = threading.Event()

    # --- life ------------------------------------------------------------------------------------

    def start(self) -> None:
        """Loads what was active last, else the newest that is whole, and begins to answer."""
        shares = self.versions.wanted()
        try:
            ready = {name: self.versions.load(name) for name, _ in shares}
        except ArtifactError as error:
            shares, ready = self._whole(error)
        self.versions.use(shares, ready)
        self._seen = self.versions.newest
        self._models.start()
        if self.settings.watch:
            self._watcher.start()

    def _whole(self, error: ArtifactError) -> tuple[list[tuple[str, float]], dict[str, Version]]:
        """The newest version that can be loaded, where what was wanted cannot."""
        for number in reversed(numbers(self.versions.bundle)):
            name = str(number)
            if name in self.versions.failed:
                continue
            with contextlib.suppress(ArtifactError):
                ready = {name: self.versions.load(name)}
                _log.error("version %s is served, since: %s", name, error)
                return [(name, 1.0)], ready
        raise error

    def close(self) -> None:
        """Answers what waits, then stops."""
        self._stop.set()
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._models.is_alive():
            self._models.join(timeout=30)

    @property
    def ready(self) -> bool:
        """Whether questions can be answered."""
        if self._closing or not self.versions.shares or not self._models.is_alive():
            return False
        try:
            self.state.get("active")
        except StateError:
            return False
        return True

    @property
    def waiting(self) -> int:
        """How many requests wait for the models."""
        return len(self._jobs)

    # --- the thread that has the models ----------------------------------------------------------

    async def ask(
        self, body: RecommendBody, request_id: str, shelves: tuple[Shelf, ...] = ()
    ) -> Answer:
        """The answer to a request, which may be made together with others.

        Raises:
          BusyError: too many requests wait.
          LateError: it waited past the deadline.
          ClosingError: the server is going down.
        """
        loop = asyncio.get_running_loop()
        job = Job(
            Ask(body, request_id, shelves=shelves), time.perf_counter(), loop.create_future(), loop
        )
        self._enqueue(job)
        return await job.future

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Runs work in the thread that has the models, between batches."""
        future: Future[T] = Future()
        self._enqueue((work, future))
        return future

    def _enqueue(self, job: Any) -> None:
        with self._wake:
            if self._closing:
                raise ClosingError
            # Better refused at once than answered too late, after others waited for it.
            wait = len(self._jobs) * self._pace if isinstance(job, Job) else 0.0
            if len(self._jobs) >= self.settings.queue or wait > self.settings.deadline:
                raise BusyError
            self._jobs.append(job)
            self._wake.notify()

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._jobs and not self._closing:
                    self._wake.wait()
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                batch: list[Job] = []
                if isinstance(job, Job):
                    batch.append(job)
                    while self._jobs and len(batch) < self.settings.batch:
                        follows = self._jobs[0]
                        if not isinstance(follows, Job):
                            break
                        batch.append(follows)
                        self._jobs.popleft()
            if batch:
                self._answer(batch)
            elif not isinstance(job, Job):
                _run(*job)

    def _answer(self, batch: list[Job]) -> None:
        started = time.perf_counter()
        late = [j for j in batch if started - j.came > self.settings.deadline]
        _tell(late, [LateError()] * len(late))
        jobs = [job for job in batch if job not in late and not job.future.cancelled()]
        if not jobs:
            return
        try:
            asks = self._known([job.ask for job in jobs])
        except Exception as error:  # noqa: BLE001 - told to who waits
            _tell(jobs, [error] * len(jobs))
            return
        known = time.perf_counter()
        groups: dict[str, tuple[Version, list[int]]] = {}
        for place, ask in enumerate(asks):
            version = self.versions.of(ask.body.user_id or ask.request_id)
            groups.setdefault(version.name, (version, []))[1].append(place)
        for version, places in groups.values():
            found = self._answers(version, [asks[p] for p in places])
            results: list[Any] = []
            for place, one in zip(places, found, strict=True):
                if isinstance(one, Answer):
                    waited: Span = ("wait", jobs[place].came, started)
                    spans = [waited, ("state", started, known), *one.spans]
                    one = Answer(one.lists, one.version, spans)
                results.append(one)
            _tell([jobs[p] for p in places], results)
        took = (time.perf_counter() - started) / len(jobs)
        self._pace += _LATELY * (took - self._pace)

    def _answers(self, version: Version, asks: Sequence[Ask]) -> list[Answer | Exception]:
        stages = _Stages()
        version.chain.marks = stages
        try:
            lists = asking.answers(asks, version.chain, version.steps)
        except Exception as error:  # noqa: BLE001 - told to who waits
            if len(asks) == 1:
                return [error]
            # One bad request must not fail those that happened to be answered with it.
            return [one for ask in asks for one in self._answers(version, [ask])]
        return [Answer(found, version, stages.spans) for found in lists]

    def _known(self, asks: Sequence[Ask]) -> list[Ask]:
        users = list(dict.fromkeys(ask.body.user_id for ask in asks if ask.body.user_id))
        if not users:
            return list(asks)
        events = dict(zip(users, self.state.histories(users), strict=True))
        gone = self.state.forgotten(users)
        return [
            Ask(a.body, a.request_id, events[u], u in gone, a.shelves)
            if (u := a.body.user_id)
            else a
            for a in asks
        ]

    # --- lists that are no recommendation of the chain -------------------------------------------

    def look(
        self,
        user_id: str | None,
        request_id: str,
        k: int,
        find: Callable[[Version, Any, Ask], Any],
    ) -> Future[Answer]:
        """Runs ``find`` on a user's version: version, request, ask -> ranked, as a plain list."""
        body = RecommendBody(user_id=user_id, k=k)

        def work() -> Answer:
            (ask,) = self._known([Ask(body, request_id)])
            version = self.versions.of(user_id or request_id)
            stages = _Stages()
            version.chain.marks = None
            request = asking.request_of(ask, version.chain, version.steps)
            found = find(version, request, ask)
            lists = {"items": asking.listed(ask, found, version.chain, asking._PLAIN)}
            stages("retrieve")
            return Answer(lists, version, stages.spans)

        return self.call(work)

    # --- what changes ----------------------------------------------------------------------------

    def put_items(self, items: Sequence[Item]) -> Future[None]:
        """Puts items: on disk, and in every version that is served, before the future is done."""

        def work() -> None:
            for version in self.versions.loaded.values():
                version.chain.catalog.schema.encode(
                    {
                        n: [i.attributes.get(n, "") for i in items]
                        for n in version.chain.catalog.attributes
                    },
                    len(items),
                )
            self.state.put_items(items)
            self._catch_up()

        return self.call(work)

    def delete_item(self, item_id: str) -> Future[bool]:
        """Takes an item out for good; False: it is not there."""

        def work() -> bool:
            chains = [version.chain for version in self.versions.loaded.values()]
            rows = [chain.catalog.row(item_id) for chain in chains]
            if not any(r and r not in c.deleted for r, c in zip(rows, chains, strict=True)):
                return False
            self.state.put_items([Item(item_id, deleted=True)])
            self._catch_up()
            return True

        return self.call(work)

    def _catch_up(self) -> None:
        for version in self.versions.loaded.values():
            version.catch_up(self.state)

    def append(self, events: Sequence[Event]) -> list[bool]:
        """Keeps events; see :meth:`State.append`."""
        return self.state.append(events)

    def activate(self, name: str, share: float = 1.0) -> None:
        """Loads and warms a version, then gives it its share of users without a pause.

        Raises:
          InputError: there is no such version.
          TfrecError: it cannot be loaded; what is served stays as it is.
        """
        with self._activating:
            found = self.versions.load(name)

            def swap() -> None:
                found.catch_up(self.state)
                shares = self.versions.shared(name, share)
                self.state.set("active", json.dumps(shares))
                self.versions.use(shares, {name: found})

            self.call(swap).result()

    # --- what happens elsewhere: a new version on disk, another process that shares the state -----

    def _watch(self) -> None:
        while not self._stop.wait(self.settings.watch):
            try:
                self.look_around()
            except (BusyError, ClosingError):
                continue
            except TfrecError as error:
                _log.error("%s", error)
            except Exception:  # noqa: BLE001 - who watches must not end
                _log.exception("looking for a new version failed")

    def look_around(self) -> None:
        """Takes in a version that is newer than all that were there, and what others changed."""
        newest = self.versions.newest
        if newest > self._seen and newest not in self._tried:
            self._tried.add(newest)
            self.activate(str(newest))
            self._seen = newest
        with self._activating:  # else what is being activated here looks like another's change
            told = [(str(name), float(share)) for name, share in self.versions.wanted()]
            known = (self.versions.shares, self._refused)
            if self.state.get("active") and tuple(told) not in known:
                self._refused = tuple(told)  # unless it goes well: once is enough to try
                ready = {name: self.versions.load(name) for name, _ in told}
                self.call(lambda: self.versions.use(told, ready)).result()
                self._refused = ()
        self.call(self._catch_up).result()


def _run(work: Callable[[], Any], future: Future[Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(work())
    except Exception as error:  # noqa: BLE001 - told to who waits
        future.set_exception(error)


def _tell(jobs: Sequence[Job], results: Iterable[Any]) -> None:
    """Gives each waiting request its answer, one wake-up for each event loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Future[Any], Any]]] = {}
    for job, result in zip(jobs, results, strict=True):
        by_loop.setdefault(job.loop, []).append((job.future, result))
    for loop, pairs in by_loop.items():
        loop.call_soon_threadsafe(_settle, pairs)


def _settle(pairs: Sequence[tuple[asyncio.Future[Any], Any]]) -> None:
    for future, result in pairs:
        if future.done():
            continue
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)


def attributes_of(told: Mapping[str, str | list[str]], separator: str) -> dict[str, str]:
    """Attributes of a body as the cells of a catalog.

    Raises:
      InputError: a value holds the separator.
    """
    cells = {}
    for name, value in told.items():
        values = [value] if isinstance(value, str) else value
        for one in values:
            if separator in one and not isinstance(value, str):
                raise InputError(f"attributes.{name} holds '{one}' with a '{separator}'; split it")
        cells[name] = separator.join(v.strip() for v in values if v.strip())
    return cells
